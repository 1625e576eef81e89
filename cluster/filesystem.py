"""Two file systems behind one small interface: the local disk, and objects through `pyarrow.fs`.

Only `cluster.storage` uses this module. A key is a whole path: absolute on disk, `bucket/prefix/...` for objects.

    interface     what it promises
    is_file       True only for a file or object of exactly this key
    open_input    a seekable binary file
    create        a Sink: its bytes appear under the key at commit(), whole, or never; an exclusive one raises
                  AlreadyExists, at the latest from commit(), if there is a file of this key
    stats         {relative path: FileStat} of every file below a key
    folders       names of the folders right below a key; of a key that is none there are none
    delete        the file and everything below the key; absent is fine
"""

import errno
import io
import os
import shutil
import uuid
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow.fs as pafs

BLOCK_BYTES = 8 * 2**20
"""Unit of remote reads, and of copies."""
HELD_BYTES = 64 * 2**20
"""Up to which a remote write is held back until all of it is there, and sent whole."""

TEMPORARY_PREFIX = ".caravan-tmp-"
"""Files still being written; never listed, and refused as a name in a store."""


class StorageError(OSError):
    """A store could not do what was asked. The message names the URI, the path and the remedy."""


class NotFound(StorageError, FileNotFoundError):
    """The store answered, and there is no such file in it."""


class AlreadyExists(StorageError):
    """An exclusive write found a file in its place, and left that as it is."""


@dataclass(frozen=True)
class FileStat:
    """What a listing tells of a file: bytes, and when it was last written, in nanoseconds since the epoch."""

    size: int
    mtime_ns: int


class Sink(Protocol):
    """Where the bytes of one new file go. Exactly one of commit() and abort() ends it."""

    def write(self, data: memoryview) -> None: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...


class FileSystem(Protocol):
    def is_file(self, key: str) -> bool: ...
    def open_input(self, key: str) -> BinaryIO: ...
    def create(self, key: str, exclusive: bool = False) -> Sink: ...
    def stats(self, key: str) -> dict[str, FileStat]: ...
    def folders(self, key: str) -> list[str]: ...
    def delete(self, key: str) -> None: ...


_DENIED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "Forbidden", "status 403", "status 401")
_UNREACHABLE = (
    "NETWORK_CONNECTION",
    "REQUEST_TIMEOUT",
    "timeout",
    "Couldn't connect",
    "Could not connect",
    "resolve host",
)

# (what the error says, what is wrong, what to do); the first match counts
_REMEDIES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("NO_SUCH_BUCKET", "NoSuchBucket"), "the bucket does not exist", "create it, or correct the URI"),
    (
        _DENIED,
        "access is denied",
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (gs: the application credentials) and the bucket's policy",
    ),
    (
        _UNREACHABLE,
        "the store cannot be reached",
        "check the URI's endpoint_override and scheme, and that the service runs",
    ),
    (
        ("status 400",),
        "the store refused the request",
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the bucket's region",
    ),
    (
        ("status 500", "status 502", "status 503", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE"),
        "the store's service failed",
        "look at its health, then run again",
    ),
)
# where the client knows no keys, and where the URI names no endpoint
_KEYLESS = (
    (*_DENIED, "status 400"),
    "access is denied",
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set: set them, or check the machine's own role",
)
_CLOUD = (
    _UNREACHABLE,
    "the store cannot be reached",
    "check the network; a server of your own needs endpoint_override=host:port in the URI",
)
_ERRNO_REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose another store"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another store"),
    errno.EACCES: ("no permission", "change the folder's permissions, or choose another store"),
    errno.EPERM: ("no permission", "change the folder's permissions, or choose another store"),
    errno.EROFS: ("the disk is read-only", "choose another store"),
    errno.EEXIST: ("the path, or a parent of it, is a file", "choose another store, or move that file away"),
    errno.ENOTDIR: ("a parent of the path is a file", "choose another store, or move that file away"),
    errno.ENOENT: ("no file can be made there", "choose another store"),
    errno.EISDIR: ("the path is a folder", "choose another store, or move that folder away"),
}

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What `link` says on a file system that has none, such as FAT or a mounted bucket."""


def may_have_gone(error: Exception) -> bool:
    """Whether that may be what pyarrow makes of an object which was deleted after it was opened: a missing one, or for
    one that is shorter than the service's answer an internal failure to take that in."""
    text = str(error)
    return "during GetObject" in text and not any(mark.lower() in text.lower() for mark in _UNREACHABLE)


def explain(error: OSError, keyless: bool = False, cloud: bool = False) -> tuple[str, str]:
    """What went wrong and what to do about it, in a few words each.

    `keyless`: nothing gave the client a key. `cloud`: the URI names no endpoint, so that it is the cloud's own.
    """
    known = _ERRNO_REMEDIES.get(error.errno or 0)
    if known is not None:
        return known
    text = str(error)
    special = (*((_KEYLESS,) if keyless else ()), *((_CLOUD,) if cloud else ()))
    for marks, problem, remedy in (*special, *_REMEDIES):
        if any(mark.lower() in text.lower() for mark in marks):
            return problem, remedy
    problem = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    return problem, "check the URI and the store, then run again"


class LocalFiles:
    """Files on disk. A write goes to a temporary file beside its target and is renamed once it is durable."""

    def is_file(self, key: str) -> bool:
        return os.path.isfile(key)

    def open_input(self, key: str) -> BinaryIO:
        return open(key, "rb")

    def create(self, key: str, exclusive: bool = False) -> "LocalSink":
        return LocalSink(Path(key), exclusive)

    def stats(self, key: str) -> dict[str, FileStat]:
        stats = {}
        for folder, _, names in os.walk(key, onerror=_raise_unless_missing):
            for name in names:
                path = os.path.join(folder, name)
                if not name.startswith(TEMPORARY_PREFIX):
                    with suppress(FileNotFoundError):  # deleted while we looked
                        found = os.stat(path)
                        stats[os.path.relpath(path, key)] = FileStat(found.st_size, found.st_mtime_ns)
        return stats

    def folders(self, key: str) -> list[str]:
        try:
            with os.scandir(key) as entries:
                return [entry.name for entry in entries if entry.is_dir()]
        except FileNotFoundError:
            return []

    def delete(self, key: str) -> None:
        try:
            if os.path.isdir(key) and not os.path.islink(key):
                shutil.rmtree(key)
            else:
                os.unlink(key)
        except FileNotFoundError:
            pass


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


class LocalSink:
    def __init__(self, target: Path, exclusive: bool) -> None:
        self._target = target
        self._exclusive = exclusive
        target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        self._file = open(self._temporary, "xb")  # noqa: SIM115  (commit and abort close it)

    def write(self, data: memoryview) -> None:
        self._file.write(data)

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._exclusive:
            self._link()
        else:
            os.replace(self._temporary, self._target)
        # the rename itself must survive a power cut too
        folder = os.open(self._target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _link(self) -> None:
        try:
            os.link(self._temporary, self._target)  # of several writers the system lets exactly one
        except FileExistsError as error:
            raise self._exists() from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if self._target.exists():
                raise self._exists() from error
            os.replace(self._temporary, self._target)
        else:
            os.unlink(self._temporary)

    def _exists(self) -> AlreadyExists:
        return AlreadyExists(f"{self._target}: there is such a file already")

    def abort(self) -> None:
        with suppress(OSError):  # closing flushes, and the disk may be full
            self._file.close()
        with suppress(FileNotFoundError):
            self._temporary.unlink()


class ObjectFiles:
    """Objects through a `pyarrow.fs.FileSystem`."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def is_file(self, key: str) -> bool:
        return self._filesystem.get_file_info(key).type == pafs.FileType.File

    def has_bucket(self, bucket: str) -> bool:
        return self._filesystem.get_file_info(bucket).type != pafs.FileType.NotFound

    def open_input(self, key: str) -> BinaryIO:
        return io.BufferedReader(BlockCachedFile(self._filesystem.open_input_file(key)), buffer_size=64 * 2**10)

    def create(self, key: str, exclusive: bool = False) -> "ObjectSink":
        if exclusive and self.is_file(key):  # pyarrow offers no conditional put: a rival may still come in between
            raise AlreadyExists(f"{key}: there is such an object already")
        return ObjectSink(self._filesystem, key, exclusive)

    def stats(self, key: str) -> dict[str, FileStat]:
        selector = pafs.FileSelector(key, recursive=True, allow_not_found=True)
        infos = self._filesystem.get_file_info(selector)
        files = (info for info in infos if info.type == pafs.FileType.File)
        return {info.path[len(key) + 1 :]: FileStat(info.size, info.mtime_ns or 0) for info in files}

    def folders(self, key: str) -> list[str]:
        selector = pafs.FileSelector(key, recursive=False, allow_not_found=True)
        infos = self._filesystem.get_file_info(selector)
        return [info.base_name for info in infos if info.type == pafs.FileType.Directory]

    def delete(self, key: str) -> None:
        # an object and a "folder" of the same name may both exist
        if self.is_file(key):
            self._filesystem.delete_file(key)
        with suppress(FileNotFoundError):
            self._filesystem.delete_dir(key)


class ObjectSink:
    """Writes one object.

    pyarrow's output streams have no abort: closing one, even by garbage collection after an exception, publishes what
    was written so far. So a write is held back until commit() and sent whole, up to HELD_BYTES; a failed longer one is
    deleted again, and in between a reader could see a truncated object, which is why only a manifest makes an object
    count. What was sent whole is never deleted: under its name there may be an older object, or a rival's.

    An exclusive write is held back whatever its size.
    """

    def __init__(self, filesystem: Any, key: str, exclusive: bool = False) -> None:
        self._filesystem = filesystem
        self._key = key
        self._exclusive = exclusive
        self._head = bytearray()
        self._stream: Any = None
        self._whole = False

    def write(self, data: memoryview) -> None:
        if self._stream is not None:
            self._stream.write(data)
            return
        self._head += data
        if len(self._head) > HELD_BYTES and not self._exclusive:
            self._open()

    def _open(self) -> None:
        # by default pyarrow would compress what goes into a name such as x.gz, once more if it is gzip already
        self._stream = self._filesystem.open_output_stream(self._key, compression=None)
        self._stream.write(self._head)
        self._head = bytearray()

    def commit(self) -> None:
        if self._stream is None:
            self._whole = True
            self._open()
        self._stream.close()

    def abort(self) -> None:
        if self._stream is None:
            return
        # the store may be what failed; then the truncated object stays, uncommitted
        with suppress(OSError):
            self._stream.close()
        if not self._whole:
            with suppress(OSError):
                self._filesystem.delete_file(self._key)


class BlockCachedFile(io.RawIOBase):
    """A remote file read in blocks of 8 MiB, the last few of which are kept.

    Formats that hop about in a file (zip archives, `torch.load`) issue thousands of tiny reads, each of which would be
    a request. `readinto` fills its buffer unless the file ends, as `torch.load` expects.
    """

    def __init__(self, source: Any, block_bytes: int = BLOCK_BYTES, num_blocks: int = 4) -> None:
        super().__init__()
        self._source = source
        self._size: int = source.size()
        self._position = 0
        self._block_bytes = block_bytes
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"offset={offset} lies before the start of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._position))
        filled = 0
        while filled < wanted:
            data = self._read_at(self._position, wanted - filled)
            view[filled : filled + len(data)] = data
            filled += len(data)
            self._position += len(data)
        return filled

    def readall(self) -> bytes:
        data = bytearray(max(0, self._size - self._position))
        self.readinto(data)
        return bytes(data)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
            self._blocks.clear()
        super().close()

    def _read_at(self, position: int, wanted: int) -> memoryview:
        """Between 1 and `wanted` bytes at `position`."""
        index, start = divmod(position, self._block_bytes)
        block = self._blocks.get(index)
        if block is None:
            if start == 0 and wanted >= self._block_bytes:
                # a long sequential read gains nothing from the cache: one request for all of its whole blocks
                return self._fetch(position, wanted - wanted % self._block_bytes)
            block = bytes(self._fetch(index * self._block_bytes, self._block_bytes))
            self._blocks[index] = block
            if len(self._blocks) > self._num_blocks:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(index)
        return memoryview(block)[start : start + wanted]

    def _fetch(self, position: int, wanted: int) -> memoryview:
        expected = min(wanted, self._size - position)
        data = self._source.read_at(expected, position)
        if len(data) != expected:
            raise OSError(
                f"asked for {expected} bytes at {position}, got {len(data)}: the file changed under the reader"
            )
        return memoryview(data)
