"""Which tokens of which requests the next step computes.

One token budget a step. Every running request that decodes gets its token first; what is left goes to prefills, in
order, cut into chunks where the budget ends; then to new requests, in the order of the queue (llama/engine/queue.py),
as long as the cache has room for their whole prompt. The order of the running is priority, then first admission. When
one needs a block and none is free, the last of them gives its blocks back and is computed again later (most of it often
from the cache); a waiting request makes room for itself in the same way, but only among those of lower priority.

A prompt whose next missing block is being computed for another request of no lower priority waits for it: equal
prefixes are computed once.

Attention to many keys costs, so a token deep in a long prompt takes more of the budget than one at its beginning, and
its chunk is shorter: a step takes about as long as any other, and the tokens of the others come as steadily.

Why nothing starves: the first of the running is preempted by nobody but a higher priority, who waits for another's
blocks waits only while that one runs and is not behind it, and a request that cannot fit into the empty cache is
refused at the door. A lower priority waits as long as there is work of a higher one. Pure Python: no tensors, no clock,
no locks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from llama.engine.blocks import BlockManager, BlockTable
from llama.engine.prefix import reusable_blocks
from llama.engine.queue import WaitingQueue
from llama.engine.request import Request, Status

LEAST_CHUNK_SHARE = 32
"""A chunk is at least this part of a whole budget, as far as there is that much left."""


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
        max_running: requests that run at once; never more than the budget either.
        max_waiting: length of the queue at which new requests are refused; preempted ones wait in it too.
        half_context: the context length at which attending to it costs as much as all else that a token needs.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batched_tokens: int,
        max_running: int,
        max_waiting: int,
        half_context: float = math.inf,
    ) -> None:
        self.blocks = blocks
        self.max_batched_tokens = max_batched_tokens
        self.max_running = min(max_running, max_batched_tokens)
        self.max_waiting = max_waiting
        self.half_context = half_context
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        """By priority, then first admission."""
        self.only_started = False
        """Admit nobody whose prompt's first completion has not been admitted already."""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        """Of requests admitted so far, each counted once; so is the next."""
        self.num_cached_tokens = 0
        self.num_waits_for_prefix = 0
        """Requests that waited for a prefix that another one computed."""
        self._arrivals = 0
        self._admissions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def tables(self) -> Iterable[BlockTable]:
        """The tables of all requests."""
        return [request.table for request in chain(self.running, self.waiting)]

    @property
    def started(self) -> bool:
        """Whether there is a request that has been admitted, or belongs to one that has."""
        return bool(self.running) or any(request.started for request in self.waiting)

    def add(self, requests: Sequence[Request]) -> None:
        """Queues the requests of one prompt, all or none.

        Raises:
            QueueFull: the queue is at its limit.
        """
        if len(self.waiting) + len(requests) > self.max_waiting:
            raise QueueFull(
                f"{len(self.waiting)} requests are waiting already (max_waiting={self.max_waiting}); try again later"
            )
        for request in requests:
            self._arrivals += 1
            request.arrival = self._arrivals
            self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Takes a waiting or running request out; its blocks are free or reusable at once."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        self.blocks.release(request.table)
        if not self.has_work:
            self.waiting.forget_service()

    def schedule(self) -> list[ScheduledTokens]:
        """The next step: one-token decodes first, then prefill chunks.

        Empty only without requests, or with `only_started` when nobody has started.
        """
        self._make_way()
        scheduled: list[ScheduledTokens] = []
        for request in list(self.running):
            if request.status is Status.RUNNING and request.decoding:
                self._append(scheduled, request, 1)
        budget = float(self.max_batched_tokens - len(scheduled))
        computing = self._computing()
        for request in list(self.running):
            if request.status is not Status.RUNNING or request.decoding:
                continue
            budget = self._admit_all(scheduled, budget, computing, before=request.priority)
            budget = self._schedule_chunk(scheduled, request, budget)
        self._admit_all(scheduled, budget, computing)
        return scheduled

    def commit(self, scheduled: ScheduledTokens) -> None:
        """The step has computed these tokens. The request must still be running."""
        request = scheduled.request
        request.num_computed = scheduled.end
        self.blocks.commit(request.table, request.token_ids, request.num_computed)
        if scheduled.samples:
            self.waiting.charge(request.salt, generated_tokens=1)

    def _append(self, scheduled: list[ScheduledTokens], request: Request, count: int) -> bool:
        """Schedules a running request's next tokens, preempting the last of the running until they have room."""
        start, end = request.num_computed, request.num_computed + count
        while not self.blocks.make_room(request.table, start, end):
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
            scheduled[:] = [item for item in scheduled if item.request is not last]
        scheduled.append(ScheduledTokens(request, start, end))
        return True

    def _schedule_chunk(self, scheduled: list[ScheduledTokens], request: Request, budget: float) -> float:
        """Schedules as much of a prefill as the budget allows; returns what is left of it."""
        if budget < 1:
            return 0.0
        cost = self._token_cost(request.num_computed)
        # A small rest of a budget would be almost nothing here, and the prompt would take for ever.
        least = min(int(budget), max(1, self.max_batched_tokens // LEAST_CHUNK_SHARE))
        count = min(max(least, int(budget / cost)), request.num_missing)
        if not self._append(scheduled, request, count):
            return budget
        return max(0.0, budget - cost * count)

    def _token_cost(self, start: int) -> float:
        """Of a token of a chunk that begins at `start`, in tokens of the first chunk of a prompt."""
        beyond = max(0, start - self.max_batched_tokens)
        return 1 + beyond / (self.half_context + self.max_batched_tokens)

    def _computing(self) -> dict[bytes, int]:
        """Hashes of the blocks that running prefills will have computed, and the first priority of these prefills."""
        computing: dict[bytes, int] = {}
        if self.waiting:
            for request in reversed(self.running):
                self._add_missing(computing, request)
        return computing

    @staticmethod
    def _add_missing(computing: dict[bytes, int], request: Request) -> None:
        if not request.decoding and request.table.indexable:
            computing.update(dict.fromkeys(request.table.hashes[request.table.num_indexed :], request.priority))

    def _admit_all(
        self, scheduled: list[ScheduledTokens], budget: float, computing: dict[bytes, int], before: int | None = None
    ) -> float:
        """Starts waiting requests, of a priority before `before` only, while there is budget; returns what is left."""
        while budget >= 1 and (request := self._admit(computing, before)) is not None:
            self._add_missing(computing, request)
            budget = self._schedule_chunk(scheduled, request, budget)
        return budget

    def _admit(self, computing: dict[bytes, int], before: int | None) -> Request | None:
        """Starts the first waiting request that need not wait for a prefix, if it fits."""
        if len(self.running) >= self.max_running:
            return None
        found = self._next(computing, before)
        if found is None:
            return None
        request, matched = found
        # A block for each running request's growth: without it, admitting means preempting a few steps later, and
        # whoever was just preempted would come back at once.
        cached = self._reserve(request, matched, headroom=len(self.running))
        if cached is not None:
            self._start(request, cached)
        return request if cached is not None else None

    def _next(self, computing: dict[bytes, int], before: int | None) -> tuple[Request, list[int]] | None:
        """The first waiting request that waits for nothing but room, and the cached blocks that it begins with."""
        for request in self.waiting.before(before):
            if self._must_wait(request) or self._will_get(request, request.awaited, computing):
                continue
            matched = self._matched(request)
            if not self._waits_for_prefix(request, len(matched), computing):
                return request, matched
        return None

    def _must_wait(self, request: Request) -> bool:
        """For the weights to come, or for the first completion of the same prompt to have computed it."""
        if self.only_started and not request.started:
            return True
        first = request.first
        if first is None or first.status is Status.FINISHED:
            return False
        return first.status is Status.WAITING or first.num_computed < first.num_prompt_tokens

    def _matched(self, request: Request) -> list[int]:
        return [] if request.scores_prompt else self.blocks.match(request.table, request.token_ids)

    @staticmethod
    def _will_get(request: Request, block_hash: bytes | None, computing: dict[bytes, int]) -> bool:
        """Whether another one computes the block. Not one of a lower priority, which may not come to it for long."""
        return block_hash is not None and computing.get(block_hash, math.inf) <= request.priority

    def _waits_for_prefix(self, request: Request, num_matched: int, computing: dict[bytes, int]) -> bool:
        """Whether another one computes the block that this one misses; remembers the last such block."""
        if request.scores_prompt:
            return False  # no use to it
        position, last = num_matched, None
        hashes = request.table.hashes
        most = reusable_blocks(len(request.token_ids), self.blocks.block_size)
        while position < most and self._will_get(request, hashes[position], computing):
            last = hashes[position]
            position += 1
        if last is not None and request.awaited is None:
            self.num_waits_for_prefix += 1
        request.awaited = last
        return last is not None

    def _reserve(self, request: Request, matched: list[int], headroom: int) -> int | None:
        first = request.first
        if (
            first is not None
            and first.status is Status.RUNNING
            and not request.num_generated
            and self.blocks.num_free > headroom
            and self.blocks.fork(first.table, request.table, request.num_prompt_tokens)
        ):
            return request.num_prompt_tokens - 1
        return self.blocks.reserve(request.table, request.token_ids, matched=matched, headroom=headroom)

    def _start(self, request: Request, cached: int) -> None:
        self.waiting.remove(request)
        request.status = Status.RUNNING
        request.num_computed = cached
        if request.admission is None:
            self._admissions += 1
            request.admission = self._admissions
            request.num_cached_tokens = cached
            self.num_prompt_tokens += request.num_prompt_tokens
            self.num_cached_tokens += cached
            self.waiting.charge(request.salt, prompt_tokens=request.num_prompt_tokens - cached)
        self.running.append(request)
        self.running.sort(key=Request.order)

    def _make_way(self) -> None:
        """Preempts from behind until the first waiting request fits, if those of lower priority can make it fit."""
        if not self.running:
            return
        found = self._next(self._computing(), before=self.running[-1].priority)
        if found is None:
            return
        request, matched = found
        lower = [other for other in self.running if other.priority > request.priority]
        remaining = len(self.running) - len(lower)
        if remaining >= self.max_running or not self.blocks.fits(
            len(request.token_ids), matched, headroom=remaining, without=[other.table for other in lower]
        ):
            return
        while len(self.running) >= self.max_running or not self.blocks.fits(
            len(request.token_ids), matched, headroom=len(self.running)
        ):
            self._preempt(lower.pop())

    def _preempt(self, request: Request) -> None:
        self.blocks.release(request.table)
        self.running.remove(request)
        request.status = Status.WAITING
        request.num_computed = 0
        self.waiting.put_back(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
