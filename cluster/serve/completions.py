"""`/v1/completions`: prompts, text or token ids, continued. No token is added before a text."""

from fastapi import Request
from fastapi.responses import Response

from cluster.serve.answer import Answers
from cluster.serve.callers import meter_of
from cluster.serve.completion_reply import CompletionReply
from cluster.serve.completion_request import CompletionRequest, parse_completion
from cluster.serve.generation import generate_requests, unique_name
from cluster.serve.reply import Wishes
from cluster.serve.request_body import read_json_body
from cluster.serve.served_model import ServedModel


class Completions:
    def __init__(self, model: ServedModel, answers: Answers) -> None:
        self._model = model
        self._answers = answers

    async def create(self, http: Request) -> Response:
        """OpenAI's completions of one or several prompts."""
        body = parse_completion(await read_json_body(http))
        self._model.check_name(body.model)
        prompts = [await self._token_ids(prompt) for prompt in body.prompts]
        params = body.sampling(max(1, body.max_tokens), body.logprobs, _prompt_logprobs(body))
        name = unique_name(http)
        info = await self._model.info()
        requests = generate_requests(http, name, prompts, params, body, info, self._model.max_wait_s)
        wishes = Wishes(
            prompts=len(prompts),
            n=body.n,
            logprobs=body.logprobs is not None,
            usage=body.include_usage,
            continuous_usage=body.continuous_usage,
        )
        texts = [await self._text(prompt) for prompt in body.prompts] if body.echo else ()
        reply = CompletionReply(
            name,
            self._model.name,
            self._model.tokens,
            wishes,
            echo=list(zip(texts, prompts, strict=True)) if body.echo else None,
            prompt_logprobs=body.prompt_logprobs is not None,
        )
        answer = self._answers.streamed if body.stream else self._answers.whole
        return await answer(requests, reply, meter_of(http), scores_only=body.max_tokens == 0)

    async def _token_ids(self, prompt: str | list[int]) -> list[int]:
        token_ids = await self._model.encode(prompt, "prompt") if isinstance(prompt, str) else prompt
        await self._model.check_prompt(token_ids, "prompt")
        return token_ids

    async def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else await self._model.decode(prompt)


def _prompt_logprobs(body: CompletionRequest) -> int | None:
    """Asked for by name, and by the logprobs of a prompt that is echoed."""
    asked = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((count for count in asked if count is not None), default=None)
