"""How many replicas the load asks for. Pure: loads and a clock in, a number out.

    prefill   λ / UTILISATION + backlog / DRAIN_S    replicas that keep up with the prompts and work off the backlog
    cache     Σ used blocks / PRESSURE               replicas whose running requests fit in their key-value cache

λ is the prefill work that arrives, in seconds of work a second, over RATE_S. So the backlog alone does not decide: with
enough replicas there is none, and they are needed all the same. The larger of the two is the need.

Up at once, as soon as the need has been above the target for UP_S. Down one at a time, DOWN_EVERY_S apart, when the
need with MARGIN on top of it would have fitted into one replica less for all of DOWN_S, or at the start for all of
DOWN_S - DOWN_EVERY_S. Replicas that start are capacity already: while there are any, the backlog, which only grows
until they serve, calls for no more; nor does one that shrinks.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

UTILISATION = 0.8
DRAIN_S = 5.0
PRESSURE = 0.85
RATE_S = 5.0
UP_S = 1.5
DOWN_S = 60.0
DOWN_EVERY_S = 15.0
MARGIN = 0.15
_EPSILON = 1e-9


@dataclass(frozen=True)
class Bounds:
    """The least and the largest number of replicas."""

    least: int
    largest: int

    def clamp(self, replicas: int) -> int:
        return min(max(replicas, self.least), self.largest)


@dataclass(frozen=True)
class Load:
    """One replica at a moment: prompt tokens to compute, those that came since it started, and the share of its cache
    that running requests hold, 0 to 1."""

    pending_tokens: int
    arrived_tokens: int
    used: float


@dataclass(frozen=True)
class _Sample:
    at: float
    loads: Mapping[str, Load]


class Autoscaler:
    """Give it the loads about once a second. `prefill_s_per_token` turns tokens into seconds of work."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()
        self._needs: deque[tuple[float, float]] = deque()  # (when, replicas)
        self._moved_at = float("-inf")

    def decide(
        self, now: float, loads: Mapping[str, Load], target: int, bounds: Bounds, prefill_s_per_token: float
    ) -> int:
        """The number of replicas to have.

        Args:
            now: seconds, of a clock that only goes forward.
            loads: by replica, of those that serve.
            target: as many as there are to be at present, those that start among them.
        """
        self._samples.append(_Sample(now, dict(loads)))
        while self._samples[0].at < now - RATE_S and len(self._samples) > 2:
            self._samples.popleft()
        need = self._need(starting=len(loads) < target, prefill_s_per_token=prefill_s_per_token)
        self._needs.append((now, need))
        while self._needs[0][0] < now - DOWN_S:
            self._needs.popleft()
        decided = bounds.clamp(self._move(now, target, starting=len(loads) < target))
        if decided != target:
            self._moved_at = now
        return decided

    def _need(self, *, starting: bool, prefill_s_per_token: float) -> float:
        first, last = self._samples[0], self._samples[-1]
        seconds = last.at - first.at
        # All that a replica got which was not there at the first look has come since.
        arrived = sum(
            load.arrived_tokens - (first.loads[replica].arrived_tokens if replica in first.loads else 0)
            for replica, load in last.loads.items()
        )
        rate = max(0, arrived) / seconds if seconds > 0 else 0.0
        backlog = _backlog(last)
        earlier = next(sample for sample in self._samples if sample.at >= last.at - UP_S)
        if starting or (earlier is not last and backlog < _backlog(earlier)):
            backlog = 0
        prefill = prefill_s_per_token * (rate / UTILISATION + backlog / DRAIN_S)
        return max(prefill, sum(load.used for load in last.loads.values()) / PRESSURE)

    def _move(self, now: float, target: int, *, starting: bool) -> int:
        recent = [need for at, need in self._needs if at >= now - UP_S]
        held = self._needs[0][0] <= now - UP_S
        up = _replicas(min(recent))
        if held and up > target:
            return up
        settled = self._needs[0][0] <= now - DOWN_S + DOWN_EVERY_S and self._moved_at <= now - DOWN_EVERY_S
        down = _replicas((1 + MARGIN) * max(need for _, need in self._needs))
        return target - 1 if settled and not starting and down < target else target


def _backlog(sample: _Sample) -> int:
    return sum(load.pending_tokens for load in sample.loads.values())


def _replicas(need: float) -> int:
    return max(1, ceil(need - _EPSILON))
