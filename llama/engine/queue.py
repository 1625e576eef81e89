"""Who is admitted next: by priority, then the preempted, then the tenant that has been served least.

Within a priority, tenants (requests of one salt) are served by the Virtual Token Counter (Sheng et al.,
arXiv:2401.00588, algorithm 2): each has a counter of the work done for it, the one with the smallest counter is next,
and a tenant that comes back from idleness is lifted to the smallest counter of those that wait, or where nobody does to
that of the last that did, so that nobody saves up credit. So two tenants that both always have requests waiting get the
same service, whatever the number and length of their requests; one that is alone gets everything. A tenant's own
requests are served in order of arrival.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator

from llama.engine.request import Request

PROMPT_TOKEN_COST = 1.0
GENERATED_TOKEN_COST = 2.0
"""A generated token occupies the engine longer than one of a prompt (ibid., §4.1)."""
MAX_COUNTERS = 4096
"""Tenants remembered at most while they have nothing to do; beyond it those served least are forgotten, half of all."""


class _Level:
    """The waiting requests of one priority."""

    def __init__(self) -> None:
        self.preempted: deque[Request] = deque()
        """In order of their first admission."""
        self.fresh: dict[str, deque[Request]] = {}
        """By tenant, in order of arrival; no tenant without requests."""
        self.tenants: list[tuple[float, int, str]] = []
        """Those of `fresh` in order: how much each was served, the arrival of its first request, its name."""


class WaitingQueue:
    """Requests that wait, those that were preempted included."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._served: dict[str, float] = {}
        self._max_served = MAX_COUNTERS
        self._last = ""
        """The tenant whose request left the queue last."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """In the order of admission as it is now; the queue must not change meanwhile."""
        return self.before(None)

    def before(self, priority: int | None) -> Iterator[Request]:
        """Those of a priority before this one; None is after all."""
        for own in sorted(self._levels):
            if priority is not None and own >= priority:
                return
            level = self._levels[own]
            yield from level.preempted
            for _, _, tenant in level.tenants:
                yield from level.fresh[tenant]

    def append(self, request: Request) -> None:
        """A new request, behind the others of its tenant."""
        tenant = request.salt
        if not any(tenant in level.fresh for level in self._levels.values()):
            firsts = [level.tenants[0][0] for level in self._levels.values() if level.tenants]
            least = min(firsts) if firsts else self._served.get(self._last, 0.0)
            if least > self._served.get(tenant, 0.0):
                self._served[tenant] = least
        level = self._levels.setdefault(request.priority, _Level())
        level.fresh.setdefault(tenant, deque()).append(request)
        if len(level.fresh[tenant]) == 1:
            self._place(level, tenant)
        self._length += 1

    def _place(self, level: _Level, tenant: str) -> None:
        insort(level.tenants, self._key(level, tenant))

    def _displace(self, level: _Level, tenant: str) -> None:
        del level.tenants[bisect_left(level.tenants, self._key(level, tenant))]

    def _key(self, level: _Level, tenant: str) -> tuple[float, int, str]:
        return self._served.get(tenant, 0.0), level.fresh[tenant][0].arrival, tenant

    def put_back(self, request: Request) -> None:
        """A preempted request: before all that were never admitted, in order of first admission."""
        preempted = self._levels.setdefault(request.priority, _Level()).preempted
        place = sum(other.order() < request.order() for other in preempted)
        preempted.insert(place, request)
        self._length += 1

    def remove(self, request: Request) -> None:
        level = self._levels[request.priority]
        if request.admission is not None:
            level.preempted.remove(request)
        else:
            self._last = request.salt
            own = level.fresh[request.salt]
            self._displace(level, request.salt)
            own.remove(request)
            if own:
                self._place(level, request.salt)
            else:
                del level.fresh[request.salt]
        if not level.preempted and not level.fresh:
            del self._levels[request.priority]
        self._length -= 1

    def charge(self, tenant: str, *, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        """Books work done for a tenant."""
        cost = PROMPT_TOKEN_COST * prompt_tokens + GENERATED_TOKEN_COST * generated_tokens
        levels = [level for level in self._levels.values() if tenant in level.fresh]
        for level in levels:
            self._displace(level, tenant)
        self._served[tenant] = self._served.get(tenant, 0.0) + cost
        for level in levels:
            self._place(level, tenant)
        if len(self._served) > self._max_served:
            self._forget_half()

    def _forget_half(self) -> None:
        """Half at a time: each time is linear in the tenants."""
        waiting = {tenant for level in self._levels.values() for tenant in level.fresh}
        idle = sorted((name for name in self._served if name not in waiting), key=self._served.__getitem__)
        for name in idle[: len(self._served) - MAX_COUNTERS // 2]:
            del self._served[name]
        self._max_served = max(MAX_COUNTERS, 2 * len(self._served))

    def forget_service(self) -> None:
        """Nobody runs and nobody waits: old service is no reason to wait any more."""
        self._served.clear()
