"""Artifacts: folders of a store that count only once their manifest is written.

    {store}/manifest.json                   written last; names the winning attempt, every file's size and checksum
    {store}/attempts/{attempt}/...          one folder for every try
    {store}/parts/...                       what unfinished tries have finished so far; see cluster/parts.py

Rival writers (a zombie, a retried stage, two drivers) each write below their own attempt, so they can waste work and
never mix files. Existence of a file proves nothing; only the manifest does.
"""

import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster.filesystem import AlreadyExists
from cluster.location import checked
from cluster.node_copy import copied_once
from cluster.storage import JSON, FileEntry, NotFound, StorageError, Store

_MANIFEST = "manifest.json"


class CorruptArtifact(StorageError):
    """An artifact's files are not what its manifest says."""


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
