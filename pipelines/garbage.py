"""Removing what nobody needs of a store: `caravan gc`. What is needed is said by pipelines/retention.py.

Of an artifact that nothing needs everything goes; of one that only ended runs need, what can never count any more. The
order is that of cluster/condemn.py: a marker, the roots anew, then deletions by the names that were found before.
Killed at any point and run again, it finishes the work.

What is not understood stays, and is named. So does whatever was written to within a day, by the store's own times, and
is not known to be at its end: the try of a run that has been deleted may still be at work.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from cluster import condemn, hold, lease
from cluster.artifact import Artifact
from cluster.condemn import Marker, Overtaken
from cluster.storage import FileStat, StorageError, Store
from pipelines.quantity import size_in_words
from pipelines.retention import Address, Need, Policy, Roots, find_roots
from pipelines.training_folder import CHECKPOINTS, HANGS, INCARNATIONS, METRICS

ABANDONED_S = 86400.0
"""After so long without a write a try that has not won is at its end."""
_MANIFEST = "manifest.json"
_FOLDERS = {"attempts", "parts", lease.FOLDER, condemn.FOLDER, hold.FOLDER, CHECKPOINTS, METRICS, INCARNATIONS, HANGS}
_PROBES = 3
"""Tries to see a file that was just written: of a process that slept for a day another takes it away as left over."""
_AT_ONCE = 64
"""Artifacts that are marked before the roots are read once for all of them."""


@dataclass(frozen=True)
class Folder:
    """What lies in an artifact's folder. `winner`: the attempt that counts. `winners`: that, and those that did before
    an earlier removal was cut short. `problem`: why it is not understood."""

    address: Address
    files: Mapping[str, FileStat]
    winner: str | None = None
    winners: frozenset[str] = frozenset()
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """What to delete of an artifact, in this order, and why. `left` says what stays though nothing needs it."""

    address: Address
    paths: tuple[str, ...]
    bytes: int
    reason: str
    left: str = ""


@dataclass
class Report:
    """`removed`: what was removed, or would be. `left`: what stays though nothing needs it; a line each, and why."""

    removed: list[Plan] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    kept_runs: tuple[str, ...] = ()
    dropped_runs: tuple[str, ...] = ()
    failed: bool = False

    @property
    def bytes(self) -> int:
        return sum(plan.bytes for plan in self.removed)

    def as_json(self) -> dict[str, Any]:
        removed = [
            {"artifact": "/".join(plan.address), "bytes": plan.bytes, "reason": plan.reason, "paths": list(plan.paths)}
            for plan in self.removed
        ]
        runs = {"kept_runs": list(self.kept_runs), "dropped_runs": list(self.dropped_runs)}
        return {"removed": removed, "bytes": self.bytes, "left": self.left, **runs}


# --- what to remove -------------------------------------------------------------------------------------------------


def plan(folder: Folder, need: Need | None, now_ns: int) -> Plan:
    """Pure. Without paths: nothing is to be done.

    Args:
        now_ns: by the store's clock.
    """
    if need is not None and need.active:
        return _plan(folder, [], "")
    if need is not None:
        paths = _abandoned(folder, now_ns) + _unneeded_checkpoints(folder, need)
        return _plan(folder, paths, "abandoned tries and checkpoints", folder.problem if paths else "")
    held = sorted(path for path in folder.files if path.startswith(f"{hold.FOLDER}/"))
    if held:
        return _plan(folder, [], "", f"{held[0]} says that it is served; caravan undeploy there, or delete that file")
    if folder.problem:
        return _plan(folder, [], "", folder.problem)
    young = _young(folder, now_ns)
    if young and not folder.winners:
        return _plan(folder, [], "", f"{young[0]} was written within a day, maybe by somebody who is still at it")
    tries = {_try_of(path) for path in young if path.startswith("attempts/")} - folder.winners
    left = f"{len(tries)} unfinished tries were written to within a day" if tries else ""
    return _plan(folder, _all_but(folder, tries), "no kept run needs it", left)


def _plan(folder: Folder, paths: list[str], reason: str, left: str = "") -> Plan:
    size = sum(stat.size for path, stat in folder.files.items() if any(_is_below(path, root) for root in paths))
    return Plan(folder.address, tuple(paths), size, reason, left)


def _all_but(folder: Folder, tries: set[str]) -> list[str]:
    """Whatever counts first, its manifest before its files."""
    files = folder.files
    paths = [_MANIFEST] if _MANIFEST in files else []
    paths += _checkpoints(folder, {path.split("/")[1] for path in files if path.startswith(f"{CHECKPOINTS}/")})
    paths += sorted(f"attempts/{name}" for name in _tries(folder) - tries)
    paths += [name for name in (METRICS, INCARNATIONS, HANGS) if any(path.startswith(f"{name}/") for path in files)]
    if not tries:
        paths += sorted(path for path in files if path.startswith("parts/"))
    return paths + sorted(path for path in files if path.startswith(f"{lease.FOLDER}/"))


def _checkpoints(folder: Folder, steps: Iterable[str]) -> list[str]:
    """Each is an artifact of its own."""
    paths = []
    for step in sorted(steps):
        below = [path for path in sorted(folder.files) if path.startswith(f"{CHECKPOINTS}/{step}/")]
        paths += [path for path in below if path == f"{CHECKPOINTS}/{step}/{_MANIFEST}"]
        paths += sorted({"/".join(path.split("/")[:4]) for path in below} - set(paths))
    return paths


def _unneeded_checkpoints(folder: Folder, need: Need) -> list[str]:
    if need.steps is None or folder.problem:
        return []
    there = {path.split("/")[1] for path in folder.files if path.startswith(f"{CHECKPOINTS}/")}
    return _checkpoints(folder, there - need.steps)


def _abandoned(folder: Folder, now_ns: int) -> list[str]:
    """Tries that lost, of an artifact that is committed."""
    if folder.winner is None:
        return []
    young = {_try_of(path) for path in _young(folder, now_ns) if path.startswith("attempts/")}
    return sorted(f"attempts/{name}" for name in _tries(folder) - young - {folder.winner})


def _young(folder: Folder, now_ns: int) -> list[str]:
    """Files of those who work on the artifact that were written within a day."""
    passing = tuple(f"{name}/" for name in (lease.FOLDER, condemn.FOLDER))
    return sorted(
        path
        for path, stat in folder.files.items()
        if not path.startswith(passing) and now_ns - stat.mtime_ns < ABANDONED_S * 1e9
    )


def _tries(folder: Folder) -> set[str]:
    return {_try_of(path) for path in folder.files if path.startswith("attempts/")}


def _try_of(path: str) -> str:
    return path.split("/")[1]


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


# --- what there is --------------------------------------------------------------------------------------------------


def find_folders(store: Store) -> tuple[list[Folder], list[str]]:
    """The artifacts of a store, and what lies between them and is none, a line each."""
    files: dict[Address, dict[str, FileStat]] = {}
    strangers = []
    for path, stat in store.child("artifacts").stats().items():
        stage, _, rest = path.partition("/")
        key, _, name = rest.partition("/")
        if name:
            files.setdefault((stage, key), {})[name] = stat
        else:
            strangers.append(f"artifacts/{path}: not of an artifact")
    return [look_into(store, address, files[address]) for address in sorted(files)], strangers


def look_into(store: Store, address: Address, files: Mapping[str, FileStat]) -> Folder:
    """Of which these files are there."""
    artifact = Artifact(store.child("artifacts", *address))
    problem = next((f"{path} is nothing that an artifact has" for path in sorted(files) if not _is_known(path)), "")
    try:
        manifest = artifact.manifest() if _MANIFEST in files else None
        earlier = condemn.earlier_winners(artifact) if any(_is_below(path, condemn.FOLDER) for path in files) else set()
    except StorageError as error:
        return Folder(address, files, problem=" ".join(str(error).split()))
    winner = manifest.attempt if manifest else None
    return Folder(address, files, winner, frozenset(earlier | ({winner} if winner else set())), problem)


def _is_known(path: str) -> bool:
    top, _, rest = path.partition("/")
    if not rest:
        return top == _MANIFEST
    if top in ("attempts", CHECKPOINTS) and "/" not in rest:
        return False
    if top == CHECKPOINTS:
        inner = rest.partition("/")[2]
        return inner == _MANIFEST or inner.startswith("attempts/") and inner.count("/") > 1
    return top in _FOLDERS


# --- removing it ----------------------------------------------------------------------------------------------------


def collect(
    store: Store,
    policy: Policy,
    dry_run: bool = False,
    *,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], float] = time.time,
) -> Report:
    """Remove what neither a kept run nor a deployment needs; with `dry_run` only say what that is.

    Raises RetentionError if it cannot be told, and StorageError if the store cannot be listed; of an artifact that the
    store fails on the report says so.
    """
    roots = find_roots(store, policy, now())
    folders, strangers = find_folders(store)
    report = Report(left=[*roots.unclear, *strangers], kept_runs=roots.kept, dropped_runs=roots.dropped)
    now_ns = time.time_ns() if dry_run else _store_time(store)
    planned = [(folder, plan(folder, roots.needs.get(folder.address), now_ns)) for folder in folders]
    report.left += [f"{_name(each.address)}: {each.left}" for _, each in planned if each.left]
    wanted = [(folder, each) for folder, each in planned if each.paths or _has_remains(folder, roots)]
    if dry_run:
        report.removed = [each for _, each in wanted if each.paths]
        return report
    queue = iter(wanted)
    while chunk := list(islice(queue, _AT_ONCE)):
        _remove_chunk(store, [folder for folder, _ in chunk], policy, now_ns, report, clock, now)
    return report


def _remove_chunk(
    store: Store,
    folders: list[Folder],
    policy: Policy,
    now_ns: int,
    report: Report,
    clock: Callable[[], float],
    now: Callable[[], float],
) -> None:
    by = f"caravan gc, process {os.getpid()} on {socket.gethostname()}"
    marked: list[tuple[Folder, Marker]] = []
    try:
        for folder in folders:
            artifact = Artifact(store.child("artifacts", *folder.address))
            with _noted(report, folder.address):
                marked.append((folder, Marker(artifact, by, folder.winner, clock)))
        roots = find_roots(store, policy, now())
        while marked:
            folder, marker = marked[0]
            with _noted(report, folder.address):
                _remove(store, folder, marker, roots, now_ns, report)
            with _noted(report, folder.address):
                marker.withdraw()
            marked.pop(0)
    finally:
        for _, marker in marked:
            with suppress(StorageError):
                marker.withdraw()


def _remove(store: Store, folder: Folder, marker: Marker, roots: Roots, now_ns: int, report: Report) -> None:
    artifact = Artifact(store.child("artifacts", *folder.address))
    need = roots.needs.get(folder.address)
    if need is None and artifact.store.list(hold.FOLDER):
        return
    chosen = plan(folder, need, now_ns)
    marker.delete(chosen.paths)
    if need is None or not need.active:
        marker.remove_others(now_ns)
    if chosen.paths:
        report.removed.append(chosen)


def _has_remains(folder: Folder, roots: Roots) -> bool:
    """Markers that an earlier removal has left."""
    need = roots.needs.get(folder.address)
    active = need is not None and need.active
    return not active and not folder.problem and any(_is_below(path, condemn.FOLDER) for path in folder.files)


class _noted:
    """A store that fails on one artifact does not keep the others from being removed."""

    def __init__(self, report: Report, address: Address) -> None:
        self._report, self._address = report, address

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, StorageError):
            return False
        self._report.left.append(f"{_name(self._address)}: {' '.join(str(error).split())}")
        self._report.failed = self._report.failed or not isinstance(error, Overtaken)
        return True


def _store_time(store: Store) -> int:
    """Nanoseconds since the epoch by the clock that gives files their times."""
    folder, name, stats = store.child("probes"), uuid.uuid4().hex, dict[str, FileStat]()
    for _ in range(_PROBES):
        folder.write_bytes(name, b"caravan")
        if name in (stats := folder.stats()):
            break
    else:
        raise StorageError(f"{folder.uri}: {name} was written and is not there; look whether something deletes files")
    now_ns = stats[name].mtime_ns
    for each, stat in stats.items():
        if each == name or now_ns - stat.mtime_ns > ABANDONED_S * 1e9:  # of one who was killed just here
            folder.delete(each)
    return now_ns


def _name(address: Address) -> str:
    return "artifacts/" + "/".join(address)


def lines(report: Report, dry_run: bool) -> Iterator[str]:
    """For a person."""
    verb = "would remove" if dry_run else "removed"
    for each in report.removed:
        yield f"{verb} {_name(each.address)} ({size_in_words(each.bytes)}): {each.reason}"
    for line in report.left:
        yield f"left {line}"
    runs = f"{len(report.kept_runs)} runs kept, {len(report.dropped_runs)} not"
    yield f"{verb} {size_in_words(report.bytes)} of {len(report.removed)} artifacts; {runs}"
