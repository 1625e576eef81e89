"""Copies of a remote artifact's files on this machine's disk, bounded, shared by all processes of a node.

    {folder}/{attempt}/train/shard-00000.arrow            a whole copy, verified by its checksum
    {folder}/{attempt}/train/shard-00000.arrow.partial/   room taken for one that is on its way
    {folder}/{attempt}/locks/train/shard-00000.arrow      who copies, opens or removes it holds this lock
    {folder}/{attempt}/locks/room                         who looks for room holds this one

The locks are the kernel's and end with their holder, however that ends. A copy counts once it is renamed into place,
and a partial one whose lock is free is rubbish. Where room is short, what was opened longest ago goes. A file that is
removed while a process has it mapped stays readable there, and its blocks are freed when the last map goes.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from pathlib import Path

from cluster.artifact import Artifact, Manifest
from cluster.storage import StorageError
from pipelines.prefetch import JOIN_SECONDS, start_thread

_PARTIAL = ".partial"
_ROOM = "room"
_POLL_SECONDS = 0.05


class ShardCache:
    """The copies of one artifact's files.

    Args:
        artifact: where the files come from; `manifest` is its own.
        folder: on this machine's disk; processes that share it share the copies.
        limit: bytes that the copies may take, those on their way included; at least one file is kept, whatever its
            size. None is without a bound.
    """

    def __init__(self, artifact: Artifact, manifest: Manifest, folder: str | Path, limit: int | None = None) -> None:
        self._artifact, self._manifest = artifact, manifest
        self._folder = Path(folder).absolute() / manifest.attempt
        self._entries = {entry.path: entry for entry in manifest.files}
        self._limit = limit if limit is None else max([limit, *(entry.size for entry in manifest.files)])

    @contextmanager
    def held(self, path: str) -> Iterator[Path]:
        """A file's copy, which nobody removes while the block runs; it is fetched if it is not there.

        Raises CorruptArtifact naming a file that is missing or not what the manifest says, StorageError if the store
        fails.
        """
        with self._locked(path):
            self._fetch(path)
            yield self._folder / path

    def fetch_unless_locked(self, path: str) -> None:
        """See that there is a copy, unless another process or thread is at it."""
        with self._locked(path, wait=False) as mine:
            if mine:
                self._fetch(path)

    def _fetch(self, path: str) -> None:
        """With the file's lock held."""
        expected, copy = self._entries[path], self._folder / path
        partial = copy.with_name(copy.name + _PARTIAL)
        if copy.is_file() and copy.stat().st_size == expected.size:
            os.utime(copy)
            return
        shutil.rmtree(partial, ignore_errors=True)
        copy.unlink(missing_ok=True)
        try:
            self._take_room(partial, expected.size)
            self._artifact.copy_file(self._manifest, expected, partial / copy.name)
            with self._locked(_ROOM):  # or it might be counted nowhere
                (partial / copy.name).rename(copy)
                partial.rmdir()
        except OSError as error:
            cause = error.__cause__ if isinstance(error, StorageError) else error
            if not isinstance(cause, OSError) or cause.errno != ENOSPC:
                raise
            raise StorageError(
                f"{self._folder}: the disk is full, it has no room for a copy of {path} of {expected.size} bytes; free "
                "some space, or bound the copies with train.cache_bytes and train.shuffle_shards"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _take_room(self, partial: Path, size: int) -> None:
        """Waits until other processes' downloads, which always end, can make room."""
        while True:
            with self._locked(_ROOM):
                if self._evict(size):
                    partial.mkdir(parents=True)
                    return
            time.sleep(_POLL_SECONDS)

    def _evict(self, size: int) -> bool:
        """Whether so many bytes are free, after removing no more than it takes."""
        if self._limit is None:
            return True
        opened = self._opened()
        used = sum(self._entries[path].size for path in opened)
        for path in sorted(opened, key=lambda path: (opened[path], path)):
            if used + size <= self._limit:
                break
            with self._locked(path, wait=False) as mine:
                if mine:
                    copy = self._folder / path
                    copy.unlink(missing_ok=True)
                    shutil.rmtree(copy.with_name(copy.name + _PARTIAL), ignore_errors=True)
                    used -= self._entries[path].size
        return used + size <= self._limit

    def _opened(self) -> dict[str, int]:
        """When each file that is here or on its way was opened last, in nanoseconds since the epoch."""
        opened = {}
        for folder in {os.path.dirname(path) for path in self._entries}:
            with suppress(FileNotFoundError):
                for item in list(os.scandir(self._folder / folder)):
                    path = os.path.join(folder, item.name.removesuffix(_PARTIAL))
                    if path in self._entries:
                        with suppress(FileNotFoundError):
                            opened[path] = item.stat().st_mtime_ns
        return opened

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Whether the lock is ours while the block runs."""
        path = self._folder / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as lock:
            try:
                flock(lock, LOCK_EX if wait else LOCK_EX | LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                try:
                    yield True
                finally:
                    flock(lock, LOCK_UN)  # a process that was forked meanwhile has the file open too


class ReadAhead:
    """Fetches files into a cache in a background thread, which ends with `close` and when this object is collected."""

    def __init__(self, cache: ShardCache) -> None:
        self._wanted = _Wanted()
        weakref.finalize(self, self._wanted.stop)
        arguments = cache, self._wanted
        self._thread = start_thread("read-ahead", _fetch_wanted, arguments, self._wanted.stop)

    def want(self, paths: Iterable[str]) -> None:
        """Fetch these, in order, in place of what was wanted before; `check` raises no more of that."""
        self._wanted.replace(paths)

    def check(self) -> None:
        """Raises, once, what a fetch of what is wanted has raised."""
        self._wanted.raise_error()

    def close(self) -> None:
        self._wanted.stop()
        self._thread.join(JOIN_SECONDS)


class _Wanted:
    """What the thread and its owner share."""

    def __init__(self) -> None:
        self._paths: deque[str] = deque()
        self._error: BaseException | None = None
        self._replaced = False
        self._stopped = False
        self._changed = threading.Condition()

    def replace(self, paths: Iterable[str]) -> None:
        with self._changed:
            self._paths = deque(paths)
            self._error, self._replaced = None, True
            self._changed.notify_all()

    def next(self) -> str | None:
        """Waits for a path; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._paths)
            self._replaced = False
            return None if self._stopped else self._paths.popleft()

    def fail(self, error: BaseException) -> None:
        """The path that `next` gave last could not be fetched. If it is still wanted after a replacement, it is fetched
        again: the error may be of a file that has been repaired."""
        with self._changed:
            if not self._replaced:
                self._paths.clear()
                self._error = error

    def raise_error(self) -> None:
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def _fetch_wanted(cache: ShardCache, wanted: _Wanted) -> None:
    while (path := wanted.next()) is not None:
        try:
            cache.fetch_unless_locked(path)
        except BaseException as error:
            wanted.fail(error)
