"""Where a request's tokens go: text, end of generation, chunks, completions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llama.engine.params import SamplingParams
from llama.engine.request import Chunk, Completion, FinishReason, Request, TokenLogprob
from llama.engine.text import OutputText


class EngineFailed(RuntimeError):
    """A step raised; the engine computes nothing any more. `__cause__` is what it raised."""


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

    def accept(self, token_id: int, eos_ids: frozenset[int]) -> tuple[str, FinishReason | None]:
        """Appends a generated token; returns the new text and whether it ends the request."""
        request, params = self.request, self.request.params
        request.token_ids.append(token_id)
        text, stopped = "", False
        stop_token = token_id in params.stop_token_ids or (token_id in eos_ids and not params.ignore_eos)
        if self.text is not None and not stop_token:
            text, stopped = self.text.push(token_id)
        if stopped:
            return text, "stop"
        full = request.num_generated >= params.max_tokens or len(request.token_ids) >= request.max_total_tokens
        if not stop_token and not full:
            return text, None
        rest, stopped = self.text.finish() if self.text is not None else ("", False)
        return text + rest, "stop" if stop_token or stopped else "length"

    def rest(self) -> str:
        """Text held back so far, for a request that ends without another token."""
        return self.text.finish()[0] if self.text is not None else ""

    def chunk(
        self, token_ids: list[int], text: str, reason: FinishReason | None, logprob: TokenLogprob | None, event_seq: int
    ) -> Chunk:
        request = self.request
        wanted = request.params.logprobs is not None
        return Chunk(
            request_id=request.request_id,
            token_ids=token_ids,
            text=text,
            finish_reason=reason,
            num_cached_tokens=request.num_cached_tokens or 0,
            prompt_tokens=request.num_prompt_tokens,
            completion_tokens=request.num_generated,
            logprobs=([logprob] if logprob is not None else []) if wanted else None,
            event_seq=event_seq,
            index=request.index,
        )


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
        completion = self.completions[item.index]
        completion.token_ids += item.token_ids
        completion.text += item.text
        completion.num_cached_tokens = item.num_cached_tokens
        if completion.logprobs is not None:
            completion.logprobs += item.logprobs or []
        if item.finish_reason is not None:
            completion.finish_reason = item.finish_reason
            self.unfinished -= 1
