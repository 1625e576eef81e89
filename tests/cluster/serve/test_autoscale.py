"""The number of replicas that a load asks for, on a simulated cluster whose replicas take their time to start."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from cluster.serve.autoscale import DOWN_S, Autoscaler, Bounds, Load

TOKENS_PER_S = 1000
START_S = 20.0
TICK_S = 1.0


@dataclass
class _Replica:
    serves_from: float
    pending: float = 0.0
    arrived: float = 0.0


@dataclass
class _Cluster:
    """Replicas that compute TOKENS_PER_S each; what arrives goes to the shortest queue in small pieces.

    `work(t)`: prefill seconds that arrive a second. `used(t)`: blocks that running requests hold, in whole caches.
    """

    work: Callable[[float], float]
    used: Callable[[float], float] = lambda at: 0.0
    bounds: Bounds = Bounds(1, 8)
    replicas: dict[str, _Replica] = field(default_factory=lambda: {"r0": _Replica(0.0)})
    targets: list[int] = field(default_factory=list)
    worst_wait_s: float = 0.0
    now: float = 0.0

    def run(self, seconds: float) -> "_Cluster":
        scaler = Autoscaler()
        until = self.now + seconds
        while self.now < until:
            serving = {name: r for name, r in self.replicas.items() if r.serves_from <= self.now}
            for _ in range(10):
                least = min(serving.values(), key=lambda r: r.pending)
                tokens = self.work(self.now) * TOKENS_PER_S * TICK_S / 10
                least.pending, least.arrived = least.pending + tokens, least.arrived + tokens
            for replica in serving.values():
                self.worst_wait_s = max(self.worst_wait_s, replica.pending / TOKENS_PER_S)
                replica.pending = max(0.0, replica.pending - TOKENS_PER_S * TICK_S)
            share = min(1.0, self.used(self.now) / len(serving))
            loads = {name: Load(round(r.pending), round(r.arrived), share) for name, r in serving.items()}
            self._resize(scaler.decide(self.now, loads, len(self.replicas), self.bounds, 1 / TOKENS_PER_S))
            self.now += TICK_S
        return self

    def _resize(self, target: int) -> None:
        while len(self.replicas) < target:
            self.replicas[f"r{len(self.targets)}-{len(self.replicas)}"] = _Replica(self.now + START_S)
        while len(self.replicas) > target:  # newest first, as Serve does; what it has left is served elsewhere
            _, victim = self.replicas.popitem()
            next(iter(self.replicas.values())).pending += victim.pending
        self.targets.append(target)

    @property
    def moves(self) -> list[int]:
        return [b - a for a, b in zip([1, *self.targets], self.targets, strict=False) if b != a]


def test_a_step_of_load_is_met_at_once_and_given_back_one_by_one():
    cluster = _Cluster(lambda at: 2.5 if 20 <= at < 200 else 0.1).run(60)
    first = next(i for i, target in enumerate(cluster.targets) if target > 1)
    assert first - 20 <= 4
    # 2.5 of work at 0.8 are 4 replicas, and some more for what piled up; not one for each second of starting
    assert 4 <= cluster.targets[-1] <= 6
    cluster.run(140)
    cluster.run(400)
    assert cluster.targets[-1] == 1
    downs = [move for move in cluster.moves if move < 0]
    assert set(downs) == {-1} and len(cluster.moves) - len(downs) <= 3
    last_loaded = 200
    gone = next(i for i in range(last_loaded, len(cluster.targets)) if cluster.targets[i] < cluster.targets[i - 1])
    assert gone - last_loaded >= DOWN_S - 15


def test_replicas_that_start_are_not_asked_for_again():
    """One that counted only who serves would ask for more each second of the 20 that a start takes."""
    cluster = _Cluster(lambda at: 2.5).run(3)
    early = cluster.targets[-1]
    cluster.run(START_S - 2)
    assert early >= 4 and cluster.targets[-1] <= early + 1


def test_a_ramp_is_followed_without_a_queue_that_grows():
    cluster = _Cluster(lambda at: min(4.0, 0.5 + at / 100)).run(400)
    assert all(move > 0 for move in cluster.moves)
    assert cluster.targets[-1] in (5, 6)
    assert cluster.worst_wait_s < 6


@pytest.mark.parametrize("period", [10, 30, 50])
def test_a_load_that_flaps_does_not_make_the_number_flap(period):
    cluster = _Cluster(lambda at: 2.0 if at % period < period / 2 else 0.2)
    cluster.run(600)
    settled = cluster.targets[240:]
    assert len(set(settled)) == 1, "within DOWN_S the next peak comes"
    assert settled[0] >= 2


@pytest.mark.parametrize("seed", range(5))
def test_noise_about_a_border_moves_nothing_to_and_fro(seed):
    """0.8 of two replicas, where one more or less is a matter of nothing."""
    draw = random.Random(seed)
    cluster = _Cluster(lambda at: 1.6 * draw.uniform(0.9, 1.1)).run(900)
    assert len([move for move in cluster.moves[3:]]) <= 2
    assert cluster.targets[-1] in (2, 3)


def test_a_full_cache_asks_for_replicas_though_no_prompt_waits():
    cluster = _Cluster(lambda at: 0.1, used=lambda at: 2.0).run(60)
    assert cluster.targets[-1] == math.ceil(2.0 / 0.85)


def test_a_moments_burst_is_not_worth_a_replica():
    cluster = _Cluster(lambda at: 2.0 if at == 30 else 0.1).run(120)
    assert set(cluster.targets) == {1}


def test_the_bounds_hold():
    low = _Cluster(lambda at: 0.0, bounds=Bounds(2, 3)).run(300)
    assert low.targets[-1] == 2
    high = _Cluster(lambda at: 9.0, bounds=Bounds(1, 3)).run(60)
    assert max(high.targets) == 3


def test_a_scaler_that_begins_anew_takes_nothing_away_before_it_knows_the_past():
    cluster = _Cluster(lambda at: 2.5 if at < 100 else 0.1).run(100)
    before = len(cluster.replicas)
    cluster.run(DOWN_S - 20)  # a new Autoscaler
    assert len(cluster.replicas) == before
    cluster.run(200)
    assert len(cluster.replicas) < before
