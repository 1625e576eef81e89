"""`/v1/chat/completions`: a conversation in the model's chat template, and the assistant's next message."""

from fastapi import Request
from fastapi.responses import Response

from cluster.serve.answer import Answers
from cluster.serve.callers import meter_of
from cluster.serve.chat_reply import ChatReply
from cluster.serve.chat_request import parse_chat
from cluster.serve.generation import generate_requests, unique_name
from cluster.serve.reply import Wishes
from cluster.serve.request_body import read_json_body
from cluster.serve.served_model import ServedModel


class ChatCompletions:
    def __init__(self, model: ServedModel, answers: Answers) -> None:
        self._model = model
        self._answers = answers

    async def create(self, http: Request) -> Response:
        """OpenAI's chat completions."""
        body = parse_chat(await read_json_body(http))
        self._model.check_name(body.model)
        token_ids = await self._model.encode_chat(body.conversation)
        await self._model.check_prompt(token_ids, "messages")
        info = await self._model.info()
        limit = body.token_limit or info.max_seq_len - len(token_ids)
        params = body.sampling(limit, (body.top_logprobs or 0) if body.logprobs else None)
        name = unique_name(http)
        requests = generate_requests(http, name, [token_ids], params, body, info, self._model.max_wait_s)
        wishes = Wishes(
            n=body.n, logprobs=body.logprobs, usage=body.include_usage, continuous_usage=body.continuous_usage
        )
        reply = ChatReply(name, self._model.name, self._model.tokens, wishes)
        return await (self._answers.streamed if body.stream else self._answers.whole)(requests, reply, meter_of(http))
