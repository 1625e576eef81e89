"""What a checkpoint needs of the store it is written to.

`Store` of cluster/storage.py and `Artifact`, `Attempt` and `Manifest` of cluster/artifact.py have these shapes; this
floor knows no more of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Protocol, Self


class Entry(Protocol):
    """A stored file: path relative to its attempt, size in bytes, `xxh3_128:<hex>`."""

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def checksum(self) -> str: ...


class Output(Protocol):
    """A file being written; `entry` is set once its `open_output` block has ended."""

    def write(self, data: Any, /) -> int: ...

    @property
    def entry(self) -> Entry: ...


class Files(Protocol):
    """A folder of files. Picklable: it travels from the coordinator to the other ranks."""

    def child(self, *parts: str) -> Self: ...

    def open_input(self, path: str) -> BinaryIO:
        """A seekable file."""
        ...

    def open_output(self, path: str) -> AbstractContextManager[Output]:
        """The file is durable when the block ends, and does not count if it raises."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file below, by path."""
        ...

    def delete(self, prefix: str) -> None: ...


class Manifest(Protocol):
    @property
    def files(self) -> Iterable[Entry]: ...

    @property
    def metadata(self) -> dict[str, Any]: ...


class Attempt(Protocol):
    """One try at an artifact, in a folder of its own."""

    @property
    def store(self) -> Files: ...

    def commit(self, metadata: dict[str, Any], entries: Iterable[Any] | None = None) -> Manifest: ...


class Artifact(Protocol):
    """A folder that counts only once its manifest exists."""

    def manifest(self) -> Manifest | None:
        """None if nothing is committed. Raises OSError if the store fails, or what it holds there is no manifest."""
        ...

    @property
    def files(self) -> Files:
        """The committed attempt's files."""
        ...

    def begin(self) -> Attempt: ...

    def delete(self) -> None: ...
