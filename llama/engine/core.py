"""The engine's books: requests in, steps out, tokens back in. No tensors, no threads, no locks, no clock of its own.

The engine (llama/engine/engine.py) puts a model, locks and a thread around it, the simulation
(llama/engine/simulation.py) virtual time. A step is `schedule`, the model's run, `commit`, `hand_out`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import count

from llama.engine.blocks import BlockManager, BlockTable
from llama.engine.config import EngineConfig, EngineStats
from llama.engine.constraint import Constraint
from llama.engine.output import ActiveRequest, Sink
from llama.engine.params import SamplingParams
from llama.engine.prefix import generation_root, reusable_blocks
from llama.engine.request import Chunk, ComputedTokens, FinishReason, Request, Status
from llama.engine.scheduler import ScheduledTokens, Scheduler
from llama.engine.text import OutputText, TextTokenizer


class EngineCore:
    """Owns the scheduler, the blocks and the unfinished requests.

    Args:
        max_seq_len: the model's context, tokens.
        window: how far back its layers see at most; None when one of them sees everything.
        half_context: see `Scheduler`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_seq_len: int,
        tokenizer: TextTokenizer | None = None,
        weights_id: str = "",
        window: int | None = None,
        half_context: float = float("inf"),
    ) -> None:
        self.weights_id = weights_id
        self.blocks = BlockManager(num_blocks, config.block_size, window=window, max_chunk=config.max_batched_tokens)
        self.scheduler = Scheduler(
            self.blocks,
            max_batched_tokens=config.max_batched_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            half_context=half_context,
        )
        self.max_total_tokens = min(max_seq_len, self.blocks.max_tokens or max_seq_len)
        self.outbox: list[Chunk] = []
        """Chunks of requests without a sink."""
        self._tokenizer = tokenizer
        self._active: dict[str, list[ActiveRequest]] = {}
        """By id, one entry for each of its completions; until the last of them is handed out."""
        self._deadlines: list[tuple[float, int, ActiveRequest]] = []
        """A heap; finished requests stay in it until their deadline or until they are most of it."""
        self._ties = count()
        self._names = count()
        self.generated_tokens = 0
        self._now = 0.0
        self._timeouts = 0
        self._swaps = 0

    # Requests.

    def prepare(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None,
        salt: str,
        priority: int,
        deadline: float,
        sink: Sink | None,
        constraint: Constraint | None = None,
        arrived: float = 0.0,
    ) -> list[ActiveRequest]:
        """The completions of a valid prompt, not queued yet; needs no lock."""
        if request_id is None:
            made = (f"request-{number}" for number in self._names)
            request_id = next(name for name in made if name not in self._active)  # a caller may have chosen such a name
        active: list[ActiveRequest] = []
        for index in range(params.n):
            table = BlockTable(generation_root(self.weights_id, "", salt))
            if active:
                table.hashes = list(active[0].request.table.hashes)
            self.blocks.extend_hashes(table, prompt)
            request = Request(
                request_id,
                params,
                list(prompt),
                table,
                self.max_total_tokens,
                priority=priority,
                salt=salt,
                deadline=deadline,
                index=index,
                first=active[0].request if active else None,
                constraint=constraint.fork() if constraint is not None else None,
                arrived=arrived,
            )
            text = OutputText(self._tokenizer, params.stop) if self._tokenizer is not None else None
            active.append(ActiveRequest(request, text, sink))
        return active

    def submit(self, active: list[ActiveRequest]) -> None:
        """Queues the completions of one prompt.

        Raises:
            ValueError: the id is taken.
            QueueFull: too many wait; none of them is queued.
        """
        request_id = active[0].request.request_id
        if request_id in self._active:
            raise ValueError(f"request_id={request_id!r} is in use; choose another or None")
        for member in active:
            self._reroot(member.request)  # the weights may have changed since `prepare`
        first = active[0].request
        first.found_cached = self._num_cached(first)
        self.scheduler.add([member.request for member in active])
        self._active[request_id] = active
        for member in active:
            if member.request.deadline != float("inf"):
                heapq.heappush(self._deadlines, (member.request.deadline, next(self._ties), member))

    def _num_cached(self, request: Request) -> int:
        if request.scores_prompt:
            return 0  # it computes them all the same
        reusable = reusable_blocks(request.num_prompt_tokens, self.blocks.block_size)
        return self.blocks.num_cached(request.table.hashes[:reusable]) * self.blocks.block_size

    def abort(self, request_id: str) -> None:
        """Ends all completions of a request; unknown and finished ids are ignored."""
        self.end(self._active.get(request_id, ()), "abort")

    def abort_all(self) -> None:
        for active in list(self._active.values()):
            self.end(active, "abort")

    def end(self, active: Iterable[ActiveRequest], reason: FinishReason) -> None:
        """Finishes what is unfinished of `active`, with the text that was held back."""
        for member in list(active):
            if member.request.status is not Status.FINISHED:
                self.scheduler.finish(member.request)
                self._deliver(member, member.chunk([], member.rest(), reason, None, self.blocks.event_seq))

    def expire(self, now: float) -> None:
        """Ends requests whose deadline has come, with the reason "timeout". Tells the books the time of the step."""
        self._now = now
        while self._deadlines and self._deadlines[0][0] <= now:
            member = heapq.heappop(self._deadlines)[2]
            self._timeouts += member.request.status is not Status.FINISHED
            self.end([member], "timeout")
        if len(self._deadlines) > 64 + 2 * (len(self.scheduler.waiting) + len(self.scheduler.running)):
            self._deadlines = [entry for entry in self._deadlines if entry[2].request.status is not Status.FINISHED]
            heapq.heapify(self._deadlines)

    def forget_all(self) -> list[ActiveRequest]:
        """Empties the table of requests, whose fate is no longer known; returns them."""
        everyone = [member for active in self._active.values() for member in active]
        self._active.clear()
        return everyone

    # Steps.

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._tokenizer.eos_ids if self._tokenizer is not None else frozenset()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def schedule(self) -> list[ScheduledTokens]:
        """What the next step computes; empty only when there is nothing, or only what waits for new weights.

        The blocks of `BlockManager.take_copies` are to be copied before.
        """
        scheduled = self.scheduler.schedule()
        if not scheduled and self.has_work and not self.scheduler.only_started:
            raise RuntimeError("requests wait and none can be scheduled: a defect of the scheduler")
        for item in scheduled:
            item.request.num_steps += 1
            if item.request.first_scheduled is None:
                item.request.first_scheduled = self._now
        return scheduled

    def commit(
        self, scheduled: Sequence[ScheduledTokens], computed: Sequence[ComputedTokens]
    ) -> list[tuple[ActiveRequest, Chunk]]:
        """Books what the step computed of each scheduled part."""
        outputs: list[tuple[ActiveRequest, Chunk]] = []
        for item, result in zip(scheduled, computed, strict=True):
            if item.request.status is not Status.RUNNING:
                continue  # aborted while the model ran
            self.scheduler.commit(item)
            item.request.prompt_logprobs += result.prompt_logprobs
            if result.token_id is None:
                continue
            active = self._active[item.request.request_id][item.request.index]
            token_ids, text, reason = active.accept(result.token_id, self.eos_ids)
            self.generated_tokens += len(token_ids)
            if reason is not None:
                self.scheduler.finish(item.request)
            outputs.append((active, active.chunk(token_ids, text, reason, result.logprob, 0)))
        for _, chunk in outputs:
            chunk.event_seq = self.blocks.event_seq
        return outputs

    def hand_out(self, outputs: Iterable[tuple[ActiveRequest, Chunk]]) -> None:
        for active, chunk in outputs:
            self._deliver(active, chunk)

    def _deliver(self, active: ActiveRequest, chunk: Chunk) -> None:
        if active.delivered:
            return  # ended since the chunk was made
        if chunk.finish_reason is not None:
            active.delivered = True
            chunk.timing = active.request.timing(self._now)
            if all(member.delivered for member in self._active[chunk.request_id]):
                del self._active[chunk.request_id]
        if active.sink is None:
            self.outbox.append(chunk)
        else:
            active.sink(chunk)

    # Weights.

    def hold_new(self) -> None:
        """Until `swap`, requests that have not begun wait."""
        self.scheduler.only_started = True

    @property
    def may_swap(self) -> bool:
        """Whether no unfinished request has begun with the present weights."""
        return not self.scheduler.started

    def swap(self, weights_id: str) -> None:
        """From here on requests run with other weights: nothing cached before can be found any more."""
        assert self.may_swap
        self.weights_id = weights_id
        self.scheduler.only_started = False
        self._swaps += 1
        self.blocks.clear([])
        for request in self.scheduler.waiting:
            self._reroot(request)

    def _reroot(self, request: Request) -> None:
        root = generation_root(self.weights_id, "", request.salt)
        if request.table.root != root:
            request.table = BlockTable(root)
            request.awaited = None
            request.found_cached = 0

    # Reports.

    def stats(self) -> EngineStats:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        return EngineStats(
            running=len(running),
            waiting=len(waiting),
            num_blocks=self.blocks.num_blocks,
            free_blocks=self.blocks.num_free,
            # Of the completions of a prompt the first one computes it for all.
            pending_prefill_tokens=sum(
                request.num_missing - request.found_cached if request.first is None else 1 for request in waiting
            )
            + sum(request.num_missing for request in running if not request.decoding),
            decode_context_tokens=sum(len(request.token_ids) for request in running if request.decoding),
            generated_tokens=self.generated_tokens,
            prompt_tokens=self.scheduler.num_prompt_tokens,
            cached_tokens=self.scheduler.num_cached_tokens,
            preemptions=self.scheduler.num_preemptions,
            prefix_waits=self.scheduler.num_waits_for_prefix,
            block_copies=self.blocks.num_copies,
            timeouts=self._timeouts,
            weight_swaps=self._swaps,
        )

    def check_integrity(self) -> None:
        """Raises CacheCorrupted when the books contradict themselves."""
        self.blocks.check_integrity(self.scheduler.tables)
