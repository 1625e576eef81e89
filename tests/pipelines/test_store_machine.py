"""Artifacts, leases, parts and their removal, together, in any order of single operations on a store.

Runs claim, compute, commit and read one artifact; some are killed or their store fails; some are forgotten while they
are still at work; removers look for what nobody needs. Whatever the order, what is committed is whole to every reader
at every moment, never of two tries, and does not go away while a run needs it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from itertools import product
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.artifact import Artifact, Manifest
from cluster.condemn import PATIENCE_S, settled
from cluster.filesystem import FileSystem, LocalFiles
from cluster.lease import Claim
from cluster.parts import adopt_part, clear_parts, discard, finished_parts, keep_part
from cluster.storage import StorageError, Store
from llama.retry import retried
from pipelines.garbage import collect
from pipelines.retention import Policy
from tests.stepping import Actor, Killed, MemoryObjects, Names, Order, idle, stepped

DAY_S = 86400


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class InTurn:
    """`ThreadPoolExecutor` in the caller's own thread, which is the one that goes step by step."""

    def __init__(self, threads: int) -> None:
        pass

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def map(self, function: Callable, items: Iterable) -> Iterable:
        return map(function, items)


class Worker:
    """One run: puts its need on record, takes over what is committed or makes it, and reads it until it is told to end.

    `uses` is what it goes on with. `rooted`: the store says that it needs it.
    """

    def __init__(self, number: int, store: Store, clock: Clock, claims: bool, records: bool) -> None:
        self.name = f"run{number}"
        self.store, self.clock, self.claims, self.records = store, clock, claims, records
        self.artifact = Artifact(store.child("artifacts", "stage", "key"))
        self.uses: Manifest | None = None
        self.ending = self.rooted = self.committing = False
        self.actor = Actor(self._body)

    def _body(self) -> None:
        self._save("running")
        self.rooted = True
        claim = Claim(self.artifact.store, self.name, self.clock) if self.claims else None
        try:
            if claim is not None:
                claim.join()
                while claim.blocker() is not None and not self.artifact.committed:
                    idle()
            self._use(settled(self.artifact, sleep=lambda seconds: idle(), clock=self.clock) or self._make())
        finally:
            if claim is not None:
                claim.close()
        while not self.ending:
            self._read()
        self.uses = None
        self._save("done")

    def _make(self) -> Manifest:
        attempt = self.artifact.begin()
        entries = []
        try:
            for part in ("a", "b"):
                adopted = adopt_part(attempt, part) if part in finished_parts(self.artifact) else None
                if adopted is None:
                    entry = attempt.store.write_bytes(part, f"{part} of {attempt.name}".encode())
                    keep_part(attempt, part, [entry], None)
                    entries.append(entry)
                else:
                    entries += adopted[0]
            self.committing = True
            given = entries if self.records else None
            commit = lambda: attempt.commit({}, given)  # noqa: E731
            return retried(commit, "committing", pauses=(0, 0, 0), sleep=lambda seconds: idle())
        except Exception:
            if not self.committing:
                discard(attempt)
            raise
        finally:
            self.committing = False
            clear_parts(attempt)

    def _use(self, manifest: Manifest) -> None:
        if self.rooted:
            self.uses = manifest

    def _read(self) -> None:
        idle()
        if self.uses is not None:
            check_whole(self.artifact, self.uses)

    def _save(self, state: str) -> None:
        status = {"state": state, "created": 1.0, "stages": {"stage": {"key": "key"}}}
        self.store.child("runs", self.name).write_json("status.json", status)


def check_whole(artifact: Artifact, manifest: Manifest) -> None:
    files = artifact.attempt_store(manifest.attempt)
    assert [entry.path for entry in manifest.files] == ["a", "b"]
    for entry in manifest.files:
        assert files.entry(entry.path) == entry


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.clock = Clock()
        self.workers: list[Worker] = []
        self.removers: list[Actor] = []
        self.arrived = 0
        self.files: FileSystem = LocalFiles()

    def make_store(self) -> Store:
        raise NotImplementedError

    def age(self, seconds: float) -> None:
        raise NotImplementedError

    @initialize(seed=st.integers(0, 99), committed=st.booleans())
    def begin(self, seed: int, committed: bool = False) -> None:
        self.patches = [
            patch("uuid.uuid4", Names(seed)),
            patch("pipelines.retention.ThreadPoolExecutor", InTurn),
        ]
        for each in self.patches:
            each.start()
        self.store = self.make_store()
        self.bare = self.make_store()
        self.bare._filesystem = self.files
        self.store = stepped(self.store, self.files)
        if committed:  # by a run that nobody remembers
            attempt = Artifact(self.store.child("artifacts", "stage", "key")).begin()
            for name in ("a", "b"):
                attempt.store.write_bytes(name, b"of an earlier run")
            attempt.commit({})

    @precondition(lambda self: len(self.actors()) < 4)
    @rule(claims=st.booleans(), records=st.booleans())
    def arrive(self, claims: bool, records: bool) -> None:
        self.arrived += 1
        self.workers.append(Worker(self.arrived, self.store, self.clock, claims, records))

    @precondition(lambda self: len(self.removers) < 2)
    @rule(keep=st.sampled_from([0, 0, 1, None]))
    def look_for_garbage(self, keep: int | None) -> None:
        self.removers.append(Actor(lambda: collect(self.store, Policy(keep), clock=self.clock, now=lambda: 1.0)))

    def actors(self) -> list[Actor]:
        return [actor for actor in (*(each.actor for each in self.workers), *self.removers) if not actor.done]

    def run(self, index: int, orders: list[Order]) -> None:
        actors = self.actors()
        if actors:
            actor = actors[index % len(actors)]
            for order in orders:
                if not actor.done:
                    actor.step(order)
                    self.check_all()
            self.sweep()

    @rule(index=st.integers(0, 5), steps=st.sampled_from([1, 1, 2, 3, 5, 12]))
    def step(self, index: int, steps: int) -> None:
        self.run(index, ["go"] * steps)

    @rule(index=st.integers(0, 5), order=st.sampled_from(["fail", "fail after"]))
    def fail(self, index: int, order: Order) -> None:
        self.run(index, [order])

    @rule(index=st.integers(0, 5), order=st.sampled_from(["kill", "kill after"]))
    def kill(self, index: int, order: Order) -> None:
        self.run(index, [order, *["kill"] * 50])

    @rule(index=st.integers(0, 3))
    def end(self, index: int) -> None:
        if self.workers:
            worker = self.workers[index % len(self.workers)]
            worker.ending = True
            if worker.actor.done and worker.uses is not None:  # killed; somebody says so
                worker.uses = None
                self.bare.delete(f"runs/{worker.name}")

    @rule(index=st.integers(0, 3))
    def forget(self, index: int) -> None:
        """The run's folder is deleted, whatever it is at."""
        if self.workers:
            worker = self.workers[index % len(self.workers)]
            worker.rooted, worker.uses = False, None
            self.bare.delete(f"runs/{worker.name}")

    @rule()
    def minutes_pass(self) -> None:
        for remover in self.removers:  # none is stopped so long in the middle of a deletion that counts
            if not remover.done and remover.pending[0] == "delete" and remover.pending[1].endswith("manifest.json"):
                remover.step()
        self.clock.now += PATIENCE_S + 1

    @rule()
    def days_pass(self) -> None:
        """By then a try that no run needs has ended."""
        if all(worker.rooted or worker.actor.done for worker in self.workers):
            self.minutes_pass()
            self.age(2 * DAY_S)

    def sweep(self) -> None:
        for actor in (*(each.actor for each in self.workers), *self.removers):
            if actor.done and not isinstance(actor.error, Killed | StorageError | ValueError | None):
                raise actor.error
        self.workers = [each for each in self.workers if not each.actor.done or each.uses is not None]
        self.removers = [remover for remover in self.removers if not remover.done]

    @invariant()
    def check_all(self) -> None:
        artifact = Artifact(self.bare.child("artifacts", "stage", "key"))
        manifest = artifact.manifest()
        if manifest is not None:
            check_whole(artifact, manifest)
        for worker in self.workers:
            if worker.uses is not None:
                assert manifest is not None, "it went away"
                check_whole(artifact, worker.uses)

    def teardown(self) -> None:
        try:
            if not hasattr(self, "store"):
                return
            for worker in self.workers:
                worker.ending = True
            for turn in range(400):
                for index in range(len(self.actors())):
                    self.run(index, ["go"] * 5)
                if turn % 40 == 0:
                    self.minutes_pass()
            assert not self.actors(), "they wait for each other"
            self.workers = []
            self.bare.delete("runs")
            self.age(2 * DAY_S)
            assert collect(self.bare, Policy(0), now=lambda: 1.0).left == []
            assert self.bare.list() == [], "it is not collected"
        finally:
            self.close()

    def close(self) -> None:
        for actor in self.actors():
            actor.kill()
        for each in self.patches if hasattr(self, "patches") else ():
            each.stop()
        shutil.rmtree(self.folder)


class OnDisk(Machine):
    def make_store(self) -> Store:
        return Store(self.folder)

    def age(self, seconds: float) -> None:
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(folder, name)
                at = os.stat(path).st_mtime - seconds
                os.utime(path, (at, at))


class OnObjects(Machine):
    """Without conditional writes: a manifest may be replaced by a rival's."""

    def make_store(self) -> Store:
        if not isinstance(self.files, MemoryObjects):
            self.files = MemoryObjects()
        return Store("s3://bucket/store?region=x")

    def age(self, seconds: float) -> None:
        self.files.now_ns += int(seconds * 1e9)


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("first", ["worker", "remover"])
def test_wherever_a_run_and_a_removal_meet_what_the_run_has_stays(first, committed):
    """One goes so many steps, then the other goes some, then the first goes on, and both end."""
    met = 0
    for ahead, between in product(range(1, 30), range(1, 36, 6)):
        machine = OnObjects()
        machine.begin(1, committed)
        machine.arrive(claims=False, records=True)
        machine.look_for_garbage(keep=0)
        worker, actors = machine.workers[0], [machine.workers[0].actor, machine.removers[0]]
        one, other = actors if first == "worker" else reversed(actors)
        for actor, steps in ((one, ahead), (other, between), (one, 60), (other, 60)):
            for _ in range(steps):
                if not actor.done:
                    actor.step()
                    machine.check_all()
        met += worker.uses is not None
        machine.close()
    assert met > 60


@pytest.mark.parametrize("kind", [OnDisk, OnObjects])
def test_what_is_committed_is_whole_and_stays_while_it_is_needed(kind):
    from hypothesis.stateful import run_state_machine_as_test

    examples = int(os.environ.get("CARAVAN_TEST_EXAMPLES", "50"))
    run_state_machine_as_test(kind, settings=settings(max_examples=examples, stateful_step_count=60, deadline=None))
