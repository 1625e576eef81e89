"""From files to documents: the formats, and how each is read.

    text              a file of up to WHOLE_FILE_BYTES is one document; a larger one is cut
    code              a file is one document
    jsonl             a line is one, a JSON object with the text under `text_column`
    csv               a row is one, in the column `text_column`; tab-separated if the name ends in .tsv
    parquet, arrow    a row is one (pipelines/tables.py)
    chat, preference  a line of JSON or a row of a table is one; its text is the record's canonical JSON

Text, code, JSONL and CSV may be compressed, as .gz or .zst. They are UTF-8; what is not is quarantined, document by
document. In text and code newlines become `\\n`. A byte-order mark goes, at the begin of a file and, where files were
put behind each other, of a line of JSON or a document.

A text is cut after the first blank line in each stretch of DOCUMENT_BYTES, failing that after the first newline,
failing that between two characters. Whether a stretch is read alone or with its neighbours, the cuts are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from pipelines.file_types import codec_of, container_of, delimiter_of
from pipelines.lines import Read, read_csv, read_jsonl
from pipelines.records import Limits, Record, RecordMaker
from pipelines.sources import DOCUMENT_BYTES, WHOLE_FILE_BYTES, Piece, Quarantined, Source
from pipelines.streams import Damaged, Decompressed, SourceStream
from pipelines.tables import read_table

__all__ = ["Limits", "Record", "first_cut", "read_piece"]

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_LISTED = 100


def read_piece(source: Source, piece: Piece, limits: Limits) -> Iterator[Record | Quarantined]:
    """The piece's documents in order, and between them what could not be read.

    Of a run of unreadable records the first _LISTED come one by one and the others as one: a file of another format
    has millions. Raises DataError if the file is not the one that was listed, and StorageError if the store fails.
    """
    listed, rest = 0, None
    for found in _read(source, piece, limits):
        if isinstance(found, Record):
            if rest is not None:
                yield rest
            listed, rest = 0, None
            yield found
        elif listed < _LISTED:
            listed += 1
            yield found
        else:
            rest = found if rest is None else replace(rest, records=rest.records + found.records)
    if rest is not None:
        yield rest


def _read(source: Source, piece: Piece, limits: Limits) -> Iterator[Record | Quarantined]:
    path = piece.file.path
    name = source.name(path)
    maker = RecordMaker(source, name, limits)
    container = container_of(path, source.format)
    try:
        stream = SourceStream(source, piece.file)
    except Damaged as damage:
        yield maker.quarantined(piece.begin, str(damage))
        return
    with closing(stream):
        if container in ("parquet", "arrow"):
            yield from read_table(stream, container, piece, maker, limits)
            return
        codec = codec_of(path)
        read: Read = stream.read
        end = None
        if codec:
            read = Decompressed(stream, codec, limits.max_decompressed_bytes).read
        elif piece.unit:
            end = piece.end
            stream.seek(max(0, piece.begin - 1) if container == "jsonl" else piece.begin)
        if container == "jsonl":
            yield from read_jsonl(read, piece.begin, end, maker)
        elif container == "csv":
            yield from read_csv(read, delimiter_of(path), maker)
        elif container == "code":
            yield _read_code(read, maker)
        else:
            yield from _read_text(read, piece.begin, end, maker)


def _read_code(read: Read, maker: RecordMaker) -> Record | Quarantined:
    try:
        data = read(maker.max_bytes + 1)
        if len(data) > maker.max_bytes:
            return maker.quarantined(0, f"a file of more than data.max_document_bytes={maker.max_bytes}")
        read(1)  # shows damage behind the text
    except Damaged as damage:
        return maker.quarantined(0, str(damage))
    return _document(data, 0, maker)


def _read_text(read: Read, begin: int, end: int | None, maker: RecordMaker) -> Iterator[Record | Quarantined]:
    """A whole text, or of a divided one the documents that begin in the stretches from `begin` to `end`."""
    ahead = b""
    if end is None:
        try:
            ahead = read(WHOLE_FILE_BYTES + 1)
            if len(ahead) <= WHOLE_FILE_BYTES:
                read(1)
                yield _document(ahead, 0, maker)
                return
        except Damaged as damage:
            yield maker.quarantined(0, str(damage))
            return
    held, held_at, position = b"", begin, begin
    try:
        while stretch := _take(ahead, read):
            ahead = ahead[DOCUMENT_BYTES:]
            cut = first_cut(stretch) if position else 0
            held += stretch[:cut]
            if position > begin and held:  # what is before the first cut belongs to the piece before
                yield _document(held, held_at, maker)
            held, held_at = stretch[cut:], position + cut
            if end is not None and position >= end:
                return
            position += len(stretch)
    except Damaged as damage:
        yield maker.quarantined(held_at, str(damage))
        return
    if held:
        yield _document(held, held_at, maker)


def _take(ahead: bytes, read: Read) -> bytes:
    """The next stretch, of which `ahead` may be read already."""
    missing = DOCUMENT_BYTES - len(ahead)
    return ahead + read(missing) if missing > 0 else ahead[:DOCUMENT_BYTES]


def first_cut(stretch: bytes) -> int:
    """The best place in a stretch of UTF-8 text to begin a new document."""
    if blank := _BLANK_LINE.search(stretch):
        return blank.end()
    if (newline := stretch.find(b"\n")) >= 0:
        return newline + 1
    head = stretch[:4]
    rest_of_character = len(head) - len(head.lstrip(bytes(range(0x80, 0xC0))))
    return rest_of_character if rest_of_character < 4 else 0  # four in a row are no UTF-8


def _document(data: bytes, offset: int, maker: RecordMaker) -> Record | Quarantined:
    text = maker.decode(data, offset)
    if isinstance(text, Quarantined):
        return text
    if (nul := data.find(b"\0")) >= 0:
        return maker.quarantined(offset + nul, "binary: it has a NUL byte")
    return maker.text(text.replace("\r\n", "\n").replace("\r", "\n"), offset)
