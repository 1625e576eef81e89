"""The endpoint that is deployed on the cluster, for the console: looked at, scaled, talked to."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from cluster.serve import control
from cluster.serve.errors import ServeError
from pipelines.serve_status import Look, look

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

_REPLY_SECONDS = 300.0


@dataclass(frozen=True)
class Said:
    """A piece of a reply; the last one has no text, and the counts of the whole. Tokens; seconds."""

    text: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_s: float | None = None


class Endpoints:
    """`dashboard_url`: of the Ray cluster that serves."""

    def __init__(self, dashboard_url: str) -> None:
        self._dashboard_url = dashboard_url

    def look(self, api_key: str | None, before: Look | None) -> Look:
        """The application now; speeds are told from the look `before`. Raises ServeError, NotDeployed of them."""
        return look(control.status(dashboard_url=self._dashboard_url, api_key=api_key), time.monotonic(), before)

    def scale(self, replicas: int) -> bool:
        """Once they are there; whether autoscaling was on. Raises ServeError, and ValueError below 1."""
        return control.scale(replicas, dashboard_url=self._dashboard_url)


async def converse(
    url: str, model: str, messages: Sequence[dict[str, str]], api_key: str | None, max_tokens: int
) -> AsyncIterator[Said]:
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
