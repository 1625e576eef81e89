"""Who is admitted next: by priority, then the preempted, then the tenant that has been served least.

Within a priority, tenants (requests of one salt) are served by the Virtual Token Counter (Sheng et al.,
arXiv:2401.00588, algorithm 2): each has a counter of the work done for it, the one with the smallest counter is next,
and a tenant that comes back from idleness is lifted to the smallest counter of those that wait, so that nobody saves up
credit. So two tenants that both always have requests waiting get the same service, whatever the number and length of
their requests; one that is alone gets everything. A tenant's own requests are served in order of arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from llama.engine.request import Request

PROMPT_TOKEN_COST = 1.0
GENERATED_TOKEN_COST = 2.0
"""A generated token occupies the engine longer than one of a prompt (ibid., §4.1)."""
MAX_COUNTERS = 4096
"""Tenants remembered while they have nothing to do; beyond it the one served least is forgotten."""


class _Level:
    """The waiting requests of one priority."""

    def __init__(self) -> None:
        self.preempted: deque[Request] = deque()
        """In order of their first admission."""
        self.fresh: dict[str, deque[Request]] = {}
        """By tenant, in order of arrival; no tenant without requests."""


class WaitingQueue:
    """Requests that wait, those that were preempted included."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._served: dict[str, float] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """In the order of admission as it is now; the queue must not change meanwhile."""
        for priority in sorted(self._levels):
            level = self._levels[priority]
            yield from level.preempted
            for tenant in sorted(level.fresh, key=lambda tenant: self._order(level, tenant)):
                yield from level.fresh[tenant]

    def _order(self, level: _Level, tenant: str) -> tuple[float, int]:
        return self._served.get(tenant, 0.0), level.fresh[tenant][0].arrival

    def append(self, request: Request) -> None:
        """A new request, behind the others of its tenant."""
        waiting = {tenant for level in self._levels.values() for tenant in level.fresh}
        if waiting and request.salt not in waiting:
            least = min(self._served.get(tenant, 0.0) for tenant in waiting)
            self._served[request.salt] = max(self._served.get(request.salt, 0.0), least)
        level = self._levels.setdefault(request.priority, _Level())
        level.fresh.setdefault(request.salt, deque()).append(request)
        self._length += 1

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
            own = level.fresh[request.salt]
            own.remove(request)
            if not own:
                del level.fresh[request.salt]
        if not level.preempted and not level.fresh:
            del self._levels[request.priority]
        self._length -= 1

    def charge(self, tenant: str, *, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        """Books work done for a tenant."""
        cost = PROMPT_TOKEN_COST * prompt_tokens + GENERATED_TOKEN_COST * generated_tokens
        self._served[tenant] = self._served.get(tenant, 0.0) + cost
        if len(self._served) > MAX_COUNTERS:
            waiting = {tenant for level in self._levels.values() for tenant in level.fresh}
            idle = [name for name in self._served if name not in waiting and name != tenant]
            if idle:
                del self._served[min(idle, key=self._served.__getitem__)]

    def forget_service(self) -> None:
        """Nobody runs and nobody waits: old service is no reason to wait any more."""
        self._served.clear()
