"""Which tokens of which requests the next step computes.

One token budget a step. Every running request that decodes gets its token first; what is left goes to prefills,
oldest first, cut into chunks where the budget ends; then to new requests, in order of arrival, as long as the cache
has room for their whole prompt. When a decoding request needs a block and none is free, the newest running request
gives its blocks back and is computed again later (most of it often from the cache).

Why nothing starves: order is by arrival everywhere, the oldest running request is preempted by nobody, and a request
that cannot fit into the empty cache is refused at the door. Pure Python: no tensors, no clock, no locks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from llama.engine.blocks import BlockManager, BlockTable
from llama.engine.request import Request, Status


class QueueFull(RuntimeError):
    """`max_waiting` requests wait already; try again later."""


@dataclass(frozen=True)
class ScheduledTokens:
    """Compute tokens `[start, end)` of a request."""

    request: Request
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether this reaches the request's last token, so that the next one can be sampled."""
        return self.end == len(self.request.token_ids)


class Scheduler:
    """Owns the waiting and running requests and their block tables.

    Args:
        max_batched_tokens: the budget of a step.
        max_running: requests that run at once; never more than the budget either, since one is admitted only while
            tokens are left after all others had theirs.
        max_waiting: length of the queue at which new requests are refused; preempted ones wait in it too.
    """

    def __init__(self, blocks: BlockManager, *, max_batched_tokens: int, max_running: int, max_waiting: int) -> None:
        self.blocks = blocks
        self.max_batched_tokens = max_batched_tokens
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.waiting: deque[Request] = deque()
        """In order of arrival; preempted requests are older than the others and stand before them."""
        self.running: list[Request] = []
        """In order of arrival."""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        """Of requests admitted so far, each counted once; so is the next."""
        self.num_cached_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def tables(self) -> Iterable[BlockTable]:
        """The tables of all requests."""
        return [request.table for request in chain(self.running, self.waiting)]

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            QueueFull: the queue is at its limit.
        """
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull(
                f"{len(self.waiting)} requests are waiting already (max_waiting={self.max_waiting}); try again later"
            )
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Takes a waiting or running request out; its blocks are free or reusable at once."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        self.blocks.release(request.table)

    def schedule(self) -> list[ScheduledTokens]:
        """The next step: one-token decodes first, then prefill chunks. Empty only without requests."""
        scheduled = self._schedule_decodes()
        budget = self.max_batched_tokens - len(scheduled)
        for request in self.running:
            if budget and not request.decoding:
                budget -= self._append(scheduled, request, budget)
        while budget and self._admit():
            budget -= self._append(scheduled, self.running[-1], budget)
        return scheduled

    def commit(self, scheduled: ScheduledTokens) -> None:
        """The step has computed these tokens. The request must still be running."""
        request = scheduled.request
        request.num_computed = scheduled.end
        self.blocks.commit(request.table, request.token_ids, request.num_computed)

    def _schedule_decodes(self) -> list[ScheduledTokens]:
        scheduled: list[ScheduledTokens] = []
        for request in list(self.running):
            if request.status is not Status.RUNNING or not request.decoding:
                continue
            while not self.blocks.grow(request.table, len(request.token_ids)):
                newest = self.running[-1]
                self._preempt(newest)
                if newest is request:
                    break
            else:
                self._append(scheduled, request, 1)
        return scheduled

    @staticmethod
    def _append(scheduled: list[ScheduledTokens], request: Request, budget: int) -> int:
        count = min(budget, request.num_missing)
        scheduled.append(ScheduledTokens(request, request.num_computed, request.num_computed + count))
        return count

    def _admit(self) -> bool:
        """Starts the oldest waiting request if it fits."""
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        request = self.waiting[0]
        # A block for each running request's growth: without it, admitting means preempting a few steps later, and
        # whoever was just preempted would come back at once.
        cached = self.blocks.reserve(request.table, request.token_ids, headroom=len(self.running))
        if cached is None:
            return False
        self.waiting.popleft()
        self.running.append(request)
        request.status = Status.RUNNING
        request.num_computed = cached
        if request.num_cached_tokens is None:
            request.num_cached_tokens = cached
            self.num_prompt_tokens += request.num_prompt_tokens
            self.num_cached_tokens += cached
        return True

    def _preempt(self, request: Request) -> None:
        self.blocks.release(request.table)
        self.running.remove(request)
        request.status = Status.WAITING
        request.num_computed = 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1
