"""Parquet and Arrow files, read a few rows at a time.

    Parquet        row groups, page by page; a group that cannot be read is quarantined, and reading goes on behind it
    Arrow          IPC files and IPC streams, record batch by record batch, the folders of `datasets.save_to_disk` too

What holds in memory is bounded by the file's pages and record batches, not by its size; a block above MAX_BLOCK_BYTES
is quarantined. A file's own numbers are not believed: offsets of Arrow data are checked before anything follows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import StorageError
from pipelines.file_types import codec_of
from pipelines.records import Limits, Record, RecordMaker, Undecodable
from pipelines.sources import DataError, Piece, Quarantined
from pipelines.streams import SourceStream

_BUFFER_BYTES = 1 << 20
_BATCH_BYTES = 256 << 20
_PARQUET_ROWS = 8  # more at once are no faster
_ARROW_ROWS = 64
_UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError, NotImplementedError)
_ARROW_FILE_MAGIC = b"ARROW1"


class _Unreadable(Exception):
    """The file, or a part of it, is not what it should be; the message is the reason."""


def read_table(
    stream: SourceStream, container: str, piece: Piece, maker: RecordMaker, limits: Limits
) -> Iterator[Record | Quarantined]:
    """The records of a piece of a Parquet file, or of an Arrow file, by their rows."""
    if codec := codec_of(piece.file.path):
        yield maker.quarantined(
            0, f"a {container} file inside {codec}; decompress it, {container} compresses by itself"
        )
        return
    rows = _parquet(stream, piece, maker) if container == "parquet" else _arrow(stream, maker)
    total = 0
    for row, found in rows:
        if isinstance(found, Quarantined):
            yield found
            continue
        columns = [_values(column) for column in found.columns]
        total += sum(map(_size, found.columns, columns))
        if total > limits.max_decompressed_bytes:
            bound = f"data.max_decompressed_bytes={limits.max_decompressed_bytes}"
            yield maker.quarantined(row, f"more than {bound}; the rows from here on are not read")
            return
        for values in zip(*columns, strict=True):
            yield maker.make(dict(zip(found.schema.names, values, strict=True)), row)
            row += 1


_Batches = Iterator[tuple[int, pa.RecordBatch | Quarantined]]


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except _UNREADABLE:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Undecodable("not UTF-8")
    except _UNREADABLE as error:
        return Undecodable(_one_line(error))


def _size(column: pa.Array, values: list[Any]) -> int:
    """Bytes of the values. Those of a dictionary are in memory once, and in the text in every row that has them."""
    if pa.types.is_dictionary(column.type):
        return sum(len(value) for value in values if isinstance(value, str | bytes))
    return column.nbytes


def _check_schema(schema: pa.Schema, maker: RecordMaker) -> list[str]:
    """The columns to read. Raises _Unreadable if the text is not among them."""
    if reason := maker.missing(schema.names):
        raise _Unreadable(reason)
    if maker.is_text and not _is_text(schema.field(maker.columns[0]).type):
        raise _Unreadable(f"column {maker.columns[0]!r} is {schema.field(maker.columns[0]).type}, and no text")
    return list(dict.fromkeys((*maker.columns, *maker.metadata_columns)))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


# -- Parquet


def _parquet(stream: SourceStream, piece: Piece, maker: RecordMaker) -> _Batches:
    try:
        # buffered: a column's pages one after the other, instead of the whole column at once
        file = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        columns = _check_schema(file.schema_arrow, maker)
        metadata = file.metadata
    except (DataError, StorageError):
        raise
    except (*_UNREADABLE, _Unreadable) as error:
        if piece.begin == 0:
            yield 0, maker.quarantined(0, _reason("Parquet", error))
        return
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    total = sum(_bytes(group) for group in groups)
    row = size = 0
    for index, group in enumerate(groups):
        # Where it begins is not asked: pyarrow ends the process if what a footer says of a column is damaged. Its share
        # of the bytes before it is as good: any rule will do that gives every group to one piece.
        if piece.begin <= size * piece.file.size // (total + 1) < piece.end:
            yield from _row_group(file, index, columns, row, maker)
        row += group.num_rows
        size += _bytes(group)


def _row_group(file: pq.ParquetFile, index: int, columns: list[str], row: int, maker: RecordMaker) -> _Batches:
    group = file.metadata.row_group(index)
    last = row + group.num_rows
    # A value of a dictionary may stand in every row, so a value counts as large as the whole group.
    size = max(1, min(_PARQUET_ROWS, _BATCH_BYTES // (_bytes(group) + 1)))
    try:
        batches = file.iter_batches(size, row_groups=[index], columns=columns, use_threads=False)
        for batch in batches:
            yield row, batch
            row += len(batch)
    except (DataError, StorageError):
        raise
    except (*_UNREADABLE, _Unreadable) as error:
        yield row, maker.quarantined(row, f"{_reason('Parquet', error)} ({last - row} rows)")
        return
    if row < last:
        yield row, maker.quarantined(row, f"the row group ends too early ({last - row} rows)")


def _bytes(group: Any) -> int:
    """Of a row group's pages when decompressed, as the footer says."""
    return max(0, group.total_byte_size)


# -- Arrow


def _arrow(stream: SourceStream, maker: RecordMaker) -> _Batches:
    row = 0
    try:
        for batch in _record_batches(stream, maker):
            problem = _damage(batch)
            if problem:
                yield row, maker.quarantined(row, f"{problem} ({len(batch)} rows)")
            else:
                for begin in range(0, len(batch), _ARROW_ROWS):
                    yield row + begin, batch.slice(begin, _ARROW_ROWS)
            row += len(batch)
    except (DataError, StorageError):
        raise
    except (*_UNREADABLE, _Unreadable, StopIteration) as error:
        yield row, maker.quarantined(row, _reason("Arrow", error))


def _record_batches(stream: SourceStream, maker: RecordMaker) -> Iterator[pa.RecordBatch]:
    is_file = stream.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
    stream.seek(0)
    schema = opened(stream).schema
    fields = [schema.get_field_index(name) for name in _check_schema(schema, maker)]
    stream.seek(0)
    # what nobody wants is not decompressed
    reader = opened(stream, options=pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False))
    if is_file:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
        return
    while True:
        try:
            yield reader.read_next_batch()
        except StopIteration:
            break
    stream.seek(-4, 2)
    if stream.read(4) != b"\0\0\0\0":
        raise _Unreadable("the stream has no end mark: it may have been cut off here")


def _damage(batch: pa.RecordBatch) -> str | None:
    """Why following the batch's offsets would leave its memory. Text that is not UTF-8 is each row's own matter."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate()
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                column = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
            column.validate(full=True)
        except _UNREADABLE as error:
            return f"column {name!r} is damaged: {_one_line(error)}"
    return None


def _reason(format: str, error: BaseException) -> str:
    if isinstance(error, _Unreadable):
        return str(error)
    return f"no {format} that can be read: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
