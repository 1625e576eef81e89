"""Files of lines: JSONL and CSV, read without ever holding more than one record."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from itertools import chain

from pipelines.records import BYTE_ORDER_MARK, Record, RecordMaker
from pipelines.sources import Quarantined
from pipelines.streams import Damaged

Read = Callable[[int], bytes]
"""The next so many bytes; fewer only where the text ends."""

_BLOCK_BYTES = 256 * 1024
_INSIDE_QUOTES = re.compile(rb'[^"]*+(?:""[^"]*+)*+')


def segments(read: Read, begin: int, max_bytes: int) -> Iterator[tuple[int, bytes, bool]]:
    """Lines as (offset, the line without its line feed, True); of a line longer than `max_bytes` come parts, with False
    for all but the last."""
    held: list[bytes] = []
    at, size = begin, 0
    while block := read(_BLOCK_BYTES):
        *lines, rest = block.split(b"\n")
        for line in lines:
            if held:
                line = b"".join((*held, line))
                held, size = [], 0
            yield at, line, True
            at += len(line) + 1
        if rest:
            held.append(rest)
            size += len(rest)
        if size > max_bytes:
            yield at, b"".join(held), False
            at += size
            held, size = [], 0
    if held:
        yield at, b"".join(held), True


def read_jsonl(read: Read, begin: int, end: int | None, maker: RecordMaker) -> Iterator[Record | Quarantined]:
    """The records of the lines that begin at `begin` or after it, and before `end`; blank lines are none.

    `read` starts one byte before `begin`, if that is not 0: only so does it show whether a line begins there.
    """
    line_at, long, first = begin, 0, begin > 0
    try:
        for at, line, ends in segments(read, max(0, begin - 1), maker.max_bytes):
            if first:  # of a line that began before
                first, line_at = not ends, at + len(line) + 1
                if end is not None and line_at > end:
                    return
                continue
            if end is not None and line_at >= end:
                return
            if not ends or long:
                long += len(line)
                if not ends:
                    continue
            if long or len(line) > maker.max_bytes:
                yield maker.too_long(line_at, f"{long or len(line)} bytes")
                long = 0
            elif line and not line.isspace():
                yield maker.make_from_json(line, line_at)
            line_at = at + len(line) + 1
    except Damaged as damage:
        yield maker.quarantined(line_at, str(damage))
        return
    if long:
        yield maker.too_long(line_at, f"{long} bytes")


class _TooLong(Exception):
    """A record of CSV is longer than allowed."""


class _Quotes:
    """Whether quotes enclose the end of a record of which part after part is shown (RFC 4180, section 2).

    Quotes open where a field begins; elsewhere in a bare field they are characters, as in `27" screen`."""

    def __init__(self, delimiter: str) -> None:
        self._opens = re.compile(rb'%b"' % re.escape(delimiter.encode()))
        self._delimiter = delimiter.encode()
        self.enclose = self._closed = False
        self._begins = True  # a field

    def show(self, part: bytes) -> None:
        at = 0
        while at < len(part):
            if self._closed or self._begins:
                opens = part[at : at + 1] == b'"'  # quotes behind closing ones are one of two that stand for one
                self._closed = self._begins = False
                if opens:
                    self.enclose, at = True, at + 1
                    continue
            if self.enclose:
                inside = _INSIDE_QUOTES.match(part, at)
                assert inside is not None  # it matches the empty string too
                at = inside.end()
                if at < len(part):
                    self.enclose, self._closed, at = False, True, at + 1
            else:
                found = self._opens.search(part, at)
                self._begins = found is None and part.endswith(self._delimiter)
                self.enclose, at = found is not None, found.end() if found else len(part)


class _Feed:
    """Lines for `csv.reader`, which asks for as many as a record has."""

    def __init__(self, read: Read, delimiter: str, max_bytes: int) -> None:
        self._parts = self._counted(segments(read, 0, max_bytes))
        self._delimiter = delimiter
        self._max_bytes = max_bytes
        self.begin_record()

    def begin_record(self) -> None:
        self.size = self.lines = 0
        self._shown: list[tuple[bytes, bool]] = []

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        self._shown.append(next(self._parts))
        if self.size > self._max_bytes:
            raise _TooLong
        return self._shown[-1][0].decode("utf-8", "surrogateescape") + "\n"

    def skip(self) -> None:
        """Go to the end of a record that is too long: the end of a line that no quotes enclose."""
        quotes = _Quotes(self._delimiter)
        for part, ends in chain(self._shown, self._parts):
            quotes.show(part + b"\n" if ends else part)
            if ends and not quotes.enclose:
                return

    def _counted(self, parts: Iterator[tuple[int, bytes, bool]]) -> Iterator[tuple[bytes, bool]]:
        """Lines, or parts of one that is too long, and whether the line ends there."""
        for at, part, ends in parts:
            self.size += len(part) + ends
            self.lines += ends
            yield part.removeprefix(BYTE_ORDER_MARK) if at == 0 else part, ends


def read_csv(read: Read, delimiter: str, maker: RecordMaker) -> Iterator[Record | Quarantined]:
    """The records of RFC 4180's rows, by their number; the header names the columns and has none.

    Broken quoting costs the row in which it shows, and the lines that the row swallowed. Where the row ended nobody can
    tell, so of a value on several lines the rest is taken for rows.
    """
    csv.field_size_limit(maker.max_bytes)  # of a file's row the feed sees to it that it is no longer
    feed = _Feed(read, delimiter, maker.max_bytes)
    rows = csv.reader(feed, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        feed.begin_record()
        problem = None
        row: list[str] = []
        try:
            row = next(rows)
        except StopIteration:
            return
        except Damaged as damage:
            yield maker.quarantined(number, str(damage))
            return
        except csv.Error as error:
            problem = maker.quarantined(number, f"no CSV: {error} ({feed.size} bytes are lost)")
        except _TooLong:
            try:
                feed.skip()
            except Damaged as damage:
                yield maker.quarantined(number, str(damage))
                return
            lines = f" in {feed.lines} lines" if feed.lines > 1 else ""
            problem = maker.too_long(number, f"{feed.size} bytes{lines}")
        if not problem and not row:
            continue  # a blank line is no row
        if header is None:
            if problem or (reason := maker.missing(row)):
                yield problem or maker.quarantined(0, str(reason))
                return
            header = row
            continue
        yield problem or _row(header, row, number, maker)
        number += 1


def _row(header: list[str], row: list[str], number: int, maker: RecordMaker) -> Record | Quarantined:
    if len(row) != len(header):
        return maker.quarantined(number, f"no CSV: {len(row)} fields where the header has {len(header)}")
    try:
        for field in row:
            field.encode()
    except UnicodeEncodeError:
        return maker.quarantined(number, "not UTF-8")
    return maker.make(dict(zip(header, row, strict=True)), number)
