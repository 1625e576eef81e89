"""The answer to one HTTP request as it grows, of one or several prompts with `n` completions each.

Whole bodies are built with the `openai` package's own types. Streamed events are the same JSON, written out of
dictionaries, because there is one for each token; the tests hold them to those types. Every answer carries, as an extra
member named `caravan`, where it ran and how many prompt tokens were foreseen and found in that replica's cache.
"""

import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel

from cluster.serve.engine_client import RoutedChunk
from cluster.serve.token_text import TokenText
from llama.engine import Chunk, TokenLogprob

_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class CaravanReport(BaseModel):
    """Where a prompt ran, and its tokens found in the cache: foreseen at selection, and in fact."""

    request_id: str
    replica: str
    predicted_cached_tokens: int
    cached_tokens: int


class CaravanReports(BaseModel):
    """One for each of several prompts."""

    requests: list[CaravanReport]


@dataclass(frozen=True)
class Wishes:
    """What a client wants to see. `prompts`: how many; `n`: completions of each."""

    prompts: int = 1
    n: int = 1
    logprobs: bool = False
    usage: bool = False
    continuous_usage: bool = False


class ChoiceSoFar:
    """What one completion has come to."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.begun = False


class Reply(ABC):
    """Feed it every chunk, in order of its completion, through `event` (streamed) or `add` (whole)."""

    whole_type: ClassVar[type[BaseModel]]
    whole_kind: ClassVar[str]
    event_kind: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, request_id: str, model: str, tokens: TokenText, wishes: Wishes) -> None:
        self.request_id = request_id
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{request_id}",
            "object": self.event_kind,
            "created": int(time.time()),
            "model": model,
        }
        self.wishes = wishes
        self._tokens = tokens
        self._prefix = f"data: {_dumps(self._head)[:-1]},"
        self._choices = [ChoiceSoFar() for _ in range(wishes.prompts * wishes.n)]
        self._unfinished = len(self._choices)
        self._first: list[RoutedChunk | None] = [None] * wishes.prompts

    def add(self, prompt: int, item: RoutedChunk) -> int:
        """Takes a chunk of the prompt of this number into the whole; returns the number of its choice."""
        chunk = item.chunk
        index = prompt * self.wishes.n + chunk.index
        choice = self._choices[index]
        choice.texts.append(chunk.text)
        choice.completion_tokens = chunk.completion_tokens
        if chunk.logprobs:
            choice.logprobs.extend(chunk.logprobs)
        if chunk.finish_reason is not None:
            choice.finish_reason = chunk.finish_reason
            self._unfinished -= 1
        first = self._first[prompt]
        # What the others find cached, the first has just computed.
        if first is None or (first.chunk.index and not chunk.index):
            self._first[prompt] = item
        return index

    def event(self, prompt: int, item: RoutedChunk) -> bytes:
        """Takes a chunk in and returns its server-sent event; the last one carries the report, unless usage follows."""
        index = self.add(prompt, item)
        choice = self._choices[index]
        body = self._prefix + '"choices":[' + _dumps(self._piece(index, choice, item.chunk)) + "]"
        choice.begun = True
        if self.wishes.continuous_usage:
            body += f',"usage":{_dumps(self.usage())}'
        elif self.wishes.usage:
            body += ',"usage":null'
        if not self._unfinished and not self.wishes.usage:
            body += f',"caravan":{_dumps(self.report())}'
        return f"{body}}}\n\n".encode()

    def last_event(self) -> bytes:
        """After the last choice's end: usage without choices if it is wanted, and the mark of the end."""
        end = "data: [DONE]\n\n"
        if self.wishes.usage:
            rest = _dumps({"choices": [], "usage": self.usage(), "caravan": self.report()})
            end = f"{self._prefix}{rest[1:]}\n\n{end}"
        return end.encode()

    def whole(self) -> BaseModel:
        """The body of a response that is not streamed."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self._choices)]
        rest = {"object": self.whole_kind, "choices": choices, "usage": self.usage(), "caravan": self.report()}
        return self.whole_type.model_validate(self._head | rest)

    @abstractmethod
    def _piece(self, index: int, choice: ChoiceSoFar, chunk: Chunk) -> dict[str, Any]:
        """What a chunk adds to a choice, as a member of `choices` of an event."""

    @abstractmethod
    def _whole_choice(self, index: int, choice: ChoiceSoFar) -> dict[str, Any]:
        """A member of `choices` of a whole body."""

    def usage(self) -> dict[str, Any]:
        """Token counts so far: each prompt once, however many completions it has."""
        firsts = [item.chunk for item in self._first if item is not None]
        prompt_tokens = sum(chunk.prompt_tokens for chunk in firsts)
        completion_tokens = sum(choice.completion_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(chunk.num_cached_tokens for chunk in firsts)},
        }

    def report(self) -> dict[str, Any]:
        """A CaravanReport, or of several prompts CaravanReports."""
        reports = [
            {
                "request_id": item.chunk.request_id,
                "replica": item.replica,
                "predicted_cached_tokens": item.predicted_cached_tokens,
                "cached_tokens": item.chunk.num_cached_tokens,
            }
            for item in self._first
            if item is not None
        ]
        return reports[0] if len(self._first) == 1 else {"requests": reports}

    @property
    def replicas(self) -> set[str]:
        """Those that have answered so far."""
        return {item.replica for item in self._first if item is not None}
