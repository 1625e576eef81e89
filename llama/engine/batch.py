"""The prompts of one call of `Engine.generate`, on their way through the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from llama.engine.output import ActiveRequest, Collector
from llama.engine.params import SamplingParams
from llama.engine.request import Completion
from llama.engine.scheduler import QueueFull

Submit = Callable[[list[int], SamplingParams, Collector], list[ActiveRequest]]


class Batch:
    """Submits prompts, in order, as the queue takes them. `prompts`: checked token ids, and how to go on from them."""

    def __init__(self, prompts: Sequence[tuple[list[int], SamplingParams]]) -> None:
        self._collectors = [Collector(token_ids, params) for token_ids, params in prompts]
        self._pending = deque(zip(prompts, self._collectors, strict=True))
        self._running: list[tuple[ActiveRequest, Collector]] = []

    def submit(self, submit: Submit) -> None:
        """Hands over what the queue takes now."""
        # The queue limit protects a server; here it only paces the submission.
        with suppress(QueueFull):
            while self._pending:
                (token_ids, params), collector = self._pending[0]
                self._running.append((submit(token_ids, params, collector)[0], collector))
                self._pending.popleft()

    @property
    def num_unfinished(self) -> int:
        """Prompts that are not complete."""
        self._running = [entry for entry in self._running if entry[1].unfinished]
        return len(self._pending) + len(self._running)

    @property
    def submitted(self) -> list[str]:
        """Ids of the requests under way."""
        return [active.request.request_id for active, _ in self._running]

    @property
    def completions(self) -> list[Completion]:
        """In the order of the prompts, the `n` of a prompt side by side."""
        return [completion for collector in self._collectors for completion in collector.completions]
