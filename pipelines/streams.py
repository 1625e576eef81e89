"""The bytes of a source's file, as they lie there or decompressed, in bounded memory.

What is wrong with a file itself is Damaged: what was read before it counts. A store that fails is a StorageError, and
a file that is not the one that was listed a DataError; both stop the reading, for another try may read everything.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from cluster.storage import NotFound, StorageError
from pipelines.file_types import Codec
from pipelines.sources import DataError, Source, SourceFile

MAX_BLOCK_BYTES = 1 << 30
"""No file format may ask for more at once."""

_READ_BYTES = 1 << 16
_ZSTD_READ_BYTES = 512
"""A block of zstd is at least 4 bytes and at most 128 KiB of text, so that this is at most 16 MiB of it."""
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"


class Damaged(ValueError):
    """A file cannot be read, or no further than it was."""


class SourceStream:
    """A source's file, open for reading; of it only the bytes that were listed.

    Raises Damaged if nobody may read it, DataError if it is not the file that was listed (machines see different files
    under one path, or it was written to), StorageError if the store fails.
    """

    closed = False

    def __init__(self, source: Source, file: SourceFile) -> None:
        self._name = source.name(file.path)
        self._size = file.size
        self._position = 0
        try:
            self._stream: BinaryIO = source.store().open_input(file.path)
        except NotFound as error:
            raise DataError(
                f"{self._name} is not there on {platform.node()}, but was when it was listed; put the source on "
                "storage that every machine sees, and leave it as it is while it is read"
            ) from error
        except StorageError as error:
            if isinstance(error.__cause__, PermissionError):
                raise Damaged("no permission to read it") from error
            raise
        try:
            size = self._stream.seek(0, 2)
            self._stream.seek(0)
        except OSError as error:
            self.close()
            raise self._failed(error) from error
        if size != self._size:
            self.close()
            raise DataError(
                f"{self._name} has {size} bytes on {platform.node()}, {self._size} where it was listed; put the source "
                "on storage that every machine sees, and run the same Python everywhere"
            )

    def read(self, size: int = -1) -> bytes:
        """As many bytes as asked for, unless the file ends."""
        left = self._size - self._position
        size = left if size < 0 else min(size, left)
        if size > MAX_BLOCK_BYTES:
            raise Damaged(f"a block of {size} bytes, above {MAX_BLOCK_BYTES}; write the file in smaller batches")
        try:
            data = self._stream.read(size)
        except OSError as error:
            raise self._failed(error) from error
        if len(data) < size:
            raise DataError(
                f"{self._name} ends after {self._position + len(data)} of {self._size} bytes: it was written to while "
                "it was read; leave it as it is, and run again"
            )
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._size)[whence]
        try:
            self._position = self._stream.seek(base + offset)
        except OSError as error:
            raise self._failed(error) from error
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._stream.close()

    def _failed(self, error: OSError) -> StorageError:
        if isinstance(error, StorageError):
            return error
        return StorageError(
            f"{self._name}: cannot read it at byte {self._position}: {error}; look at the store, then run again"
        )


class Decompressed:
    """The text of a compressed file, up to `max_bytes` of it."""

    def __init__(self, stream: SourceStream, codec: Codec, max_bytes: int) -> None:
        self._blocks = (_gunzip if codec == "gzip" else _unzstd)(stream)
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._held = b""
        self._damage: Damaged | None = None

    def read(self, size: int) -> bytes:
        """As many bytes as asked for, unless the text ends. Raises Damaged where it cannot be read on, but not before
        all of the text up to there was returned."""
        blocks = [self._held]
        length = len(self._held)
        while length < size and self._damage is None:
            block = self._next()
            if not block:
                break
            blocks.append(block)
            length += len(block)
        data = b"".join(blocks)
        data, self._held = data[:size], data[size:]
        if size and not data and self._damage is not None:
            raise self._damage
        return data

    def _next(self) -> bytes:
        try:
            block = next(self._blocks, b"")
        except Damaged as damage:
            self._damage = damage
            return b""
        if len(block) > self._left:
            self._damage = Damaged(f"more text than data.max_decompressed_bytes={self._max_bytes}")
            block = block[: self._left]
        self._left -= len(block)
        return block


def _gunzip(stream: SourceStream) -> Iterator[bytes]:
    """The text of one or more gzip members (RFC 1952), which zeros may follow."""
    decoder, inside, data, total = zlib.decompressobj(31), False, b"", 0
    while True:
        if not inside:
            if total:
                data = data.lstrip(b"\0")
            while len(data) < len(_GZIP_MAGIC) and (more := stream.read(_READ_BYTES)):
                data = (data + more).lstrip(b"\0") if total else data + more
            if not data and total:
                return
            if not data.startswith(_GZIP_MAGIC):
                raise Damaged(f"what follows the gzip data is none ({total} bytes)" if total else "no gzip data")
            inside = True
        elif not data:
            data = stream.read(_READ_BYTES)
        at_end = not data
        try:
            text = decoder.decompress(data, _READ_BYTES)
        except zlib.error as error:
            raise Damaged(f"damaged gzip data near byte {stream.tell()}: {error}") from error
        if text:
            yield text
        data = decoder.unconsumed_tail
        if decoder.eof:
            data, inside, total = decoder.unused_data, False, stream.tell() - len(decoder.unused_data)
            decoder = zlib.decompressobj(31)
        elif at_end and not text:
            raise Damaged(f"the gzip data end too early, at byte {stream.tell()}")


def _unzstd(stream: SourceStream) -> Iterator[bytes]:
    """The text of one or more zstd frames (RFC 8878)."""
    decoder, inside, data, at = _zstd_decoder(), False, b"", 0
    while True:
        if len(data) - at < _ZSTD_READ_BYTES:
            data, at = data[at:] + stream.read(_READ_BYTES), 0
        if at == len(data):
            if inside:
                raise Damaged(f"the zstd data end too early, at byte {stream.tell()}")
            return
        where = stream.tell() - len(data) + at
        if not inside and not (data.startswith(_ZSTD_MAGIC, at) or data.startswith(_ZSTD_SKIPPABLE, at + 1)):
            raise Damaged(f"what follows the zstd data at byte {where} is none" if where else "no zstd data")
        step = data[at : at + _ZSTD_READ_BYTES]
        try:
            text = decoder.decompress(step)
        except zstandard.ZstdError as error:
            if "too much memory" in str(error):
                raise Damaged("a zstd window above 128 MiB; compress it without --long, or with --long=27") from error
            raise Damaged(f"damaged zstd data near byte {where}: {error}") from error
        if text:
            yield text
        at += len(step)
        inside = not decoder.eof
        if decoder.eof:
            at -= len(decoder.unused_data)
            decoder = _zstd_decoder()


def _zstd_decoder() -> zstandard.ZstdDecompressionObj:
    return zstandard.ZstdDecompressor().decompressobj(write_size=_READ_BYTES)
