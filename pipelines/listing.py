"""What lies at a path, a URI or a glob: its files, and what is there and is not read, with the reason.

On disk the listing looks at every name itself, so that nothing in a folder can stop it: links to folders are not
followed (a folder cannot contain itself), a file that is no file is never opened, and a folder that nobody may enter
is one entry of the result. `*`, `?` and `[...]` match within a name and `**` any number of folders; in a URI `?` begins
the options and matches nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from cluster.storage import FileStat, LocationError, StorageError, Store

_MAGIC = frozenset("*?[")
_UNREADABLE = {
    errno.EACCES: "no permission to read it",
    errno.EPERM: "no permission to read it",
    errno.ELOOP: "a link that leads to itself",
    errno.ENAMETOOLONG: "its path is longer than the system allows",
}
_SPECIAL = (
    (stat.S_ISDIR, "a link to a folder; links to folders are not followed"),
    (stat.S_ISFIFO, "a pipe; only files are read"),
    (stat.S_ISSOCK, "a socket; only files are read"),
)


@dataclass
class Listing:
    """Paths relative to `store`; with each of what is not read, why."""

    store: Store
    files: dict[str, FileStat] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, found: FileStat) -> None:
        if found.size:
            self.files[path] = found
        else:
            self.left_out.append((path, "empty"))


class _Glob:
    """A pattern as states: how many of its parts a path has matched. It never tries a path twice."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts = tuple(parts)
        if self._parts[-1] == "**":
            self._parts = (*self._parts, "*")
        self.start = self._skip(frozenset({0}))

    def step(self, states: frozenset[int], name: str) -> frozenset[int]:
        ahead = set()
        for index in states:
            if index < len(self._parts):
                if self._parts[index] == "**":
                    ahead.add(index)
                elif fnmatchcase(name, self._parts[index]):
                    ahead.add(index + 1)
        return self._skip(frozenset(ahead))

    def goes_on(self, states: frozenset[int]) -> bool:
        """Whether something below a folder in these states may match."""
        return any(index < len(self._parts) for index in states)

    def matches(self, states: frozenset[int]) -> bool:
        return len(self._parts) in states

    def _skip(self, states: frozenset[int]) -> frozenset[int]:
        """`**` may stand for no folder at all."""
        reached = set(states)
        for index in range(len(self._parts)):
            if index in reached and self._parts[index] == "**":
                reached.add(index + 1)
        return frozenset(reached)


_EVERYTHING = _Glob(("**",))


def list_source(uri: str) -> Listing:
    """The files at `uri`. Raises ValueError, with a remedy, if there is nothing, and StorageError."""
    local = Store(uri).local_path()
    found = _local(uri, local) if local is not None else _remote(uri)
    if not (found.files or found.left_out or found.unreadable):
        raise ValueError("it has no files; give a file, a folder, a glob or 'stdlib'")
    return found


# -- on disk


def _local(uri: str, path: Path) -> Listing:
    try:
        mode = os.stat(path).st_mode
    except PermissionError as error:
        raise ValueError("no permission to look at it; change the permissions") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("a link on its path leads to itself; give a file, a folder, a glob or 'stdlib'") from error
        if not _MAGIC & set(str(path)):
            raise ValueError("it does not exist; give a file, a folder, a glob or 'stdlib'") from error
        return _local_glob(path)
    if stat.S_ISDIR(mode):
        return _walk(Store(path), path, _EVERYTHING)
    if not stat.S_ISREG(mode):
        raise ValueError("it is neither a file nor a folder; give a file, a folder, a glob or 'stdlib'")
    found = Listing(Store(path.parent))
    found.add(path.name, _file_stat(os.stat(path)))
    return found


def _local_glob(path: Path) -> Listing:
    parts = path.parts[1:]
    first = next(index for index, part in enumerate(parts) if _MAGIC & set(part))
    base = Path("/", *parts[:first])
    return _matched(_walk(Store(base), base, _Glob(parts[first:])))


def _walk(store: Store, base: Path, glob: _Glob) -> Listing:
    found = Listing(store)
    folders = [("", glob.start)]
    while folders:
        folder, states = folders.pop()
        try:
            entries = os.scandir(os.path.join(base, folder))
        except (FileNotFoundError, NotADirectoryError):  # deleted while we looked, or the base of a glob
            continue
        except OSError as error:
            found.unreadable.append((folder, _reason(error, store)))
            continue
        with entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                reached = glob.step(states, entry.name)
                is_folder = entry.is_dir(follow_symlinks=False)
                matches = not is_folder and glob.matches(reached)
                if not matches and not (glob.goes_on(reached) and (is_folder or _leads_to_folder(entry))):
                    continue
                if entry.name.startswith("."):
                    found.left_out.append((path, "hidden: its name begins with a dot"))
                elif is_folder:
                    folders.append((path, reached))
                else:
                    _look(entry, path, found)
    return found


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link that leads to itself, or behind a closed door
        return False


def _look(entry: os.DirEntry[str], path: str, found: Listing) -> None:
    try:
        status = entry.stat()
    except FileNotFoundError:
        if entry.is_symlink():
            found.unreadable.append((path, "a link to nothing"))
        return  # else it was deleted while we looked
    except OSError as error:
        found.unreadable.append((path, _reason(error, found.store)))
        return
    if stat.S_ISREG(status.st_mode):
        found.add(path, _file_stat(status))
        return
    what = next((what for is_it, what in _SPECIAL if is_it(status.st_mode)), "a device; only files are read")
    found.left_out.append((path, what))


def _reason(error: OSError, store: Store) -> str:
    """Why it cannot be read. Raises StorageError if that may be different the next time."""
    reason = _UNREADABLE.get(error.errno or 0)
    if reason is None:
        raise StorageError(f"{store.uri}: cannot list it: {error}; look at the disk, then run again") from error
    return reason


def _file_stat(status: os.stat_result) -> FileStat:
    return FileStat(status.st_size, status.st_mtime_ns)


# -- on an object store


def _remote(uri: str) -> Listing:
    location, mark, options = uri.partition("?")
    scheme, _, path = location.partition("://")
    parts = path.rstrip("/").split("/")
    first = next((index for index, part in enumerate(parts) if index and _MAGIC & set(part)), None)
    single = _single_object(f"{scheme}://{'/'.join(parts[:-1])}{mark}{options}", unquote(parts[-1]), len(parts))
    if single is not None:
        return single
    if first is None:
        return _objects(Store(uri), _EVERYTHING)
    base = Store(f"{scheme}://{'/'.join(parts[:first])}{mark}{options}")
    return _matched(_objects(base, _Glob(unquote(part) for part in parts[first:])))


def _single_object(folder: str, name: str, depth: int) -> Listing | None:
    if depth < 2:  # the top of a bucket
        return None
    store = Store(folder)
    if not store.exists(name):
        return None
    with store.open_input(name) as file:
        size = file.seek(0, os.SEEK_END)
    found = Listing(store)
    found.add(name, FileStat(size, 0))
    return found


def _objects(store: Store, glob: _Glob) -> Listing:
    found = Listing(store)
    stats = store.stats()
    if not stats and store.lacks_bucket():
        raise ValueError("its bucket does not exist; create it, or correct the URI")
    for path, status in stats.items():
        states = glob.start
        for name in path.split("/"):
            states = glob.step(states, name)
        if not glob.matches(states):
            continue
        if any(name.startswith(".") for name in path.split("/")):
            found.left_out.append((path, "hidden: its name begins with a dot"))
        elif not _is_plain(store, path):
            found.unreadable.append((path, "its key is no plain path; rename it"))
        else:
            found.add(path, status)
    return found


def _is_plain(store: Store, path: str) -> bool:
    try:
        store.child(path)
    except LocationError:
        return False
    return True


def _matched(found: Listing) -> Listing:
    if not (found.files or found.left_out or found.unreadable):
        raise ValueError("the glob matches no file; '*' stays within a name, '**' crosses folders")
    return found
