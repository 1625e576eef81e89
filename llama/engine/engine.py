"""The inference engine: continuous batching over a paged cache, without Ray.

Ownership. Two locks, always taken in this order:

    _step_lock   one step at a time. Its holder, the step thread or whoever calls `step` or `generate`, alone runs the
                 model, writes the cache tensors, appends to `Request.token_ids` and calls `schedule` and `commit`.
    _lock        the scheduler, the block manager, `_active`, `_outbox` and the counters. Held for bookkeeping only,
                 never while the model runs, so that `add_request`, `abort`, `stats`, `snapshot` and `flush_cache`
                 answer at once on any thread (the asyncio one above all).

A step copies its inputs under `_lock`, runs the model without it, and takes it again to commit. A request aborted in
between is recognised by its status; its blocks are not given to another before the next `schedule`.
"""

from __future__ import annotations

import asyncio
import logging
import operator
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from itertools import count

from llama.engine.blocks import BlockEvent, BlockManager, BlockTable, CacheSnapshot, generation_root
from llama.engine.config import EngineConfig, EngineStats, check_cacheable
from llama.engine.output import ActiveRequest, Collector, EngineFailed, Sink
from llama.engine.params import SamplingParams
from llama.engine.request import Chunk, Completion, PromptTooLong, Request, Status
from llama.engine.runner import ModelRunner, SampledToken
from llama.engine.scheduler import QueueFull, ScheduledTokens, Scheduler
from llama.engine.text import OutputText, TextTokenizer
from llama.model import Transformer

logger = logging.getLogger(__name__)


class EngineClosed(RuntimeError):
    """`close` was called."""


class Engine:
    """Generates text with one model, for many requests at once.

    Use it in one of three ways, or mixed: `generate` for a list of prompts; `stream` for one request at a time under
    asyncio, computed by a background thread; `add_request` and `step` to drive it by hand.

    Args:
        model: on the device and in the dtype to compute in; put in evaluation mode. It must not change meanwhile.
        tokenizer: None when prompts are token ids and no text is wanted.
        weights_id: names the weights; blocks cached under another name are never reused.

    Raises:
        ValueError: the model's keys depend on the length of their sequence, so that they cannot be cached.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextTokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        weights_id: str = "",
    ) -> None:
        check_cacheable(model.config)
        self.config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.weights_id = weights_id
        self.on_events: Callable[[], None] | None = None
        """Called after a step or a flush that produced block events, before any chunk of that step is handed out,
        on the thread that made them and without a lock held."""
        self._vocab_size = model.config.vocab_size
        self._max_seq_len = model.config.max_seq_len
        self._runner = ModelRunner(model, num_blocks=self.config.num_blocks, block_size=self.config.block_size)
        self._blocks = BlockManager(self.config.num_blocks, self.config.block_size)
        self._scheduler = Scheduler(
            self._blocks,
            max_batched_tokens=self.config.max_batched_tokens,
            max_running=self.config.max_running,
            max_waiting=self.config.max_waiting,
        )
        self._active: dict[str, ActiveRequest] = {}
        self._outbox: list[Chunk] = []
        self._generated_tokens = 0
        self._names = count()
        self._failure: BaseException | None = None
        self._closed = False
        self._interruptible = False
        """The model runs: the books are whole, and say that this step is not done."""
        self._thread: threading.Thread | None = None
        self._step_lock = threading.Lock()
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)

    # Requests in.

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, which may be token ids already.

        Raises:
            ValueError: text was given and the engine has no tokenizer.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError(f"prompt={prompt!r} is text and the engine has no tokenizer; give token ids")
        return self.tokenizer.encode(prompt)

    def add_request(
        self, token_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None, salt: str = ""
    ) -> str:
        """Queues a request whose chunks `step` will return; returns its id.

        Args:
            request_id: unique among unfinished requests; None makes one.
            salt: requests of different salts share no cached block.

        Raises:
            ValueError: the prompt is empty or holds no token id, or the id is taken.
            PromptTooLong: it fits the context or the cache at no time.
            QueueFull: too many requests wait.
            EngineFailed, EngineClosed: it takes no more requests.
        """
        return self._submit(self._checked_prompt(token_ids, params), params, request_id, salt, None).request.request_id

    def _checked_prompt(self, token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        checked: list[int] = []
        for position, token_id in enumerate(token_ids):
            try:
                value = operator.index(token_id)
            except TypeError:
                value = -1
            if not 0 <= value < self._vocab_size:
                raise ValueError(f"prompt[{position}]={token_id!r} is not a token id in [0, {self._vocab_size})")
            checked.append(value)
        if not checked:
            raise ValueError("prompt is empty; give at least one token")
        if len(checked) + 1 > self._max_seq_len:
            raise PromptTooLong(
                f"the prompt has {len(checked)} tokens; with at least 1 generated it exceeds the model's context of "
                f"{self._max_seq_len} tokens, shorten it"
            )
        if len(checked) + 1 > self._capacity:
            raise PromptTooLong(
                f"the prompt has {len(checked)} tokens; with at least 1 generated it exceeds the cache of "
                f"engine.num_blocks={self.config.num_blocks} × engine.block_size={self.config.block_size} tokens, "
                "shorten it or enlarge the cache"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer; use stop_token_ids")
        if params.logprobs is not None and params.logprobs > self._vocab_size:
            raise ValueError(f"logprobs={params.logprobs} exceeds the vocabulary of {self._vocab_size}")
        return checked

    @property
    def _capacity(self) -> int:
        return self.config.num_blocks * self.config.block_size

    def _submit(
        self, token_ids: list[int], params: SamplingParams, request_id: str | None, salt: str, sink: Sink | None
    ) -> ActiveRequest:
        if request_id is None:
            request_id = f"request-{next(self._names)}"
        table = BlockTable(generation_root(self.weights_id, "", salt))
        self._blocks.extend_hashes(table, token_ids)
        request = Request(request_id, params, token_ids, table, min(self._max_seq_len, self._capacity))
        text = OutputText(self.tokenizer, params.stop) if self.tokenizer is not None else None
        active = ActiveRequest(request, text, sink)
        with self._lock:
            self._check_open()
            if request_id in self._active:
                raise ValueError(f"request_id={request_id!r} is in use; choose another or None")
            self._scheduler.add(request)
            self._active[request_id] = active
            self._work.notify_all()
        return active

    def abort(self, request_id: str) -> None:
        """Ends a request with `finish_reason="abort"`, whatever its state; unknown and finished ids are ignored."""
        with self._lock:
            active = self._active.get(request_id)
            if active is not None and active.request.status is not Status.FINISHED:
                self._abort(active)

    def _abort(self, active: ActiveRequest) -> None:
        self._scheduler.finish(active.request)
        self._hand_out(active, active.chunk([], "", "abort", None, self._blocks.event_seq))

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineFailed(f"the engine has failed: {self._failure!r}") from self._failure
        if self._closed:
            raise EngineClosed("the engine is closed")

    # Steps.

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to return."""
        with self._lock:
            return self._failure is None and (self._scheduler.has_work or bool(self._outbox))

    def step(self) -> list[Chunk]:
        """Computes one step; returns what there is for requests made with `add_request`.

        Raises:
            EngineFailed: an earlier step raised. What this step raises itself goes through as it is.
            KeyboardInterrupt: likewise; the engine goes on if it came while the model ran, as it nearly always does.
        """
        self._step()
        with self._lock:
            chunks, self._outbox = self._outbox, []
        return chunks

    def _step(self) -> None:
        with self._step_lock:
            with self._lock:
                self._check_open()
            self._interruptible = False
            try:
                self._compute_step()
            except BaseException as error:
                # An interrupted model run is done again. An interrupt elsewhere may leave books half written, and one
                # in the step thread leaves nobody to go on.
                in_thread = threading.current_thread() is self._thread
                if isinstance(error, Exception) or in_thread or not self._interruptible:
                    self._fail(error)
                raise

    def _compute_step(self) -> None:
        with self._lock:
            first_seq = self._blocks.event_seq
            scheduled = self._scheduler.schedule()
            if not scheduled:
                if self._scheduler.has_work:
                    raise RuntimeError("requests wait and none can be scheduled: a defect of the scheduler")
                return
            inputs = self._runner.prepare(scheduled)
        self._interruptible = True
        tokens = self._runner.run(inputs)
        self._interruptible = False
        with self._lock:
            outputs = self._commit(scheduled, tokens)
            produced_events = self._blocks.event_seq != first_seq
        # Before the chunks: who reads a finish_reason may rely on the events of that request.
        if produced_events and self.on_events is not None:
            self.on_events()
        with self._lock:
            for active, chunk in outputs:
                self._hand_out(active, chunk)

    def _commit(
        self, scheduled: Sequence[ScheduledTokens], tokens: Sequence[SampledToken]
    ) -> list[tuple[ActiveRequest, Chunk]]:
        """Books what the step computed; `tokens` are those of the scheduled parts that sample, in order."""
        remaining = iter(tokens)
        outputs: list[tuple[ActiveRequest, Chunk]] = []
        for item in scheduled:
            token = next(remaining) if item.samples else None
            if item.request.status is not Status.RUNNING:
                continue  # aborted while the model ran
            self._scheduler.commit(item)
            if token is None:
                continue
            active = self._active[item.request.request_id]
            text, reason = active.accept(
                token.token_id, self.tokenizer.eos_ids if self.tokenizer is not None else frozenset()
            )
            self._generated_tokens += 1
            if reason is not None:
                self._scheduler.finish(item.request)
            outputs.append((active, active.chunk([token.token_id], text, reason, token.logprob, 0)))
        for _, chunk in outputs:
            chunk.event_seq = self._blocks.event_seq
        return outputs

    def _hand_out(self, active: ActiveRequest, chunk: Chunk) -> None:
        if self._active.get(chunk.request_id) is not active:
            return  # aborted since the chunk was made
        if chunk.finish_reason is not None:
            del self._active[chunk.request_id]
        if active.sink is None:
            self._outbox.append(chunk)
        else:
            active.sink(chunk)

    def _fail(self, error: BaseException) -> None:
        """No stream may wait for ever on a step thread that died: each gets the error."""
        logger.error("the engine's step failed", exc_info=error)
        with self._lock:
            self._failure = error
            for active in self._active.values():
                if active.sink is not None:
                    failure = EngineFailed(f"the engine has failed: {error!r}")
                    failure.__cause__ = error
                    active.sink(failure)
            self._active.clear()
            self._work.notify_all()

    # Whole prompts, offline.

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """Completes every prompt with the same parameters; returns the completions in order.

        Raises:
            ValueError: as `add_request`, before anything is computed.
            EngineFailed: a step raised in another thread.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r} is one string; give a list of prompts")
        checked = [self._checked_prompt(self.encode(prompt), params) for prompt in prompts]
        collectors = [Collector(list(token_ids), params) for token_ids in checked]
        pending = deque(zip(checked, collectors, strict=True))
        running: list[tuple[ActiveRequest, Collector]] = []
        try:
            while pending or running:
                # The queue limit protects a server; here it only paces the submission.
                with suppress(QueueFull):
                    while pending:
                        token_ids, collector = pending[0]
                        running.append((self._submit(token_ids, params, None, "", collector), collector))
                        pending.popleft()
                self._step()
                running = [entry for entry in running if not entry[1].finished]
        finally:
            for active, _ in running:
                self.abort(active.request.request_id)
        return [collector.completion for collector in collectors]

    # One request at a time, under asyncio.

    async def stream(
        self, prompt: str | Sequence[int], params: SamplingParams, *, request_id: str | None = None, salt: str = ""
    ) -> AsyncIterator[Chunk]:
        """Yields a request's chunks as they are computed. Closing the iterator or cancelling its task aborts it.

        Raises:
            As `add_request`, at the first iteration; EngineFailed at any, when a step raises.
        """
        token_ids = self._checked_prompt(self.encode(prompt), params)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Chunk | EngineFailed] = asyncio.Queue()

        def sink(item: Chunk | EngineFailed) -> None:
            # A closed loop listens no more; the request ends by its own limits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, item)

        active = self._submit(token_ids, params, request_id, salt, sink)
        try:
            self._ensure_thread()
            while True:
                item = await queue.get()
                if isinstance(item, EngineFailed):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            with self._lock:
                # By identity: the id may be in use again.
                if active.request.status is not Status.FINISHED and self._failure is None:
                    self._abort(active)

    def _ensure_thread(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._closed and self._failure is None and not self._scheduler.has_work:
                    self._work.wait()
                if self._closed or self._failure is not None:
                    return
            try:
                self._step()
            except BaseException:
                return  # `_fail` has told every stream, and the log

    # The cache and its events.

    def flush_cache(self) -> None:
        """Forgets every reusable block. Running requests go on with theirs, which nobody else can reuse any more."""
        with self._lock:
            self._blocks.clear(self._scheduler.tables)
        if self.on_events is not None:
            self.on_events()

    def drain_events(self) -> list[BlockEvent]:
        """Block events since the last call. A gap in `seq` (too many were pending) calls for a `snapshot`."""
        with self._lock:
            return self._blocks.drain_events()

    def snapshot(self) -> CacheSnapshot:
        """All reusable blocks, as of `event_seq`."""
        with self._lock:
            return self._blocks.snapshot()

    @property
    def event_seq(self) -> int:
        """Sequence number of the last block event."""
        return self._blocks.event_seq

    def stats(self) -> EngineStats:
        with self._lock:
            running, waiting = self._scheduler.running, self._scheduler.waiting
            return EngineStats(
                running=len(running),
                waiting=len(waiting),
                num_blocks=self.config.num_blocks,
                free_blocks=self._blocks.num_free,
                pending_prefill_tokens=sum(request.num_missing for request in waiting)
                + sum(request.num_missing for request in running if not request.decoding),
                decode_context_tokens=sum(len(request.token_ids) for request in running if request.decoding),
                generated_tokens=self._generated_tokens,
                prompt_tokens=self._scheduler.num_prompt_tokens,
                cached_tokens=self._scheduler.num_cached_tokens,
                preemptions=self._scheduler.num_preemptions,
            )

    def check_integrity(self) -> None:
        """Verifies the cache's bookkeeping; cheap enough for tests and for an idle moment.

        Raises:
            CacheCorrupted: it contradicts itself.
        """
        with self._lock:
            self._blocks.check_integrity(self._scheduler.tables)

    def close(self) -> None:
        """Aborts every request and ends the step thread. Safe to call twice."""
        with self._lock:
            if not self._closed and self._failure is None:
                for active in list(self._active.values()):
                    if active.request.status is not Status.FINISHED:
                        self._abort(active)
            self._closed = True
            self._work.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
