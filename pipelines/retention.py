"""What of a store is still needed: the roots from which nothing may be taken away.

    a run that has not ended      (pending, running, or lost, since it can be resumed): its stages' artifacts, and
                                  those that they start from
    a run that is kept            the last `keep_last` that have ended, and those younger than `keep_days`
    what these runs start from    places of this store in their recipes: `train.start_from`, an adopted tokenizer
    a deployment                  by the hold in the artifact that it serves (cluster/hold.py)

A run's stages are on record in its status from its begin on, before it looks at any artifact.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import yaml

from cluster.location import Location, LocationError
from cluster.storage import NotFound, Store
from pipelines.section import lasting_uri
from pipelines.stage import kind_of

Address = tuple[str, str]
"""A stage's name and its key: where an artifact lies below `artifacts/`."""

_READERS = 16
_ENDED = ("done", "failed")


class RetentionError(ValueError):
    """It cannot be told what is needed, so nothing may be removed; the message is one line."""


@dataclass(frozen=True)
class Policy:
    """Of the runs that have ended, which are kept: those that either says. None and None: all of them."""

    keep_last: int | None = None
    keep_days: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--keep-last", self.keep_last), ("--keep-days", self.keep_days)):
            if value is not None and not 0 <= value < float("inf"):
                raise RetentionError(f"{option}={value} is not a number from 0 up; give one, or leave it out")

    def kept(self, ended: Mapping[str, float], now: float) -> set[str]:
        """Ids of those to keep, of runs with the times they ended (seconds since the epoch)."""
        if self.keep_last is None and self.keep_days is None:
            return set(ended)
        newest = sorted(ended, key=lambda run: (ended[run], run), reverse=True)
        days = -1.0 if self.keep_days is None else self.keep_days
        return {*newest[: self.keep_last or 0], *(run for run, at in ended.items() if now - at < 86400 * days)}


@dataclass(frozen=True)
class Need:
    """Why an artifact is needed.

    `active`: by a run that has not ended, and may be at work on it. `steps`: the names of the checkpoints that are
    needed, None for all that there are.
    """

    by: tuple[str, ...]
    active: bool
    steps: frozenset[str] | None

    def __or__(self, other: Need) -> Need:
        steps = None if self.steps is None or other.steps is None else self.steps | other.steps
        return Need(self.by + other.by, self.active or other.active, steps)


@dataclass(frozen=True)
class Roots:
    """`kept` and `dropped` are runs; `needs` says what the kept ones need. `unclear`: what could not be told, a line
    each, and does no harm."""

    needs: Mapping[Address, Need]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    unclear: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder says. `ended`: seconds since the epoch; None for a run that has not, or can be resumed."""

    id: str
    ended: float | None
    artifacts: tuple[Address, ...]
    places: tuple[str, ...] = field(default=())
    """All strings of its recipe that may name a place."""


def find_roots(store: Store, policy: Policy, now: float) -> Roots:
    """Reads the runs of a store. Raises RetentionError if one cannot be read, and StorageError."""
    folders: dict[str, set[str]] = {}
    for path in store.child("runs").list():
        run_id, _, name = path.partition("/")
        folders.setdefault(run_id, set()).add(name)
    with ThreadPoolExecutor(_READERS) as readers:
        runs = list(readers.map(lambda item: read_run(store, *item), folders.items()))
    return roots_of(store, runs, policy, now)


def read_run(store: Store, run_id: str, names: Iterable[str]) -> RunFacts:
    """A run of whose folder these files are there. One without a status is only about to begin."""
    directory = store.child("runs", run_id)
    status: Any = {}
    recipe: Any = None
    try:
        if "status.json" in names:
            status = directory.read_json("status.json")
        if "recipe.yaml" in names:
            recipe = yaml.safe_load(directory.read_bytes("recipe.yaml"))
        ended = status["state"] in _ENDED if status else False
        if "submission.json" in names and not directory.read_json("submission.json")["outcome"]:
            ended = False  # it waits to be resumed
        times = [float(status.get(name) or 0.0) for name in ("created", "started", "heartbeat", "ended")]
        stages = [(name, stage["key"]) for name, stage in status.get("stages", {}).items()]
        inputs = list(status.get("inputs", {}).items())
    except NotFound:  # deleted while we looked
        return RunFacts(run_id, 0.0, ())
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise RetentionError(
            f"run {run_id!r} cannot be read, so what it needs is not known and nothing is removed: {problem}; repair "
            f"its folder, or delete it: {directory.uri}"
        ) from error
    artifacts = tuple((kind_of(name), str(key)) for name, key in stages + inputs if key)
    return RunFacts(run_id, max(times) if ended else None, artifacts, tuple(_strings(recipe)))


def roots_of(store: Store, runs: Iterable[RunFacts], policy: Policy, now: float) -> Roots:
    """Pure."""
    by_id = {run.id: run for run in runs}
    kept = policy.kept({run.id: run.ended for run in by_id.values() if run.ended is not None}, now)
    kept |= {run.id for run in by_id.values() if run.ended is None}
    needs: dict[Address, Need] = {}
    unclear = []

    def need(address: Address, by: str, active: bool, steps: frozenset[str] | None) -> None:
        found = Need((by,), active, steps)
        needs[address] = needs[address] | found if address in needs else found

    for run_id in sorted(kept):
        run = by_id[run_id]
        for address in run.artifacts:
            need(address, f"run {run_id}", run.ended is None, None)
        if run.ended is None and not run.artifacts:
            unclear.append(f"run {run_id} has not begun, so what it will find of earlier runs is not protected")
        for place in run.places:
            reference = artifact_at(store, place)
            if reference is not None:
                need(reference[0], f"the recipe of run {run_id}", run.ended is None, reference[1])
    return Roots(needs, tuple(sorted(kept)), tuple(sorted(by_id.keys() - kept)), tuple(unclear))


def artifact_at(store: Store, place: str) -> tuple[Address, frozenset[str] | None] | None:
    """The artifact that a place lies in, and the checkpoint if it lies in one; None if it is not of this store."""
    if "/" not in place:
        return None
    try:
        there, here = Location.parse(lasting_uri(place)), Location.parse(store.uri)
    except (LocationError, ValueError):
        return None
    if (there.kind, there.bucket) != (here.kind, here.bucket):
        return None
    for path, root in ((there.path, here.path), (os.path.realpath(there.path), os.path.realpath(here.path))):
        if path.startswith(f"{root}/artifacts/"):
            stage, key, *rest = [*path.removeprefix(f"{root}/artifacts/").split("/"), ""][:4]
            if key:
                steps = frozenset({rest[1]}) if len(rest) > 1 and rest[0] == "checkpoints" and rest[1] else None
                return (stage, key), steps
    return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
