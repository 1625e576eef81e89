"""Parquet and Arrow files, read a few rows at a time.

    Parquet        row groups, page by page; a group that cannot be read is quarantined, and reading goes on behind it
    Arrow          IPC files and IPC streams, record batch by record batch, the folders of `datasets.save_to_disk` too;
                   a batch that cannot be read likewise, and its rows are not counted

What holds in memory is bounded by the file's pages and record batches, not by its size; a block above MAX_BLOCK_BYTES
is quarantined. A file's own numbers are not believed: offsets of Arrow data are checked before anything follows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
_ARROW_FILE_BEGIN = 8  # the magic, padded; what follows up to the footer is a stream
_ARROW_CONTINUES = b"\xff\xff\xff\xff"


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
    bound = max(limits.max_decompressed_bytes, piece.size)  # text that was not compressed never exceeds it
    total = 0
    for row, found in rows:
        if isinstance(found, Quarantined):
            yield found
            continue
        columns = [_values(column) for column in found.columns]
        total += sum(map(_size, columns))
        if total > bound:
            limit = f"data.max_decompressed_bytes={limits.max_decompressed_bytes}"
            yield maker.quarantined(row, f"more text than {limit}; the rows from here on are not read")
            return
        if not maker.is_text:
            columns = [[_present(value) for value in column] for column in columns]
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


def _size(value: Any) -> int:
    """Bytes of the text in a value: what a dictionary or a view shares in memory stands in every row that has it."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _present(value: Any) -> Any:
    """Without the keys whose value is null: in a table every row has every key."""
    if isinstance(value, Mapping):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


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
    rows = 1
    try:
        # buffered: a column's pages one after the other, instead of the whole column at once
        file = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        metadata = file.metadata
        rows = max(1, metadata.num_rows)
        columns = _check_schema(file.schema_arrow, maker)
    except (DataError, StorageError):
        raise
    except (*_UNREADABLE, _Unreadable) as error:
        if piece.begin == 0:
            yield 0, maker.quarantined(0, _reason("Parquet", error), rows)
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
        yield row, maker.quarantined(row, _reason("Parquet", error), max(1, last - row))
        return
    if row < last:
        yield row, maker.quarantined(row, "the row group ends too early", last - row)


def _bytes(group: Any) -> int:
    """Of a row group's pages when decompressed, as the footer says."""
    return max(0, group.total_byte_size)


# -- Arrow


def _arrow(stream: SourceStream, maker: RecordMaker) -> _Batches:
    row = 0
    try:
        for batch in _record_batches(stream, maker):
            if isinstance(batch, str):
                yield row, maker.quarantined(row, batch)
                continue
            if problem := _damage(batch):
                yield row, maker.quarantined(row, problem, max(1, len(batch)))
            else:
                for begin in range(0, len(batch), _ARROW_ROWS):
                    yield row + begin, batch.slice(begin, _ARROW_ROWS)
            row += len(batch)
    except (DataError, StorageError):
        raise
    except (*_UNREADABLE, _Unreadable) as error:
        yield row, maker.quarantined(row, _reason("Arrow", error))


_RecordBatches = Iterator[pa.RecordBatch | str]
"""Batches, and in place of what cannot be read the reason."""


def _record_batches(stream: SourceStream, maker: RecordMaker) -> _RecordBatches:
    size = stream.seek(0, 2)
    stream.seek(0)
    if stream.read(len(_ARROW_FILE_MAGIC)) != _ARROW_FILE_MAGIC:
        stream.seek(0)
        while stream.tell() < size:
            yield from _stream_batches(stream, maker)
        return
    stream.seek(0)
    try:
        reader = pa.ipc.open_file(stream, options=_wanted(pa.ipc.open_file(stream).schema, maker))
    except (DataError, StorageError):
        raise
    except _UNREADABLE as error:  # without the footer, which says where the batches are, they still follow each other
        stream.seek(_ARROW_FILE_BEGIN)
        yield from _stream_batches(stream, maker)
        raise _Unreadable(f"the file has no footer ({_one_line(error)}): it may have been cut off") from error
    for index in range(reader.num_record_batches):
        try:
            yield reader.get_batch(index)
        except (DataError, StorageError):
            raise
        except _UNREADABLE as error:
            yield f"record batch {index} cannot be read: {_one_line(error)}"


def _stream_batches(stream: SourceStream, maker: RecordMaker) -> _RecordBatches:
    """Of one IPC stream, up to its end mark. Raises _Unreadable if it has none."""
    begin = stream.tell()
    schema = pa.ipc.open_stream(stream).schema
    stream.seek(begin)
    reader = pa.ipc.open_stream(stream, options=_wanted(schema, maker))
    while True:
        at = stream.tell()
        try:
            yield reader.read_next_batch()
        except StopIteration:
            if stream.tell() == at:
                raise _Unreadable("the stream has no end mark: it may have been cut off here") from None
            return
        except (DataError, StorageError):
            raise
        except _UNREADABLE as error:
            after = stream.tell()
            if stream.read(len(_ARROW_CONTINUES)) != _ARROW_CONTINUES:
                raise
            stream.seek(after)
            yield f"the record batch at byte {at} cannot be read: {_one_line(error)}"


def _wanted(schema: pa.Schema, maker: RecordMaker) -> pa.ipc.IpcReadOptions:
    """What nobody wants is not decompressed. Raises _Unreadable if what is wanted is not there."""
    fields = [schema.get_field_index(name) for name in _check_schema(schema, maker)]
    return pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)


def _damage(batch: pa.RecordBatch) -> str | None:
    """Why following the batch's offsets would leave its memory. Text that is not UTF-8 is each row's own matter."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate()
            column.view(_as_bytes(column.type)).validate(full=True)
        except _UNREADABLE as error:
            return f"column {name!r} is damaged: {_one_line(error)}"
    return None


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in place of text."""
    types = pa.types
    if types.is_string(kind):
        return pa.binary()
    if types.is_large_string(kind):
        return pa.large_binary()
    if types.is_string_view(kind):
        return pa.binary_view()
    if types.is_list(kind):
        return pa.list_(_field_as_bytes(kind.value_field))
    if types.is_large_list(kind):
        return pa.large_list(_field_as_bytes(kind.value_field))
    if types.is_struct(kind):
        return pa.struct([_field_as_bytes(field) for field in kind])
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _as_bytes(kind.value_type), kind.ordered)
    return kind


def _field_as_bytes(field: pa.Field) -> pa.Field:
    return field.with_type(_as_bytes(field.type))


def _reason(format: str, error: BaseException) -> str:
    if isinstance(error, _Unreadable):
        return str(error)
    return f"no {format} that can be read: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
