"""The model behind the API: its name, its tokenizer, and what fits into it."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.serve.api_error import ApiError
from cluster.serve.messages import ReplicaInfo
from cluster.serve.state import RoutingState
from cluster.serve.token_text import TokenText
from llama.tokenizer import ChatTemplateError, Tokenizer

FIRST_REPLICA_TIMEOUT_S = 30.0

# Below it, the way to another thread and back takes longer than the work.
_INLINE_CHARS = 1024


class ServedModel:
    """One model under one name, of which any number of replicas of its `family` run, with the weights of the day.

    A conversation or text is made tokens here, once. Long ones are, in another thread: the event loop goes on.
    """

    def __init__(self, name: str, family: str, tokenizer: Tokenizer, state: RoutingState) -> None:
        self.name = name
        self.family = family
        self.max_wait_s: float | None = None  # of requests that do not say how long they may wait
        self.tokens = TokenText(tokenizer)
        self.created = int(time.time())
        self._tokenizer = tokenizer
        self._state = state
        # A token's entry in the vocabulary is never shorter than the text it stands for.
        self._longest_token = max(map(len, tokenizer.backend.get_vocab()))

    def check_name(self, model: str) -> None:
        """Raises ApiError (404) if it is another one's."""
        if model != self.name:
            message = f"The model {model!r} does not exist; this server has {self.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def info(self) -> ReplicaInfo:
        """What the replicas of our model say of it; waits for the first of them. Raises ApiError (503)."""
        deadline = time.monotonic() + FIRST_REPLICA_TIMEOUT_S
        while (info := self._state.model(self.family)) is None:
            if time.monotonic() > deadline:
                raise ApiError(503, "No replica is ready; try again later.", code="no_replica", kind="server_error")
            await asyncio.sleep(0.05)
        return info

    async def encode(self, text: str, param: str) -> list[int]:
        """Token ids of a text, nothing added; raises ApiError (400) when it is too long for any tokens."""
        await self._check_length(len(text), param)
        if len(text) <= _INLINE_CHARS:
            return self._tokenizer.encode(text)
        return await asyncio.to_thread(self._tokenizer.encode, text)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template; raises ApiError (400)."""
        await self._check_length(sum(len(message["content"]) for message in messages), "messages")
        try:
            # The template is not ours: a slow one must not hold up the loop, however short the messages.
            return await asyncio.to_thread(
                self._tokenizer.apply_chat_template, messages, add_generation_prompt=add_generation_prompt
            )
        except ChatTemplateError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, control tokens included."""
        if len(token_ids) <= _INLINE_CHARS:
            return self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return await asyncio.to_thread(self._tokenizer.decode, token_ids, skip_special_tokens=False)

    async def check_prompt(self, token_ids: Sequence[int], param: str) -> None:
        """Raises ApiError (400) unless it is a prompt that leaves room for an answer."""
        info = await self.info()
        if not token_ids:
            raise ApiError(400, f"{param} holds no tokens; give at least one.", param=param, code="invalid_value")
        if len(token_ids) >= info.max_seq_len:
            message = (
                f"This model's maximum context length is {info.max_seq_len} tokens, and your {param} has "
                f"{len(token_ids)}, which leaves no room for an answer; shorten it."
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        await self.check_ids(token_ids, param)

    async def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raises ApiError (400) when one of them is no id of the vocabulary."""
        info = await self.info()
        if token_ids and max(token_ids) >= info.vocab_size:
            message = f"{param} holds token id {max(token_ids)}; the vocabulary ends at {info.vocab_size - 1}."
            raise ApiError(400, message, param=param, code="invalid_value")

    async def _check_length(self, num_characters: int, param: str) -> None:
        """Refuses a text that cannot fit however it is tokenised, before it costs the time to do so."""
        info = await self.info()
        most = info.max_seq_len * self._longest_token
        if num_characters > most:
            message = (
                f"This model's maximum context length is {info.max_seq_len} tokens, which are at most {most} "
                f"characters, and your {param} has {num_characters}; shorten it."
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
