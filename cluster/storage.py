"""Where bytes live: stores named by a URI, and artifacts that count only once their manifest is written.

    {store}/manifest.json                   written last; names the winning attempt, every file's size and checksum
    {store}/attempts/{attempt}/...          one folder for every try
    {store}/parts/...                       what unfinished tries have finished so far; see cluster/parts.py

Rival writers (a zombie, a retried stage, two drivers) each write below their own attempt, so they can waste work and
never mix files. Existence of a file proves nothing; only the manifest does.

Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or the cloud's own chain). A store's
`uri`, `str`, `repr` and errors never show a secret, not even one that was written into the URI.
"""

import io
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from cluster.filesystem import (
    BLOCK_BYTES,
    AlreadyExists,
    FileStat,
    FileSystem,
    NotFound,
    ObjectFiles,
    Sink,
    StorageError,
    explain,
)
from cluster.location import Location, LocationError, checked, has_credentials
from cluster.node_copy import copied_once

__all__ = [
    "JSON",
    "Artifact",
    "Attempt",
    "CorruptArtifact",
    "FileEntry",
    "FileStat",
    "LocationError",
    "Manifest",
    "NotFound",
    "OutputFile",
    "StorageError",
    "Store",
    "has_credentials",
]

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its path relative to the attempt, bytes, and `xxh3_128:<hex>`."""

    path: str
    size: int
    checksum: str


class CorruptArtifact(StorageError):
    """An artifact's files are not what its manifest says."""


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
            if isinstance(error, FileNotFoundError) and action != "write":
                raise NotFound(f"{where}: there is no such file") from error
            known = error if isinstance(error, OSError) else OSError(str(error))
            problem, remedy = explain(known, self._location.keyless, self._location.cloud)
            if self._location.password:
                problem = problem.replace(self._location.password, "***")
            raise StorageError(f"{where}: {problem}; {remedy}") from error


@dataclass(frozen=True)
class Manifest:
    """What an artifact consists of. `metadata` is the writer's own; `created` is UTC, ISO 8601."""

    attempt: str
    files: tuple[FileEntry, ...]
    metadata: dict[str, JSON]
    created: str

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """Raises ValueError, TypeError or KeyError for anything but a manifest, paths that leave it included."""
        files = tuple(FileEntry(checked(at["path"]), int(at["size"]), str(at["checksum"])) for at in value["files"])
        if not isinstance(value["metadata"], dict):
            raise TypeError("metadata is not an object")
        if "/" in checked(value["attempt"]):
            raise ValueError(f"attempt {value['attempt']!r} is not a plain name")
        return cls(value["attempt"], files, value["metadata"], str(value["created"]))


class Artifact:
    """A folder in a store that counts only once its manifest exists. Methods raise StorageError."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __repr__(self) -> str:
        return f"Artifact({self.store.uri!r})"

    def manifest(self) -> Manifest | None:
        """What was committed, or None. Raises CorruptArtifact if the manifest is not one."""
        try:
            return Manifest.from_json(json.loads(self.store.read_bytes(_MANIFEST)))
        except NotFound:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptArtifact(
                f"{self.store.uri}: {_MANIFEST} is no manifest ({type(error).__name__}: {error}); delete the artifact"
            ) from error

    @property
    def committed(self) -> bool:
        """Asks the store each time."""
        return self.manifest() is not None

    @property
    def files(self) -> Store:
        """The winning attempt's files. Raises NotFound if nothing is committed."""
        return self.attempt_store(self._require().attempt)

    def begin(self) -> "Attempt":
        """A new try, in a folder of its own that no other try shares."""
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}"
        return Attempt(self, name, self.attempt_store(name))

    def verify(self) -> Manifest:
        """Read every file against the manifest. Raises CorruptArtifact naming the first file that differs."""
        manifest = self._require()
        files = self.attempt_store(manifest.attempt)
        self._check_sizes(manifest, files.sizes())
        for expected in manifest.files:
            self._check_entry(expected, files.entry(expected.path))
        return manifest

    def fetch(self, local_dir: str | os.PathLike[str]) -> Path:
        """A folder on this machine's disk with the committed files.

        For a file:// store that is the artifact's own folder, its sizes checked. Remote files are copied once to
        `local_dir/{attempt}`, each verified by its checksum (cluster/node_copy.py). Raises CorruptArtifact.
        """
        manifest = self._require()
        files = self.attempt_store(manifest.attempt)
        own = files.local_path()
        if own is not None:
            self._check_sizes(manifest, files.sizes())
            return own

        def is_whole(copy: Path) -> bool:
            sizes = Store(copy).sizes()
            return all(sizes.get(file.path) == file.size for file in manifest.files)

        def fill(folder: Path) -> None:
            for expected in manifest.files:
                self.copy_file(manifest, expected, folder / expected.path)

        return copied_once(Path(local_dir).absolute() / manifest.attempt, is_whole, fill)

    def check_sizes(self) -> Manifest:
        """One listing against the manifest. Raises CorruptArtifact naming a file that is missing or not of its size."""
        manifest = self._require()
        self._check_sizes(manifest, self.attempt_store(manifest.attempt).sizes())
        return manifest

    def copy_file(self, manifest: Manifest, expected: FileEntry, local_path: str | os.PathLike[str]) -> None:
        """Copy one of the manifest's files to this machine's disk.

        Raises CorruptArtifact if it is missing, or what was copied is not what the manifest says.
        """
        try:
            found = self.attempt_store(manifest.attempt).download(expected.path, local_path)
        except NotFound as error:
            raise self._corrupt(expected.path, f"is missing, the manifest says {expected.size} bytes") from error
        self._check_entry(expected, found)

    def delete(self) -> None:
        """Remove the artifact. The manifest goes first, so that a delete cut short leaves nothing that counts."""
        self.store.delete(_MANIFEST)
        self.store.delete("parts")
        self.store.delete("attempts")

    def attempt_store(self, name: str) -> Store:
        """Where the try `name` writes."""
        return self.store.child("attempts", name)

    def _require(self) -> Manifest:
        manifest = self.manifest()
        if manifest is None:
            raise NotFound(f"{self.store.uri}: nothing is committed here; run the stage that writes it")
        return manifest

    def _check_sizes(self, manifest: Manifest, sizes: dict[str, int]) -> None:
        for file in manifest.files:
            if sizes.get(file.path) == file.size:
                continue
            size = self.attempt_store(manifest.attempt).size(file.path)
            if size != file.size:
                found = "is missing" if size is None else f"has {size} bytes"
                raise self._corrupt(file.path, f"{found}, the manifest says {file.size} bytes")

    def _check_entry(self, expected: FileEntry, found: FileEntry) -> None:
        if found != expected:
            raise self._corrupt(
                expected.path,
                f"is {found.size} bytes, {found.checksum}, the manifest says {expected.size}, {expected.checksum}",
            )

    def _corrupt(self, path: str, problem: str) -> CorruptArtifact:
        return CorruptArtifact(f"{self.store.uri}: {path} {problem}; delete the artifact and run its stage again")


@dataclass(frozen=True)
class Attempt:
    """One try at writing an artifact. Nothing that it writes counts before `commit`."""

    artifact: Artifact
    name: str
    store: Store

    def commit(self, metadata: dict[str, JSON], entries: Iterable[FileEntry] | None = None) -> Manifest:
        """Make this try the artifact, unless another was faster; returns the manifest that won.

        `entries` are the files that count, by paths relative to `self.store`; without them everything that lies there
        is read and checksummed. Raises ValueError if an entry names no stored file of its size, or one path twice.

        On disk the manifest is linked into place, so exactly one of several tries wins and all are told which. An
        object store (or a disk without hard links) is asked first and written to then: two tries may both find no
        manifest, and the later manifest replaces the earlier. A reader still sees one whole try, never a mixture: a
        manifest is one object and names durable files of its own attempt's folder only, and the loser's files stay for
        those who read the earlier one. Both are tries at the same content key, so either is as good.
        """
        stored = self.store.sizes()  # before the question: a rival that has committed may remove what lies here
        earlier = self.artifact.manifest()
        if earlier is not None:
            return earlier
        if entries is None:
            entries = [self.store.entry(path) for path in sorted(stored)]
        files = tuple(sorted(entries, key=lambda entry: entry.path))
        for earlier_file, file in pairwise(files):
            if earlier_file.path == file.path:
                raise ValueError(f"{self.store.uri}: {file.path} is entered twice; enter every file once")
        for entry in files:
            if stored.get(entry.path) != entry.size and (found := self.store.size(entry.path)) != entry.size:
                raise ValueError(
                    f"{self.store.uri}: entry {entry.path} of {entry.size} bytes is not stored (found: {found}); "
                    f"enter what open_output or upload of this attempt's store returned"
                )
        manifest = Manifest(self.name, files, metadata, datetime.now(UTC).isoformat(timespec="seconds"))
        try:
            self.artifact.store.write_json(_MANIFEST, asdict(manifest), exclusive=True)
        except AlreadyExists:
            return self.artifact._require()
        return self.artifact.manifest() or manifest
