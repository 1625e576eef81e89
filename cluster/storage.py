"""Where bytes live: stores named by a URI. What counts of the files in them is said by cluster/artifact.py.

Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or the cloud's own chain). A store's
`uri`, `str`, `repr` and errors never show a secret, not even one that was written into the URI.
"""

import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from cluster.filesystem import (
    BLOCK_BYTES,
    FileStat,
    FileSystem,
    NotFound,
    ObjectFiles,
    Sink,
    StorageError,
    explain,
    may_have_gone,
)
from cluster.location import Location, LocationError, checked, has_credentials

__all__ = [
    "JSON",
    "FileEntry",
    "FileStat",
    "LocationError",
    "NotFound",
    "OutputFile",
    "StorageError",
    "Store",
    "has_credentials",
]

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


@dataclass(frozen=True)
class FileEntry:
    """One file: its path relative to the store, bytes, and `xxh3_128:<hex>`."""

    path: str
    size: int
    checksum: str


class OutputFile(io.RawIOBase):
    """A file being written; counts and checksums what goes through it. `entry` is set once it is committed."""

    entry: FileEntry

    def __init__(self, store: "Store", path: str, exclusive: bool = False) -> None:
        super().__init__()
        self._store = store
        self._path = path
        self._hash = xxhash.xxh3_128()
        self._size = 0
        with store._guard("write", path):
            self._sink: Sink = store._files.create(store._location.key(path), exclusive)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError(f"{self._path} is closed")
        view = memoryview(data).cast("B")
        with self._store._guard("write", self._path):
            self._sink.write(view)
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    def commit(self) -> None:
        """Make the file visible, whole. Raises StorageError, and then nothing counts."""
        with self._store._guard("write", self._path):
            self._sink.commit()
        self.entry = FileEntry(self._path, self._size, f"xxh3_128:{self._hash.hexdigest()}")

    def abort(self) -> None:
        self._sink.abort()


class Store:
    """A folder somewhere: `file:///dir` or a bare path, `s3://bucket/prefix?endpoint_override=host:port&scheme=http`,
    `gs://bucket/prefix`.

    Options of s3: endpoint_override, region, scheme; of gs: endpoint_override, scheme. Every path argument is relative
    to the store, parts separated by `/`. Every method raises StorageError (NotFound for an absent file) when the store
    does not do what was asked, and LocationError for a bad URI or a path that leaves the store. Picklable.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._location = Location.parse(os.fspath(uri))
        self._filesystem: FileSystem | None = None

    # -- identity

    @property
    def uri(self) -> str:
        """The URI, with `***` where it held credentials."""
        return self._location.uri()

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self._location == other._location

    def __hash__(self) -> int:
        return hash(self._location)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self._location.uri(secrets=True),)

    def child(self, *parts: str) -> "Store":
        """The store at `parts` below this one."""
        child = Store.__new__(Store)
        child._location = self._location.child("/".join(parts))
        child._filesystem = self._filesystem
        return child

    def local_path(self, path: str = "") -> Path | None:
        """Where `path` lies on this machine's disk; None for a remote store."""
        return Path(self._location.key(path)) if self._location.kind == "file" else None

    # -- whole files

    def exists(self, path: str) -> bool:
        """True if there is a file (not merely a folder) at `path`. A bucket that does not exist has no files."""
        with self._guard("look up", path):
            return self._files.is_file(self._location.key(path))

    def read_bytes(self, path: str) -> bytes:
        with self.open_input(path) as file, self._guard("read", path):
            return file.read()

    def write_bytes(self, path: str, data: bytes, *, exclusive: bool = False) -> FileEntry:
        """Write a file that is afterwards whole, or as it was before; `exclusive` as for `open_output`."""
        with self.open_output(path, exclusive=exclusive) as output:
            output.write(data)
        return output.entry

    def read_json(self, path: str) -> Any:
        """Raises ValueError if the file is not JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise ValueError(f"{self.uri}: {path} is not valid JSON: {error}") from error

    def write_json(self, path: str, value: Any, *, exclusive: bool = False) -> FileEntry:
        """`write_bytes` of `value`. Raises ValueError for a NaN or an infinity, which JSON has not."""
        try:
            text = json.dumps(value, indent=2, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{self.uri}: {path} cannot be JSON: {error}; write null, or a string") from error
        return self.write_bytes(path, f"{text}\n".encode(), exclusive=exclusive)

    # -- streams

    def open_input(self, path: str) -> BinaryIO:
        """A seekable binary file, to be closed by the caller; remote ones are read in cached blocks of 8 MiB."""
        with self._guard("read", path):
            return self._files.open_input(self._location.key(path))

    @contextmanager
    def open_output(self, path: str, *, exclusive: bool = False) -> Iterator[OutputFile]:
        """A binary writer for a new or replaced file, with `.entry` (size and checksum) after the block.

        The file counts when the block ends. If the block raises, nothing is visible on disk; on an object store a
        write of more than 64 MiB may have replaced an older object of the same name, and is deleted.

        `exclusive`: raises AlreadyExists if there is such a file; on a disk with hard links exactly one of several
        writers succeeds, elsewhere the store is only asked before the write.
        """
        output = OutputFile(self, checked(path), exclusive)
        try:
            yield output
            output.commit()
        except BaseException:
            output.abort()
            raise
        finally:
            output.close()

    def upload(self, local_path: str | os.PathLike[str], path: str) -> FileEntry:
        with open(local_path, "rb") as source, self.open_output(path) as output:
            shutil.copyfileobj(source, output, BLOCK_BYTES)
        return output.entry

    def download(self, path: str, local_path: str | os.PathLike[str]) -> FileEntry:
        """Copy a file to this machine's disk, whole or not at all; returns what was copied."""
        target = Path(local_path).absolute()
        return replace(self.copy(path, Store(target.parent), target.name), path=path)

    def copy(self, path: str, target: "Store", target_path: str) -> FileEntry:
        """Copy a file to another store, whole or not at all; returns what was copied."""
        with self.open_input(path) as source, target.open_output(target_path) as output:
            for block in self._blocks(source, path):
                output.write(block)
        return output.entry

    # -- folders

    def list(self, prefix: str = "") -> list[str]:
        """Every file below the folder `prefix`, recursively, sorted, as paths relative to this store.

        A folder that does not exist is empty."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """`list`, with each file's size in bytes."""
        return {path: stat.size for path, stat in self.stats(prefix).items()}

    def stats(self, prefix: str = "") -> dict[str, FileStat]:
        """`list`, with each file's size and time: a file that was replaced by one of its size shows by its time.

        On disk times have the file system's resolution, on most object stores milliseconds or seconds.
        """
        with self._guard("list", prefix):
            found = self._files.stats(self._location.key(prefix))
        return {f"{prefix}/{path}" if prefix else path: stat for path, stat in found.items()}

    def folders(self, prefix: str = "") -> tuple[str, ...]:
        """Names of the folders right below the folder `prefix`, sorted; what lies in them is not looked at."""
        with self._guard("list", prefix):
            return tuple(sorted(self._files.folders(self._location.key(prefix))))

    def delete(self, prefix: str) -> None:
        """Remove the file `prefix`, or the folder and all below it. Absent is fine."""
        with self._guard("delete", prefix):
            self._files.delete(self._location.key(checked(prefix)))

    def entry(self, path: str) -> FileEntry:
        """Size and checksum of a stored file, by reading it."""
        checksum, size = xxhash.xxh3_128(), 0
        with self.open_input(path) as source:
            for block in self._blocks(source, path):
                checksum.update(block)
                size += len(block)
        return FileEntry(path, size, f"xxh3_128:{checksum.hexdigest()}")

    def size(self, path: str) -> int | None:
        """A file's size, None if there is none. Asks for the file itself: a store's listing may lag behind."""
        try:
            with self.open_input(path) as file:
                return file.seek(0, os.SEEK_END)
        except NotFound:
            return None

    def lacks_bucket(self) -> bool:
        """True if there is not even the bucket that the URI names."""
        with self._guard("look at", ""):
            return isinstance(self._files, ObjectFiles) and not self._files.has_bucket(self._location.bucket)

    def check_writable(self) -> None:
        """Raises StorageError unless a file can be written, read and deleted here now. For a check before long work."""
        probe = f"check-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"caravan")
        self.read_bytes(probe)
        self.delete(probe)

    # -- inside

    @property
    def _files(self) -> FileSystem:
        if self._filesystem is None:
            self._filesystem = self._location.connect()
        return self._filesystem

    def _blocks(self, source: BinaryIO, path: str) -> Iterator[bytes]:
        while True:
            with self._guard("read", path):
                block = source.read(BLOCK_BYTES)
            if not block:
                return
            yield block

    @contextmanager
    def _guard(self, action: str, path: str) -> Iterator[None]:
        """Turn whatever the file system raises into a StorageError that says where, what and what to do."""
        shown = self._location.shown()
        where = f"{shown}: cannot {action} {path!r}" if path else f"{shown}: cannot {action} it"
        try:
            yield
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            if (isinstance(error, FileNotFoundError) and action != "write") or self._has_gone(path, error):
                raise NotFound(f"{where}: there is no such file") from error
            known = error if isinstance(error, OSError) else OSError(str(error))
            problem, remedy = explain(known, self._location.keyless, self._location.cloud)
            if self._location.password:
                problem = problem.replace(self._location.password, "***")
            raise StorageError(f"{where}: {problem}; {remedy}") from error

    def _has_gone(self, path: str, error: Exception) -> bool:
        if may_have_gone(error):
            with suppress(OSError, pa.ArrowException):
                return not self._files.is_file(self._location.key(path))
        return False
