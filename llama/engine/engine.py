"""The inference engine: continuous batching over a paged cache, without Ray.

Ownership. Two locks, always taken in this order:

    _step_lock   one step at a time. Its holder, the step thread or whoever calls `step` or `generate`, alone runs the
                 model, writes the cache tensors and the weights, appends to `Request.token_ids` and calls `schedule`
                 and `commit`.
    _lock        the books (llama/engine/core.py). Held for bookkeeping only, never while the model runs, so that
                 `add_request`, `abort`, `stats`, `snapshot` and `flush_cache` answer at once on any thread (the asyncio
                 one above all).

A step copies its inputs under `_lock`, runs the model without it, and takes it again to commit. A request aborted in
between is recognised by its status; its blocks are not given to another before the next `schedule`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future

from torch import Tensor

from llama.engine.batch import Batch
from llama.engine.config import EngineConfig, EngineStats, check_cacheable, half_context, widest_window
from llama.engine.constraint import ConstraintCompiler
from llama.engine.core import EngineCore
from llama.engine.events import BlockEvent, CacheSnapshot
from llama.engine.output import ActiveRequest, ChunkStream, EngineClosed, EngineFailed, Sink
from llama.engine.params import SamplingParams, check_params
from llama.engine.progress import Progress
from llama.engine.prompt import check_name, check_order, check_prompt, with_params
from llama.engine.request import Chunk, Completion
from llama.engine.runner import ModelRunner
from llama.engine.swap import WeightSwap
from llama.engine.text import TextTokenizer
from llama.engine.watch import StepWatch
from llama.model import Transformer

logger = logging.getLogger(__name__)


class Engine:
    """Generates text with one model, for many requests at once.

    Use it in one of three ways, or mixed: `generate` for a list of prompts; `stream` for one request at a time under
    asyncio, computed by a background thread; `add_request` and `step` to drive it by hand.

    Args:
        model: on the device and in the dtype to compute in; put in evaluation mode. Only `load_weights` may change it.
        tokenizer: None when prompts are token ids and no text is wanted.
        weights_id: names the weights; blocks cached under another name are never reused.
        clock: seconds; what deadlines are measured by.

    Raises:
        ValueError: the model's keys depend on the length of their sequence, so that they cannot be cached; or the cache
            is to be smaller than a block.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextTokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        weights_id: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_cacheable(model.config)
        check_name("weights_id", weights_id)
        self.config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.on_events: Callable[[], None] = lambda: None
        """Called after a step or a flush that produced block events, before any chunk of that step is handed out,
        on the thread that made them and without the lock of the books; it must not step."""
        self._model_config = model.config
        self._clock = clock
        num_blocks = self.config.blocks(model.config, next(model.parameters()).element_size())
        self._runner = ModelRunner(model, num_blocks=num_blocks, block_size=self.config.block_size)
        self._core = EngineCore(
            self.config,
            num_blocks=num_blocks,
            max_seq_len=model.config.max_seq_len,
            tokenizer=tokenizer,
            weights_id=weights_id,
            window=widest_window(model.config),
            half_context=half_context(model.config),
        )
        self._constraints = ConstraintCompiler(tokenizer, model.config.vocab_size)
        self._swap: WeightSwap | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._watch = StepWatch(clock)
        self._interruptible = False
        """The model runs: the books are whole, and say that this step is not done."""
        self._thread: threading.Thread | None = None
        self._step_lock = threading.Lock()
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)

    @property
    def weights_id(self) -> str:
        return self._core.weights_id

    @property
    def max_total_tokens(self) -> int:
        """Prompt and generated tokens of the longest request: the model's context, or what the cache holds."""
        return self._core.max_total_tokens

    # Requests in.

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, which may be token ids already. Raises ValueError: it is text without a tokenizer."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError(f"prompt={prompt!r} is text and the engine has no tokenizer; give token ids")
        return self.tokenizer.encode(prompt)

    def add_request(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        sink: Sink | None = None,
    ) -> str:
        """Queues a request; returns its id.

        Args:
            request_id: unique among unfinished requests; None makes one.
            salt: names the tenant. Requests of different salts share no cached block, and within a priority the queue
                gives each salt that waits the same service.
            priority: the lowest is served first, and may preempt a higher one.
            timeout_s: seconds from now after which it ends, wherever it is, with `finish_reason="timeout"`.
            sink: takes its chunks, computed by a background thread; None leaves them to `step`.

        Raises:
            ValueError: the prompt is empty or holds no token id, the id is taken, or a setting cannot be obeyed.
            PromptTooLong: it fits the context or the cache at no time.
            QueueFull: too many requests wait.
            EngineFailed, EngineClosed: it takes no more requests.
        """
        token_ids = self._checked_prompt(token_ids, params)
        if sink is not None:
            self._ensure_thread()
        active = self._submit(token_ids, params, sink, request_id, salt, priority, timeout_s)
        return active[0].request.request_id

    def _checked_prompt(self, token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        vocab_size = self._model_config.vocab_size
        checked = check_prompt(
            token_ids, vocab_size=vocab_size, max_seq_len=self._model_config.max_seq_len, blocks=self._core.blocks
        )
        if params.n > self.config.max_waiting:
            raise ValueError(f"n={params.n} exceeds engine.max_waiting={self.config.max_waiting}; lower it")
        check_params(params, vocab_size, self.tokenizer)
        self._constraints.start(params)
        return checked

    def _submit(
        self,
        token_ids: list[int],
        params: SamplingParams,
        sink: Sink | None,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> list[ActiveRequest]:
        check_order(request_id, salt, priority, timeout_s)
        now = self._clock()
        active = self._core.prepare(
            token_ids,
            params,
            request_id=request_id,
            salt=salt,
            priority=priority,
            deadline=float("inf") if timeout_s is None else now + timeout_s,
            sink=sink,
            constraint=self._constraints.start(params),
            arrived=now,
        )
        with self._lock:
            self._check_open()
            if not self._must_step:
                self._watch.progressed()
            self._core.submit(active)
            self._work.notify_all()
        return active

    def abort(self, request_id: str) -> None:
        """Ends a request with `finish_reason="abort"`, whatever its state; unknown and finished ids are ignored."""
        with self._lock:
            self._core.abort(request_id)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineFailed(f"the engine has failed: {self._failure!r}") from self._failure
        if self._closed:
            raise EngineClosed("the engine is closed")

    # Steps.

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute, to load or to return."""
        with self._lock:
            return self._failure is None and not self._closed and (self._must_step or bool(self._core.outbox))

    @property
    def _must_step(self) -> bool:
        return self._core.has_work or self._swap is not None

    def step(self) -> list[Chunk]:
        """Computes one step; returns what there is for requests made with `add_request`.

        Raises:
            EngineFailed: an earlier step raised. What this step raises itself goes through as it is.
            KeyboardInterrupt: likewise; the engine goes on if it came while the model ran, as it nearly always does.
        """
        self._step()
        with self._lock:
            chunks, self._core.outbox = self._core.outbox, []
        return chunks

    def _step(self) -> None:
        with self._step_lock:
            with self._lock:
                self._check_open()
            self._guard(self._compute_step)
            self._watch.progressed()

    def _guard(self, work: Callable[[], None]) -> None:
        self._interruptible = False
        try:
            work()
        except BaseException as error:
            # An interrupted model run is done again. An interrupt elsewhere may leave books or weights half written,
            # and one in the step thread leaves nobody to go on.
            in_thread = threading.current_thread() is self._thread
            if isinstance(error, Exception) or in_thread or not self._interruptible:
                self._fail(error)
            raise

    def _compute_step(self) -> None:
        self._apply_swap()
        with self._lock:
            first_seq = self._core.blocks.event_seq
            self._core.expire(self._clock())
            scheduled = self._core.schedule()
            copies = self._core.blocks.take_copies()
            inputs = self._runner.prepare(scheduled, self._core.eos_ids) if scheduled else None
        if inputs is None:
            return
        self._runner.cache.copy_blocks(copies)
        self._interruptible = True
        computed = self._runner.run(inputs)
        self._interruptible = False
        with self._lock:
            outputs = self._core.commit(scheduled, computed)
            produced_events = self._core.blocks.event_seq != first_seq
        # Before the chunks: who reads a finish_reason may rely on the events of that request.
        if produced_events:
            self.on_events()
        with self._lock:
            self._core.hand_out(outputs)

    def _fail(self, error: BaseException) -> None:
        """No stream may wait for ever on a step thread that died: each gets the error."""
        logger.error("the engine's step failed", exc_info=error)
        with self._lock:
            self._failure = error
            failure = EngineFailed(f"the engine has failed: {error!r}")
            failure.__cause__ = error
            for active in self._core.forget_all():
                if active.sink is not None:
                    active.sink(failure)
            if self._swap is not None:
                self._swap.done.set_exception(failure)
                self._swap = None
            self._work.notify_all()

    # Whole prompts, offline.

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Completes every prompt; returns the completions in order, the `n` of a prompt side by side.

        Args:
            params: for all prompts, or one for each.
            progress: tell on standard error how far it is.

        Raises:
            ValueError: as `add_request`, before anything is computed.
            EngineFailed: a step raised in another thread.
        """
        pairs = with_params(prompts, params)
        batch = Batch([(self._checked_prompt(self.encode(prompt), own), own) for prompt, own in pairs])
        with Progress(len(prompts), enabled=progress) as bar:
            try:
                while batch.num_unfinished:
                    batch.submit(self._submit)
                    self._step()
                    bar.update(len(prompts) - batch.num_unfinished, self._core.generated_tokens)
            finally:
                for request_id in batch.submitted:
                    self.abort(request_id)
        self._swap_if_idle()  # those who wait for it need not step themselves
        return batch.completions

    # One request at a time, under asyncio.

    async def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Chunk]:
        """Yields a request's chunks as they are computed. Closing the iterator or cancelling its task aborts it.

        Raises:
            As `add_request`, at the first iteration; EngineFailed at any, when a step raises.
        """
        await self.prepare(params)
        token_ids, chunks = self._checked_prompt(self.encode(prompt), params), ChunkStream(params.n)
        active = self._submit(token_ids, params, chunks, request_id, salt, priority, timeout_s)
        try:
            self._ensure_thread()
            while chunks.unfinished:
                yield await chunks.next()
        finally:
            with self._lock:
                # Not by the id, which may be in use again.
                if self._failure is None:
                    self._core.end(active, "abort")

    async def prepare(self, params: SamplingParams) -> None:
        """Compiles what constrains the output; kept for whoever asks next, so that nobody's event loop must wait."""
        if params.constraint is not None:
            await asyncio.to_thread(self._constraints.start, params)

    def _ensure_thread(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
                thread.start()  # raises where the system gives no thread: then the next stream tries again
                self._thread = thread

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._closed and self._failure is None and not self._must_step:
                    self._work.wait()
                if self._closed or self._failure is not None:
                    return
            try:
                self._step()
            except BaseException:
                return  # `_fail` has told every stream, and the log

    # Weights.

    def load_weights(self, weights: Mapping[str, Tensor], *, weights_id: str) -> Future[None]:
        """Replaces the model's weights in place, as soon as no request runs that began with the present ones.

        Requests that have not begun wait meanwhile, as many as the queue takes, and run with the new weights. What was
        cached under the old ones is never found again.

        Args:
            weights: as of `Transformer.state_dict`, of any device and floating dtype; converted to the model's. It must
                not change until the future is done.
            weights_id: names them; another name than the present one.

        Returns:
            Done when they are in place: by then, or by the step that does it, which the step thread or the caller of
            `step` or `generate` computes. Failed with what a step raised, or with EngineClosed. It cannot be cancelled.

        Raises:
            ValueError: names or shapes are not the model's, the name is the present one, or another swap is under way.
            EngineFailed, EngineClosed: it computes nothing any more.
        """
        check_name("weights_id", weights_id)
        swap = WeightSwap(self._runner.model, weights, weights_id)
        with self._lock:
            self._check_open()
            if weights_id == self.weights_id:
                raise ValueError(f"weights_id={weights_id!r} names the present weights; choose another name")
            if self._swap is not None:
                raise ValueError(f"weights_id={weights_id!r}: the swap to {self._swap.weights_id!r} is not done; wait")
            if not self._must_step:
                self._watch.progressed()
            self._swap = swap
            self._core.hold_new()
            self._work.notify_all()
        self._swap_if_idle()
        return swap.done

    def _swap_if_idle(self) -> None:
        """With nothing under way nobody may be stepping any more."""
        with self._lock:
            idle = self._swap is not None and self._core.may_swap
        # Who holds the lock steps, and comes here in the end or is told by `has_work` to go on.
        if idle and self._step_lock.acquire(blocking=False):
            try:
                self._guard(self._apply_swap)
            finally:
                self._step_lock.release()

    def _apply_swap(self) -> None:
        """Loads the weights that wait, if nothing runs with the old ones; by the holder of `_step_lock`."""
        with self._lock:
            swap = self._swap
            if swap is None or not self._core.may_swap:
                return
        swap.apply()
        with self._lock:
            if self._swap is None:
                return  # closed meanwhile
            self._core.swap(swap.weights_id)
            self._swap = None
        try:
            self.on_events()
        finally:
            swap.done.set_result(None)

    # The cache and its events.

    def flush_cache(self) -> None:
        """Forgets every reusable block. Running requests go on with theirs, which nobody else can reuse any more."""
        with self._lock:
            self._core.blocks.clear(self._core.scheduler.tables)
        self.on_events()

    def drain_events(self) -> list[BlockEvent]:
        """Block events since the last call. A gap in `seq` (too many were pending) calls for a `snapshot`."""
        with self._lock:
            return self._core.blocks.drain_events()

    def snapshot(self) -> CacheSnapshot:
        """All reusable blocks, as of `event_seq`."""
        with self._lock:
            return self._core.blocks.snapshot()

    @property
    def event_seq(self) -> int:
        """Sequence number of the last block event."""
        return self._core.blocks.event_seq

    def cached_blocks(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading blocks of a chain (`hash_blocks`) are in the cache; a few dictionary look-ups."""
        with self._lock:
            return self._core.blocks.num_cached(hashes)

    def stats(self) -> EngineStats:
        with self._lock:
            return self._core.stats()

    def check_health(self, stuck_after_s: float) -> None:
        """Raises EngineFailed: a step failed, or there is work and no step has ended for `stuck_after_s` seconds."""
        with self._lock:
            self._check_open()
            complaint = self._watch.complaint(self._thread, stuck_after_s) if self._must_step else None
        if complaint is not None:
            raise EngineFailed(f"the engine has work and {complaint}")

    def check_integrity(self) -> None:
        """Verifies the cache's bookkeeping; cheap enough for an idle moment. Raises CacheCorrupted."""
        with self._lock:
            self._core.check_integrity()

    def close(self) -> None:
        """Aborts every request and ends the step thread. Safe to call twice."""
        with self._lock:
            if not self._closed and self._failure is None:
                self._core.abort_all()
                if self._swap is not None:
                    self._swap.done.set_exception(EngineClosed("the engine is closed"))
                    self._swap = None
            self._closed = True
            self._work.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
