"""Answers of `/v1/chat/completions`."""

from typing import Any

from openai.types.chat import ChatCompletion

from cluster.serve.reply import CaravanReport, CaravanReports, ChoiceSoFar, Reply
from llama.engine import Chunk, TokenLogprob


class ChatBody(ChatCompletion):
    """OpenAI's, with what is beyond it."""

    caravan: CaravanReport | CaravanReports


class ChatReply(Reply):
    whole_type = ChatBody
    whole_kind = "chat.completion"
    event_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _piece(self, index: int, choice: ChoiceSoFar, chunk: Chunk) -> dict[str, Any]:
        text = {"content": chunk.text}
        return {
            "index": index,
            "delta": text if choice.begun else {"role": "assistant", **text},
            "finish_reason": chunk.finish_reason,
            "logprobs": self._format(chunk.logprobs or []) if self.wishes.logprobs else None,
        }

    def _whole_choice(self, index: int, choice: ChoiceSoFar) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "finish_reason": choice.finish_reason,
            "logprobs": self._format(choice.logprobs) if self.wishes.logprobs else None,
        }

    def _format(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._entry(entry.token_id, entry.logprob)
            | {"top_logprobs": [self._entry(token_id, value) for token_id, value in entry.top.items()]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokens.bytes_of(token_id)
        return {
            "token": self._tokens.name(token_id),
            "bytes": None if raw is None else list(raw),
            "logprob": logprob,
        }
