"""Answers of `/v1/completions`."""

from collections.abc import Sequence
from typing import Any

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from cluster.serve.engine_client import RoutedChunk
from cluster.serve.reply import CaravanReport, CaravanReports, ChoiceSoFar, Reply, Wishes
from cluster.serve.token_text import TextOffsets, TokenText
from llama.engine import Chunk, TokenLogprob


class EchoLogprobs(Logprobs):
    """With `echo` the prompt's first token has no log-probability: nothing predicts it."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class PromptLogprob(BaseModel):
    """vLLM's; `rank` is null for a token that is none of the likeliest."""

    logprob: float
    rank: int | None
    decoded_token: str


class Choice(CompletionChoice):
    logprobs: EchoLogprobs | None = None  # type: ignore[assignment]
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionBody(Completion):
    """OpenAI's, with what is beyond it."""

    choices: list[Choice]  # type: ignore[assignment]
    caravan: CaravanReport | CaravanReports


class CompletionReply(Reply):
    """Its `echo` is the text and the token ids of each prompt, to be put before each of its completions."""

    whole_type = CompletionBody
    whole_kind = event_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self,
        request_id: str,
        model: str,
        tokens: TokenText,
        wishes: Wishes,
        *,
        echo: Sequence[tuple[str, Sequence[int]]] | None = None,
        prompt_logprobs: bool = False,
    ) -> None:
        super().__init__(request_id, model, tokens, wishes)
        self._echo = echo
        self._want_prompt_logprobs = prompt_logprobs
        self._offsets = [TextOffsets(tokens) for _ in self._choices]  # run on from event to event
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}

    def add(self, prompt: int, item: RoutedChunk) -> int:
        if item.chunk.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = item.chunk.prompt_logprobs
        return super().add(prompt, item)

    def _piece(self, index: int, choice: ChoiceSoFar, chunk: Chunk) -> dict[str, Any]:
        entries: list[tuple[int, TokenLogprob | None]] = [(entry.token_id, entry) for entry in chunk.logprobs or ()]
        text = chunk.text
        if not choice.begun and self._echo is not None:
            text, entries = self._echoed(index, text, entries)
        return {
            "index": index,
            "text": text,
            "finish_reason": chunk.finish_reason,
            "logprobs": self._format(entries, self._offsets[index]) if self.wishes.logprobs else None,
        }

    def _whole_choice(self, index: int, choice: ChoiceSoFar) -> dict[str, Any]:
        entries: list[tuple[int, TokenLogprob | None]] = [(entry.token_id, entry) for entry in choice.logprobs]
        text = "".join(choice.texts)
        if self._echo is not None:
            text, entries = self._echoed(index, text, entries)
        body = {
            "index": index,
            "text": text,
            "finish_reason": choice.finish_reason,
            "logprobs": self._format(entries, TextOffsets(self._tokens)) if self.wishes.logprobs else None,
        }
        if self._want_prompt_logprobs:
            body["prompt_logprobs"] = self._prompt_members(index // self.wishes.n)
        return body

    def _echoed(
        self, index: int, text: str, entries: list[tuple[int, TokenLogprob | None]]
    ) -> tuple[str, list[tuple[int, TokenLogprob | None]]]:
        assert self._echo is not None
        prompt = index // self.wishes.n
        prompt_text, token_ids = self._echo[prompt]
        known = self._prompt_logprobs.get(prompt) or [None] * len(token_ids)
        return prompt_text + text, [*zip(token_ids, known, strict=True), *entries]

    def _format(self, entries: list[tuple[int, TokenLogprob | None]], offsets: TextOffsets) -> dict[str, Any]:
        return {
            "text_offset": [offsets.next(token_id) for token_id, _ in entries],
            "token_logprobs": [None if entry is None else entry.logprob for _, entry in entries],
            "tokens": [self._tokens.name(token_id) for token_id, _ in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for _, entry in entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the one that came if it is none of them, as OpenAI's API has it."""
        top = entry.top if entry.token_id in entry.top else entry.top | {entry.token_id: entry.logprob}
        return {self._tokens.name(token_id): value for token_id, value in top.items()}

    def _prompt_members(self, prompt: int) -> list[dict[str, dict[str, Any]] | None]:
        return [None if entry is None else self._ranked(entry) for entry in self._prompt_logprobs.get(prompt, [])]

    def _ranked(self, entry: TokenLogprob) -> dict[str, dict[str, Any]]:
        ranks: list[tuple[int, float, int | None]] = [(t, v, rank) for rank, (t, v) in enumerate(entry.top.items(), 1)]
        if entry.token_id not in entry.top:
            ranks.append((entry.token_id, entry.logprob, None))
        return {
            str(token_id): {"logprob": value, "rank": rank, "decoded_token": self._tokens.name(token_id)}
            for token_id, value, rank in ranks
        }
