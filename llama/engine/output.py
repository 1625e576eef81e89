"""Where a request's tokens go: text, end of generation, chunks, completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from llama.engine.params import SamplingParams
from llama.engine.request import Chunk, Completion, FinishReason, Request, TokenLogprob
from llama.engine.text import OutputText


class EngineFailed(RuntimeError):
    """A step raised; the engine computes nothing any more. `__cause__` is what it raised."""


class EngineClosed(RuntimeError):
    """`close` was called."""


Sink = Callable[[Chunk | EngineFailed], None]
"""Takes a request's chunks; called with the engine's lock held, so it must only hand them on."""


@dataclass(eq=False)
class ActiveRequest:
    """A request and where its output goes."""

    request: Request
    text: OutputText | None
    """None without a tokenizer."""
    sink: Sink | None
    """None: its chunks are what `step` returns."""
    delivered: bool = False
    """Its last chunk has been handed out."""

    def accept(self, token_id: int, eos_ids: frozenset[int]) -> tuple[list[int], str, FinishReason | None]:
        """Appends a generated token; returns what was appended, the new text and whether it ends the request.

        Nothing is appended where the constraint admits no token: the request ends before it.
        """
        request, params, constraint = self.request, self.request.params, self.request.constraint
        if constraint is not None and not constraint.advance(token_id):
            return [], self.rest(), "stop" if constraint.complete else "length"
        request.token_ids.append(token_id)
        ended = constraint is not None and constraint.ended
        eos = token_id in eos_ids and not params.ignore_eos
        stop_token = (eos and (self._armed or ended)) or (self._armed and token_id in params.stop_token_ids)
        text, stopped = "", False
        if self.text is not None and not stop_token:
            text, stopped = self.text.push(token_id, self._armed)
        if stopped:
            return [token_id], text, "stop"
        full = request.num_generated >= params.max_tokens or len(request.token_ids) >= request.max_total_tokens
        if not stop_token and not ended and not full:
            return [token_id], text, None
        rest, stopped = self._finish()
        return [token_id], text + rest, "stop" if stop_token or ended or stopped else "length"

    def rest(self) -> str:
        """Text held back so far, for a request that ends without another token."""
        return self._finish()[0]

    @property
    def _armed(self) -> bool:
        """Whether what is generated next, or completed by the newest token, may end the request."""
        return self.request.num_generated >= self.request.params.min_tokens

    def _finish(self) -> tuple[str, bool]:
        return self.text.finish(self._armed) if self.text is not None else ("", False)

    def chunk(
        self, token_ids: list[int], text: str, reason: FinishReason | None, logprob: TokenLogprob | None, event_seq: int
    ) -> Chunk:
        request = self.request
        wanted = request.params.logprobs is not None
        first = bool(token_ids) and request.num_generated == len(token_ids) and bool(request.prompt_logprobs)
        return Chunk(
            request_id=request.request_id,
            token_ids=token_ids,
            text=text,
            finish_reason=reason,
            num_cached_tokens=request.num_cached_tokens or 0,
            prompt_tokens=request.num_prompt_tokens,
            completion_tokens=request.num_generated,
            logprobs=([logprob] if logprob is not None and token_ids else []) if wanted else None,
            event_seq=event_seq,
            index=request.index,
            prompt_logprobs=request.prompt_logprobs if first else None,
        )


class ChunkStream:
    """The sink of `stream`: hands the chunks of a prompt's `n` completions to the event loop that it is made on."""

    def __init__(self, n: int) -> None:
        self.unfinished = n
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Chunk | EngineFailed] = asyncio.Queue()

    def __call__(self, item: Chunk | EngineFailed) -> None:
        # A closed loop listens no more; the request ends by its own limits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def next(self) -> Chunk:
        """The next chunk. Raises EngineFailed."""
        item = await self._queue.get()
        if isinstance(item, EngineFailed):
            raise item
        self.unfinished -= item.finish_reason is not None
        return item


class Collector:
    """The sink of `generate`: joins the chunks of one prompt into its completions."""

    def __init__(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.completions = [
            Completion(prompt_token_ids, [], "", "abort", 0, None if params.logprobs is None else [], index)
            for index in range(params.n)
        ]
        self.unfinished = params.n

    def __call__(self, item: Chunk | EngineFailed) -> None:
        if isinstance(item, EngineFailed):
            return  # `generate` learns it from its own next step
        if item.prompt_logprobs is not None:
            for completion in self.completions:
                completion.prompt_logprobs = item.prompt_logprobs
        completion = self.completions[item.index]
        completion.token_ids += item.token_ids
        completion.text += item.text
        completion.num_cached_tokens = item.num_cached_tokens
        if completion.logprobs is not None:
            completion.logprobs += item.logprobs or []
        if item.finish_reason is not None:
            completion.finish_reason = item.finish_reason
            self.unfinished -= 1
