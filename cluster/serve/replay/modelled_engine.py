"""An engine without a model: real scheduler, blocks and events, and steps that sleep for as long as they would take.

It has the asyncio surface of `llama.engine.Engine` that serving uses. Time is the event loop's: on a
`VirtualTimeLoop` a simulation, on any other one a stand-in for a GPU. Single-threaded: everything happens on its loop.

A step's end is computed from the end of the step before, not from when the loop got round to it: what the bookkeeping
takes is part of the step, as it is where a GPU computes meanwhile.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence

from cluster.serve.replay.timing import MODELLED_ENGINE, StepTime
from cluster.serve.replay.trace import VOCAB_SIZE
from llama.engine import BlockEvent, CacheSnapshot, Chunk, EngineConfig, EngineStats, PromptTooLong, SamplingParams
from llama.engine.core import EngineCore
from llama.engine.output import ActiveRequest, EngineClosed, EngineFailed, Sink
from llama.engine.request import ComputedTokens, Request
from llama.engine.scheduler import ScheduledTokens

MODELLED_WEIGHTS = "modelled"
MAX_SEQ_LEN = 1 << 20
_ANY_TOKEN = ComputedTokens(0)
_NO_TOKEN = ComputedTokens(None)


class ModelledEngine:
    """Answers requests with arbitrary tokens at modelled times.

    Args:
        timing: what its steps take.
        weights_id: names the weights it does not have.
    """

    tokenizer = None

    def __init__(
        self,
        config: EngineConfig = MODELLED_ENGINE,
        timing: StepTime | None = None,
        *,
        weights_id: str = MODELLED_WEIGHTS,
    ) -> None:
        self.config = config
        self.timing = timing or StepTime()
        self.on_events: Callable[[], None] = lambda: None
        self.busy_s = 0.0
        """Seconds of the steps computed so far."""
        self.steps = 0
        self.step_end = 0.0
        """When the present step ends, or the last one did; on the loop's clock."""
        self.step: Sequence[ScheduledTokens] = ()
        """What the present step computes; nothing between steps."""
        self._core = EngineCore(
            config, num_blocks=config.num_blocks, max_seq_len=MAX_SEQ_LEN, tokenizer=None, weights_id=weights_id
        )
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._failure: EngineFailed | None = None

    @property
    def weights_id(self) -> str:
        return self._core.weights_id

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def max_total_tokens(self) -> int:
        return self._core.max_total_tokens

    def add_request(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        sink: Sink,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> str:
        """Queues a request whose chunks `sink` takes; returns its id. Raises ValueError, QueueFull or EngineClosed."""
        active = self._submit(token_ids, params, sink, request_id, salt, priority, timeout_s)
        return active[0].request.request_id

    def _submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        request_id: str | None,
        salt: str,
        priority: int,
        timeout_s: float | None,
    ) -> list[ActiveRequest]:
        if self._closed:
            raise EngineClosed("the engine is closed")
        if not 0 < len(token_ids) < self.max_total_tokens:
            raise PromptTooLong(
                f"a prompt of {len(token_ids)} tokens does not fit; the limit is {self.max_total_tokens - 1}"
            )
        loop = asyncio.get_running_loop()
        deadline = math.inf if timeout_s is None else loop.time() + timeout_s
        active = self._core.prepare(
            token_ids, params, request_id=request_id, salt=salt, priority=priority, deadline=deadline, sink=sink
        )
        self._core.submit(active)
        if self._task is None:
            self._task = loop.create_task(self._run())
        self._wake.set()
        return active

    async def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Chunk]:
        """Yields a request's chunks as they are due. Closing the iterator aborts it. Raises as `add_request`."""
        queue: asyncio.Queue[Chunk | EngineFailed] = asyncio.Queue()
        active = self._submit(prompt, params, queue.put_nowait, request_id, salt, priority, timeout_s)
        unfinished = len(active)
        try:
            while unfinished:
                item = await queue.get()
                if isinstance(item, EngineFailed):
                    raise item
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            self._core.end(active, "abort")

    def abort(self, request_id: str) -> None:
        """Ends a request with `finish_reason="abort"`; unknown and finished ids are ignored."""
        self._core.abort(request_id)

    async def prepare(self, params: SamplingParams) -> None:
        """Nothing: no output is constrained."""

    def check_health(self, stuck_after_s: float) -> None:
        """Raises EngineFailed: a step failed. None gets stuck."""
        if self._failure is not None:
            raise self._failure

    async def _run(self) -> None:
        try:
            await self._steps()
        except Exception as error:
            failure = EngineFailed(f"the engine has failed: {error!r}")
            failure.__cause__ = error
            self._failure, self._closed = failure, True
            for active in self._core.forget_all():
                if active.sink is not None:
                    active.sink(failure)
            raise

    async def _steps(self) -> None:
        loop, core = asyncio.get_running_loop(), self._core
        due = loop.time()
        while True:
            while not core.has_work:
                self._wake.clear()
                await self._wake.wait()
                due = loop.time()
            first_seq = core.blocks.event_seq
            core.expire(loop.time())
            scheduled = core.schedule()
            core.blocks.take_copies()
            if not scheduled:
                continue
            seconds = self.timing.seconds(scheduled)
            due += seconds
            self.step, self.step_end = scheduled, due
            await asyncio.sleep(due - loop.time())
            self.step = ()
            self.busy_s += seconds
            self.steps += 1
            computed = [_ANY_TOKEN if item.samples else _NO_TOKEN for item in scheduled]
            outputs = core.commit(scheduled, computed)
            if core.blocks.event_seq != first_seq:
                self.on_events()
            core.hand_out(outputs)

    def cached_blocks(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a chain are in the cache."""
        return self._core.blocks.num_cached(hashes)

    def unfinished(self) -> list[Request]:
        """Every request in it, in the order in which they are computed as things stand."""
        return [*self._core.scheduler.running, *self._core.scheduler.waiting]

    def flush_cache(self) -> None:
        """Forgets every reusable block."""
        self._core.blocks.clear(self._core.scheduler.tables)
        self.on_events()

    def drain_events(self) -> list[BlockEvent]:
        """Block events since the last call."""
        return self._core.blocks.drain_events()

    def snapshot(self) -> CacheSnapshot:
        """All reusable blocks, as of `event_seq`."""
        return self._core.blocks.snapshot()

    @property
    def event_seq(self) -> int:
        return self._core.blocks.event_seq

    def stats(self) -> EngineStats:
        return self._core.stats()

    def check_integrity(self) -> None:
        """Raises CacheCorrupted when the books contradict themselves."""
        self._core.check_integrity()

    def close(self) -> None:
        """Aborts every request and ends the steps."""
        if not self._closed:
            self._core.abort_all()
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            self._task = None
