"""Leases: one claimant in turn at a time, whatever the order of their steps, and somebody always gets on."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster import lease
from cluster.lease import RENEW_S, STALE_S, Claim
from cluster.liveness import Process
from cluster.storage import StorageError, Store
from tests.stepping import Actor, Killed, MemoryObjects, Names, idle, stepped


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SteppedClock(Clock):
    """An actor can be stopped before it looks at the time, too."""

    def __call__(self) -> float:
        idle()
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifact")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def joined(store: Store, holder: str, clock: Clock) -> Claim:
    claim = Claim(store, holder, clock)
    claim.join()
    return claim


def test_claims_are_served_in_order_and_say_whom_they_wait_for(store, clock):
    first, second, third = (joined(store, name, clock) for name in ("run 1", "run 2", "run 3"))
    assert [claim.blocker() for claim in (third, second, first)] == ["run 1", "run 1", None]
    second.close()
    first.close()
    assert third.blocker() is None
    third.close()
    assert store.list() == []


def test_a_claim_that_is_choosing_holds_up_all_others(store, clock):
    first = joined(store, "run 1", clock)
    choosing = json.loads(store.read_bytes(store.list()[0])) | {"number": None, "holder": "run 2"}
    store.write_json("claims/choosing.json", choosing)
    assert first.blocker() == "run 2"
    store.write_json("claims/choosing.json", choosing | {"number": 2})
    assert first.blocker() is None


def test_a_claim_that_is_not_renewed_is_dead_once_the_waiter_has_seen_it_unchanged_for_long_enough(store, clock):
    dead = joined(store, "run 1", clock)
    waiter = joined(store, "run 2", clock)
    for _ in range(int(STALE_S / RENEW_S) + 1):
        assert waiter.blocker() == "run 1"
        clock.now += RENEW_S
        waiter.renew()
    dead.renew()
    assert waiter.blocker() == "run 1", "it was silent, and lives"
    clock.now += STALE_S - 1
    waiter.renew()
    assert waiter.blocker() == "run 1"
    clock.now += 2
    waiter.renew()
    assert waiter.blocker() is None or waiter.blocker() is None  # it has lapsed meanwhile, and queues again
    assert len(store.list()) == 1


def test_a_renewal_that_does_not_show_in_the_stores_times_is_found(store, clock, monkeypatch):
    """The same size and time, as where times are of whole seconds, or there are none."""
    alive = joined(store, "run 1", clock)
    waiter = joined(store, "run 2", clock)
    stats = Store.stats
    monkeypatch.setattr(Store, "stats", lambda *args: {path: type(stat)(1, 0) for path, stat in stats(*args).items()})
    for _ in range(int(4 * STALE_S / RENEW_S)):
        clock.now += RENEW_S
        alive.renew()
        waiter.renew()
        assert waiter.blocker() == "run 1"


def test_one_that_was_stopped_before_its_turn_queues_again(store, clock):
    first = joined(store, "run 1", clock)
    second = joined(store, "run 2", clock)
    clock.now += STALE_S / 2 + 1
    second.renew()
    assert second.blocker() is not None
    assert first.blocker() == "run 2", "it was before run 2, and stopped for longer than it may rely on its claim"
    assert second.blocker() is None


def test_one_that_was_stopped_in_its_turn_goes_on(store, clock):
    first = joined(store, "run 1", clock)
    assert first.blocker() is None
    clock.now += 2 * STALE_S
    assert first.blocker() is None and first.lapsed
    assert joined(store, "run 2", clock).blocker() == "run 1"


def test_what_is_no_claim_holds_up_nobody_for_ever(store, clock):
    store.write_bytes("claims/x.json", b"{")
    claim = joined(store, "run 1", clock)
    assert claim.blocker() == "an unreadable claim"
    for _ in range(20):
        clock.now += RENEW_S
        claim.renew()
        claim.blocker()
    assert claim.blocker() is None


def test_a_claim_of_a_process_that_has_ended_on_this_machine_is_dead_at_once(store, clock):
    script = "import sys; from cluster.lease import Claim; from cluster.storage import Store\n"
    script += "claim = Claim(Store(sys.argv[1]), 'run 1'); claim.join(); print(flush=True); input()"
    command = [sys.executable, "-c", script, store.uri]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        claim = joined(store, "run 2", clock)
        assert claim.blocker() == "run 1"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its remains are still there
        assert claim.blocker() is None
    finally:
        process.kill()
        process.communicate()


def test_processes_of_other_machines_are_not_judged_by_their_number(store, clock):
    first, second = joined(store, "run 1", clock), joined(store, "run 2", clock)
    path = next(path for path in store.list() if "run 1" in store.read_bytes(path).decode())
    there = asdict(Process.current()) | {"machine": "another", "pid": 2**22 + 1}
    store.write_json(path, store.read_json(path) | {"process": there})
    assert second.blocker() == "run 1"
    assert first.blocker() is None


def test_a_store_that_fails_is_no_end_of_the_renewals(store, monkeypatch, caplog):
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    write, failing = Store.write_json, threading.Event()

    def write_json(self, path, value, **options):
        if failing.is_set():
            raise StorageError("the store is away")
        return write(self, path, value, **options)

    monkeypatch.setattr(Store, "write_json", write_json)
    with Claim.enter(store, "run 1") as claim:
        assert claim.blocker() is None
        failing.set()
        while "the store is away" not in caplog.text:
            time.sleep(0.01)
        time.sleep(0.05)
        assert caplog.text.count("the store is away") == 1
        failing.clear()
        before = store.read_bytes(store.list()[0])
        while store.read_bytes(store.list()[0]) == before:
            time.sleep(0.01)
    assert store.list() == []


def test_a_claim_that_its_holder_has_forgotten_is_not_renewed(store, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    monkeypatch.setattr(lease, "STALE_S", 0.1)
    with Claim.enter(store, "run 1"), Claim.enter(store, "run 2") as second:
        while second.blocker() is not None:
            time.sleep(0.01)
        assert second.in_turn


def test_threads_on_a_disk_are_in_turn_one_after_the_other(store):
    busy, overlaps, served = threading.Lock(), [], []

    def work(number: int) -> None:
        with Claim.enter(store, f"run {number}") as claim:
            while claim.blocker() is not None:
                time.sleep(0.002)
            if not busy.acquire(blocking=False):
                overlaps.append(number)
                return
            time.sleep(0.005)
            served.append(number)
            busy.release()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps and sorted(served) == list(range(12)) and store.list() == []


# --- every order of steps -------------------------------------------------------------------------------------------


class Claimant:
    def __init__(self, number: int, store: Store, clock: Clock) -> None:
        self.claim = Claim(store, f"run {number}", clock)
        self.leaving = self.stopped = self.looked = False
        self.actor = Actor(self._body)

    def _body(self) -> None:
        self.claim.join()
        while self.claim.blocker() is not None:
            self.looked = True
            idle()
        self.looked = True
        while not self.leaving:
            idle()
        self.claim.close()

    def renew(self) -> None:
        if not self.stopped and self.claim._lock.acquire(blocking=False):  # else it is in the middle of a write
            try:
                if self.claim._name:
                    self.claim.renew()
            finally:
                self.claim._lock.release()


class Queue:
    """Claimants on an object store, the same each time."""

    def __init__(self, number: int, seed: int, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.store = stepped(Store("s3://bucket/artifact?region=x"), MemoryObjects())
        with patch("uuid.uuid4", Names(seed)):
            self.claimants = [Claimant(each, self.store, self.clock) for each in range(number)]

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, *exception: object) -> None:
        for claimant in self.claimants:
            claimant.actor.kill()

    def in_turn(self) -> list[Claimant]:
        return [each for each in self.claimants if each.claim.in_turn and not each.claim.lapsed]

    def step(self, claimant: Claimant, steps: int) -> None:
        for _ in range(steps):
            claimant.actor.step()
            assert len(self.in_turn()) <= 1

    def let_one_in(self, claimant: Claimant) -> None:
        """One goes on, and is renewed, while time passes for all."""
        for _ in range(100):
            for _ in range(40):
                if not claimant.claim.in_turn:
                    claimant.actor.step()
            if claimant.claim.in_turn:
                return
            self.clock.now += RENEW_S
            claimant.renew()
        raise AssertionError("it never gets its turn")


def test_two_are_never_in_turn_at_once_in_any_order_of_their_steps():
    """All interleavings of two claimants up to the end of their first look, whichever id is the smaller."""
    tried = 0
    for seed in (1, 3):
        unfinished: list[tuple[int, ...]] = [(0, 1)]
        while unfinished:
            schedule = unfinished.pop()
            with Queue(2, seed) as queue, patch("uuid.uuid4", Names(seed)):
                for index in schedule:
                    queue.claimants[index].actor.step()
                while going := [index for index in (0, 1) if not queue.claimants[index].looked]:
                    unfinished += [(*schedule, index) for index in going[1:]]
                    schedule += (going[0],)
                    queue.claimants[going[0]].actor.step()
                assert len(queue.in_turn()) <= 1, schedule
            tried += 1
    assert tried > 500


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("how", ["stopped", "kill", "kill after"])
def test_wherever_one_is_stopped_or_killed_the_other_gets_in_and_stays_alone(how, seed):
    for own_steps, others_steps in product(range(1, 30, 1 + (how != "stopped")), (0, 5, 14)):
        with Queue(2, seed, SteppedClock()) as queue, patch("uuid.uuid4", Names(seed)):
            first, second = queue.claimants
            queue.step(second, others_steps)
            queue.step(first, own_steps)
            if how != "stopped":
                first.actor.step(how)
                first.actor.kill()
            queue.let_one_in(second)
            assert queue.in_turn() == [second]
            if how == "stopped":
                for _ in range(50):
                    queue.step(first, 1)
                    second.renew()
                assert queue.in_turn() == [second]
                second.leaving = True
                second.actor.finish()
                queue.let_one_in(first)


@pytest.mark.parametrize("seed", [1, 3])
def test_a_waiter_that_removes_a_dead_claim_does_not_remove_one_that_has_come_back(seed):
    for removing in range(1, 12):
        with Queue(3, seed) as queue, patch("uuid.uuid4", Names(seed)):
            first, second, third = queue.claimants
            queue.step(first, 4)
            queue.step(second, 8)
            queue.clock.now += STALE_S + 1  # both are dead to each other
            queue.step(second, removing)  # up to where it is about to remove the first, say
            queue.let_one_in(first)
            queue.step(second, 1)
            queue.step(third, 15)
            queue.step(second, 15)
            assert queue.in_turn() == [first]


class Leases(RuleBasedStateMachine):
    """Up to four claimants step through their operations on an object store; some die, some stop for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.claimants, self.arrived = Clock(), [], 0
        self.store = stepped(Store("s3://bucket/artifact?region=x"), MemoryObjects())

    @initialize(seed=st.integers(0, 99))
    def begin(self, seed: int) -> None:
        self.patch = patch("uuid.uuid4", Names(seed))
        self.patch.start()
        self.arrive()
        self.arrive()

    @precondition(lambda self: len(self.claimants) < 4)
    @rule()
    def arrive(self) -> None:
        self.arrived += 1
        self.claimants.append(Claimant(self.arrived, self.store, self.clock))

    def at(self, index: int) -> Claimant | None:
        return self.claimants[index % len(self.claimants)] if self.claimants else None

    @rule(index=st.integers(0, 3), steps=st.sampled_from([1, 1, 1, 2, 3, 8]))
    def step(self, index: int, steps: int) -> None:
        claimant = self.at(index)
        if claimant is None or claimant.stopped:
            return
        for _ in range(steps):
            if not claimant.actor.done:
                claimant.actor.step()
        self.sweep()

    @rule(index=st.integers(0, 3))
    def leave(self, index: int) -> None:
        claimant = self.at(index)
        if claimant is not None:
            claimant.leaving = True

    @rule(index=st.integers(0, 3), after=st.booleans())
    def die(self, index: int, after: bool) -> None:
        claimant = self.at(index)
        if claimant is not None:
            claimant.actor.step("kill after" if after else "kill")
            claimant.actor.kill()
            self.sweep()

    @rule(index=st.integers(0, 3))
    def stop_or_go_on(self, index: int) -> None:
        claimant = self.at(index)
        if claimant is not None:
            claimant.stopped = not claimant.stopped

    @rule(index=st.integers(0, 3))
    def renew(self, index: int) -> None:
        claimant = self.at(index)
        if claimant is not None:
            claimant.renew()

    @rule(seconds=st.sampled_from([RENEW_S, STALE_S / 2, STALE_S, 2 * STALE_S]))
    def time_passes(self, seconds: float) -> None:
        for _ in range(int(seconds / RENEW_S)):
            self.clock.now += RENEW_S
            for claimant in self.claimants:
                claimant.renew()

    def sweep(self) -> None:
        for claimant in self.claimants:
            if claimant.actor.done and not isinstance(claimant.actor.error, Killed | None):
                raise claimant.actor.error
        self.claimants = [claimant for claimant in self.claimants if not claimant.actor.done]

    @invariant()
    def at_most_one_is_in_turn(self) -> None:
        in_turn = [each.claim for each in self.claimants if each.claim.in_turn and not each.claim.lapsed]
        assert len(in_turn) <= 1

    def teardown(self) -> None:
        try:
            for claimant in self.claimants:
                claimant.stopped, claimant.leaving = False, True
            for _ in range(100):
                for claimant in self.claimants:
                    for _ in range(12):
                        if not claimant.actor.done:
                            claimant.actor.step()
                    self.at_most_one_is_in_turn()
                self.sweep()
                self.time_passes(2 * RENEW_S)
            assert not self.claimants, "they wait for each other"
        finally:
            for claimant in self.claimants:
                claimant.actor.kill()
            self.patch.stop()


TestLeases = Leases.TestCase
TestLeases.settings = settings(
    max_examples=int(os.environ.get("CARAVAN_TEST_EXAMPLES", "60")), stateful_step_count=60, deadline=None
)
