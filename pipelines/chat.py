"""Talking to an endpoint that speaks OpenAI's API, ours or another."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from cluster.serve.errors import ServeError
from pipelines.serve_status import seconds

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

_REPLY_SECONDS, _LOOK_SECONDS = 300.0, 10.0


@dataclass(frozen=True)
class Said:
    """A piece of a reply; the last one has no text, and the counts of the whole. Tokens; seconds."""

    text: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_s: float | None = None

    def counts(self) -> str:
        """The last piece in words."""
        line = f"{self.prompt_tokens:,} prompt tokens, {self.cached_tokens or 0:,} of them cached"
        line += f"; {self.completion_tokens or 0:,} new"
        return line if self.first_token_s is None else f"{line}; the first after {seconds(self.first_token_s)}"


async def converse(
    url: str, model: str, messages: Sequence[dict[str, str]], api_key: str | None, max_tokens: int
) -> AsyncGenerator[Said]:
    """The reply to a conversation, as it comes. `url` is the endpoint's. Raises ServeError in one line."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError  # a second to import

    began, first = time.monotonic(), None
    plain = DefaultAsyncHttpxClient(trust_env=False, timeout=_REPLY_SECONDS)  # no proxy between us and a cluster
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, http_client=plain)
    try:
        async with client:
            stream = await client.chat.completions.create(
                model=model,
                messages=cast("list[ChatCompletionMessageParam]", list(messages)),
                max_tokens=max_tokens,
                stream=True,
                stream_options={"include_usage": True},
            )
            async with stream:
                async for chunk in stream:
                    text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    if text:
                        first = first or time.monotonic()
                        yield Said(text)
                    if chunk.usage is not None:
                        details = chunk.usage.prompt_tokens_details
                        yield Said(
                            "",
                            chunk.usage.prompt_tokens,
                            details.cached_tokens if details else None,
                            chunk.usage.completion_tokens,
                            None if first is None else first - began,
                        )
    except OpenAIError as error:
        raise ServeError(f"the endpoint did not answer: {' '.join(str(error).split())[:300]}") from error


def served_model(url: str, api_key: str | None) -> str:
    """The name of the first model that an endpoint has. Raises ServeError in one line."""
    import httpx

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with httpx.Client(trust_env=False, timeout=_LOOK_SECONDS, headers=headers) as http:
            answer = http.get(f"{url}/v1/models")
            found = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ServeError(f"no endpoint answers at {url} ({' '.join(str(error).split())[:200]}); give --url") from error
    try:
        return str(found["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        said = found.get("error") if isinstance(found, dict) else None
        reason = said.get("message") if isinstance(said, dict) else f"HTTP status {answer.status_code}"
        raise ServeError(f"the endpoint at {url} names no model: {reason}") from None
