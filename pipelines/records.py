"""Records: one document each, made of a line of JSON, a row of a table, or a text.

What is no record of its source's kind comes as Quarantined, with its position and the reason.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.conversations import canonical, parse_chat, parse_preference
from pipelines.sources import Quarantined, Source

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_TEXT_COLUMN, _CHAT_COLUMN, _SHAREGPT_COLUMN = "text", "messages", "conversations"
_PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of a record, and of the text of a compressed file."""

    max_document_bytes: int
    max_decompressed_bytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """A document; for kind chat and preference its canonical JSON. `path` and `offset` as in Quarantined; `metadata`
    is a JSON object with the source's metadata columns, or empty."""

    text: str
    path: str
    offset: int
    metadata: str = ""


@dataclass(frozen=True, slots=True)
class Undecodable:
    """In place of a table's value that Python cannot hold: text that is not UTF-8, a date beyond the year 9999."""

    reason: str


class RecordMaker:
    """Makes the records of one file, `name` being its URI."""

    def __init__(self, source: Source, name: str, limits: Limits) -> None:
        self._kind = source.kind
        self._name = name
        self.metadata_columns = source.config.metadata_columns
        self.max_bytes = limits.max_document_bytes
        self.columns: tuple[str, ...] = _PREFERENCE_COLUMNS
        if self._kind != "preference":
            usual = _CHAT_COLUMN if self._kind == "chat" else _TEXT_COLUMN
            self.columns = (source.config.text_column or usual,)

    @property
    def is_text(self) -> bool:
        return self._kind == "text"

    def quarantined(self, offset: int, reason: str, records: int = 1) -> Quarantined:
        return Quarantined(self._name, offset, reason, records)

    def too_long(self, offset: int, what: str) -> Quarantined:
        return self.quarantined(offset, f"{what}, more than data.max_document_bytes={self.max_bytes}")

    def missing(self, columns: list[str]) -> str | None:
        """Why a table with these columns yields nothing."""
        for name in (*self.columns, *self.metadata_columns):
            if columns.count(name) != 1:
                what = "no" if name not in columns else "more than one"
                return f"{what} column {name!r}; {self._instead(columns)}"
        return None

    def _instead(self, names: Collection[str]) -> str:
        """What there is in place of what is missing."""
        shown = ", ".join(map(repr, names)) or "none"
        had = f"it has {shown if len(shown) <= 200 else shown[:200] + '...'}"
        if self.is_text and self.columns[0] not in names:
            if _CHAT_COLUMN in names:
                return f"{had}; for conversations set format: chat"
            if _SHAREGPT_COLUMN in names:
                return f"{had}; for conversations set format: chat and text_column: {_SHAREGPT_COLUMN}"
        return had

    def text(self, text: str, offset: int) -> Record:
        """The record of what is nothing but text."""
        return Record(text, self._name, offset)

    def make(self, values: Mapping[str, Any], offset: int) -> Record | Quarantined:
        """The record of a row or of a JSON object."""
        try:
            text = self._text(values)
            size = len(text) if text.isascii() else len(text.encode())
            metadata = self._metadata(values) if self.metadata_columns else ""
        except UnicodeEncodeError:
            return self.quarantined(offset, "half of a surrogate pair, which stands for no character")
        except (ValueError, RecursionError) as error:
            return self.quarantined(offset, str(error))
        if size > self.max_bytes:
            return self.too_long(offset, f"{size} bytes")
        if len(metadata) > self.max_bytes:
            return self.too_long(offset, f"{len(metadata)} bytes of metadata")
        return Record(text, self._name, offset, metadata)

    def decode(self, data: bytes, offset: int) -> str | Quarantined:
        """UTF-8 without the byte-order mark that may begin it."""
        begin = len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
        try:
            return str(memoryview(data)[begin:], "utf-8")
        except UnicodeDecodeError as error:
            return self.quarantined(offset + begin + error.start, f"not UTF-8: {error.reason}")

    def make_from_json(self, line: bytes, offset: int) -> Record | Quarantined:
        text = self.decode(line, offset)
        if isinstance(text, Quarantined):
            return text
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            return self.quarantined(offset, f"no JSON: {error.msg.removesuffix(' at')} at character {error.pos}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
            return self.quarantined(offset, f"no JSON that can be read: {error}")
        if not isinstance(value, dict):
            return self.quarantined(offset, f"{_kind_of(value)}, and no object with keys")
        return self.make(value, offset)

    def _text(self, values: Mapping[str, Any]) -> str:
        for column in self.columns:
            if isinstance(value := values.get(column), Undecodable):
                raise ValueError(value.reason)
        if self._kind == "preference":
            return canonical(parse_preference(values))
        (column,) = self.columns
        if column not in values:
            raise ValueError(f"no key {column!r}; {self._instead(values.keys())}")
        value = values[column]
        if self._kind == "chat":
            return canonical(parse_chat(value))
        if not isinstance(value, str):
            raise ValueError(f"{column!r} is {_kind_of(value)}, and no text")
        if "\0" in value:
            raise ValueError("binary: it has a NUL byte")
        return value

    def _metadata(self, values: Mapping[str, Any]) -> str:
        kept = {name: _jsonable(values[name]) for name in sorted(self.metadata_columns) if name in values}
        return json.dumps(kept)


def _jsonable(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return value.reason if isinstance(value, Undecodable) else str(value)
    return value


def _kind_of(value: object) -> str:
    """In JSON's words."""
    if value is None:
        return "null"
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"of type {type(value).__name__}")
