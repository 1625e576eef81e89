"""Files of lines: JSONL and CSV, read without ever holding more than one record."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator

from pipelines.records import Record, RecordMaker
from pipelines.sources import Quarantined
from pipelines.streams import Damaged

Read = Callable[[int], bytes]
"""The next so many bytes; fewer only where the text ends."""

_BLOCK_BYTES = 256 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
                yield maker.too_long(line_at, long or len(line))
                long = 0
            elif line and not line.isspace():
                yield maker.make_from_json(line, line_at)
            line_at = at + len(line) + 1
    except Damaged as damage:
        yield maker.quarantined(line_at, str(damage))
        return
    if long:
        yield maker.too_long(line_at, long)


class _TooLong(Exception):
    """A record of CSV is longer than allowed."""


class _Feed:
    """Lines for `csv.reader`, which asks for as many as a record has."""

    def __init__(self, read: Read, max_bytes: int) -> None:
        self._segments = segments(read, 0, max_bytes)
        self._max_bytes = max_bytes
        self.size = 0
        self._quotes = 0
        self._ended = True

    def begin_record(self) -> None:
        self.size = self._quotes = 0

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = self._line()
        if self.size > self._max_bytes:
            raise _TooLong
        return line.decode("utf-8", "surrogateescape") + "\n"

    def skip(self) -> None:
        """Go to the end of a record that is too long: the end of a line that no quotes enclose."""
        while not self._ended or self._quotes % 2:
            try:
                self._line()
            except StopIteration:
                return

    def _line(self) -> bytes:
        at, line, self._ended = next(self._segments)
        self.size += len(line) + self._ended
        self._quotes += line.count(b'"')
        return line.removeprefix(_BYTE_ORDER_MARK) if at == 0 else line


def read_csv(read: Read, delimiter: str, maker: RecordMaker) -> Iterator[Record | Quarantined]:
    """The records of RFC 4180's rows, by their number; the header names the columns and has none.

    Broken quoting costs the row in which it shows, and those that the row swallowed.
    """
    csv.field_size_limit(maker.max_bytes)  # of a file's row the feed sees to it that it is no longer
    feed = _Feed(read, maker.max_bytes)
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
            problem = maker.too_long(number, feed.size)
        if header is None:
            if problem or (reason := maker.missing(row)):
                yield problem or maker.quarantined(0, str(reason))
                return
            header = row
            continue
        if problem:
            yield problem
        elif row:
            yield _row(header, row, number, maker)
        else:
            continue  # a blank line is no row
        number += 1


def _row(header: list[str], row: list[str], number: int, maker: RecordMaker) -> Record | Quarantined:
    if len(row) != len(header):
        return maker.quarantined(number, f"no CSV: {len(row)} fields where the header has {len(header)}")
    found = maker.make(dict(zip(header, row, strict=True)), number)
    if isinstance(found, Quarantined) and "surrogate" in found.reason:
        return maker.quarantined(number, "not UTF-8")
    return found
