"""OpenAI's response bodies, built from engine chunks with the `openai` package's own types.

One reply collects a request's chunks. `piece` turns one chunk into a streamed event, `whole` all of them into one
body. Every reply carries, as an extra member named `caravan`, where it ran and how many prompt tokens were foreseen
and found in that replica's cache.
"""

import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion import ChoiceLogprobs as ChatLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChatChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChatChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from cluster.serve.token_text import TextOffsets, token_bytes, token_name
from llama.engine import Chunk, TokenLogprob
from llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class RouteReport:
    """Where a request ran, and its prompt tokens found in the cache: foreseen at selection, and in fact."""

    request_id: str
    replica: str
    predicted_cached_tokens: int
    cached_tokens: int


class Reply(ABC):
    """The response to one request, as it grows. Feed it every chunk, in order, through `piece` or `add`."""

    def __init__(self, request_id: str, model: str, tokenizer: Tokenizer, *, want_logprobs: bool) -> None:
        self.request_id = request_id
        self.model = model
        self.created = int(time.time())
        self._tokenizer = tokenizer
        self._want_logprobs = want_logprobs
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._last: Chunk | None = None

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk into the whole."""
        self._texts.append(chunk.text)
        self._logprobs.extend(chunk.logprobs or ())
        self._last = chunk

    @abstractmethod
    def piece(self, chunk: Chunk) -> BaseModel:
        """Takes a chunk in and returns its streamed event."""

    @abstractmethod
    def usage_piece(self, report: RouteReport) -> BaseModel:
        """The event after the last one, for `stream_options.include_usage`: no choices, only usage."""

    @abstractmethod
    def whole(self, report: RouteReport) -> BaseModel:
        """The body of a response that is not streamed."""

    def usage(self) -> CompletionUsage:
        """Token counts of the chunks so far."""
        last = self._last
        prompt, completion, cached = (
            (last.prompt_tokens, last.completion_tokens, last.num_cached_tokens) if last else (0, 0, 0)
        )
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )

    def _name(self, token_id: int) -> str:
        return token_name(self._tokenizer, token_id)

    @property
    def _whole_text(self) -> str:
        return "".join(self._texts)

    @property
    def _finish_reason(self) -> str | None:
        return self._last.finish_reason if self._last else None


def with_report(body: BaseModel, report: RouteReport) -> BaseModel:
    """`body` with the `caravan` member; OpenAI's types allow extra members, and clients show them."""
    return body.model_copy(update={"caravan": asdict(report)})


class CompletionReply(Reply):
    """`/v1/completions`."""

    def __init__(self, request_id: str, model: str, tokenizer: Tokenizer, *, want_logprobs: bool) -> None:
        super().__init__(request_id, model, tokenizer, want_logprobs=want_logprobs)
        self._offsets = TextOffsets(tokenizer)  # of the pieces; text lags behind its tokens

    def piece(self, chunk: Chunk) -> BaseModel:
        self.add(chunk)
        return self._completion(self._choice(chunk.text, chunk.finish_reason, chunk.logprobs, self._offsets))

    def usage_piece(self, report: RouteReport) -> BaseModel:
        body = self._completion()
        body.usage = self.usage()
        return with_report(body, report)

    def whole(self, report: RouteReport) -> BaseModel:
        offsets = TextOffsets(self._tokenizer)
        body = self._completion(self._choice(self._whole_text, self._finish_reason, self._logprobs, offsets))
        body.usage = self.usage()
        return with_report(body, report)

    def _completion(self, *choices: CompletionChoice) -> Completion:
        return Completion(
            id=f"cmpl-{self.request_id}",
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=list(choices),
        )

    def _choice(
        self, text: str, finish_reason: str | None, logprobs: list[TokenLogprob] | None, offsets: TextOffsets
    ) -> CompletionChoice:
        # construct: a streamed choice has no finish_reason yet, which the package's type for whole ones does not allow.
        return CompletionChoice.model_construct(
            index=0, text=text, finish_reason=finish_reason, logprobs=self._format(logprobs or [], offsets)
        )

    def _format(self, logprobs: list[TokenLogprob], offsets: TextOffsets) -> Logprobs | None:
        if not self._want_logprobs:
            return None
        return Logprobs(
            tokens=[self._name(entry.token_id) for entry in logprobs],
            token_logprobs=[entry.logprob for entry in logprobs],
            top_logprobs=[{self._name(token_id): value for token_id, value in entry.top.items()} for entry in logprobs],
            text_offset=[offsets.next(entry.token_id) for entry in logprobs],
        )


class ChatReply(Reply):
    """`/v1/chat/completions`."""

    def piece(self, chunk: Chunk) -> BaseModel:
        first = self._last is None
        self.add(chunk)
        content = self._format(chunk.logprobs or [])
        choice = ChatChunkChoice.model_construct(
            index=0,
            delta=ChoiceDelta(role="assistant", content=chunk.text) if first else ChoiceDelta(content=chunk.text),
            finish_reason=chunk.finish_reason,
            logprobs=ChatChunkLogprobs(content=content) if self._want_logprobs else None,
        )
        return self._chunk(choice)

    def usage_piece(self, report: RouteReport) -> BaseModel:
        body = self._chunk()
        body.usage = self.usage()
        return with_report(body, report)

    def whole(self, report: RouteReport) -> BaseModel:
        choice = ChatChoice.model_construct(
            index=0,
            message=ChatCompletionMessage(role="assistant", content=self._whole_text),
            finish_reason=self._finish_reason,
            logprobs=ChatLogprobs(content=self._format(self._logprobs)) if self._want_logprobs else None,
        )
        body = ChatCompletion(
            id=f"chatcmpl-{self.request_id}",
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=self.usage(),
        )
        return with_report(body, report)

    def _chunk(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=f"chatcmpl-{self.request_id}",
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=list(choices),
        )

    def _format(self, logprobs: list[TokenLogprob]) -> list[ChatCompletionTokenLogprob]:
        return [
            ChatCompletionTokenLogprob(
                token=self._name(entry.token_id),
                bytes=self._bytes(entry.token_id),
                logprob=entry.logprob,
                top_logprobs=[
                    TopLogprob(token=self._name(token_id), bytes=self._bytes(token_id), logprob=value)
                    for token_id, value in entry.top.items()
                ],
            )
            for entry in logprobs
        ]

    def _bytes(self, token_id: int) -> list[int] | None:
        raw = token_bytes(self._tokenizer, token_id)
        return None if raw is None else list(raw)
