"""How an answer goes out: as one body, or as server-sent events while it is made."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace

from fastapi.responses import Response, StreamingResponse

from cluster.serve.api_error import ApiError, internal_error, log_defect
from cluster.serve.callers import Meter
from cluster.serve.engine_client import EngineClient, RoutedChunk
from cluster.serve.fan_out import Numbered, complete_all, stream_all
from cluster.serve.messages import GenerateRequest
from cluster.serve.reply import Reply

_EVENT_STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies: neither keep nor collect


class Answers:
    """Asks the engines and answers with what they say.

    Where a client wants no completion (`max_tokens=0`), one token is computed all the same, and `scores_only` drops it.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def whole(
        self, requests: Sequence[GenerateRequest], reply: Reply, meter: Meter, *, scores_only: bool = False
    ) -> Response:
        """One JSON body; raises ApiError."""
        for number, items in enumerate(await complete_all(self._client, requests)):
            for item in items:
                meter.generated(len(item.chunk.token_ids))
                reply.add(number, _checked(item, scores_only))
        body = reply.whole().model_dump_json(exclude_unset=True)
        return Response(body, media_type="application/json", headers=_replicas(reply))

    async def streamed(
        self, requests: Sequence[GenerateRequest], reply: Reply, meter: Meter, *, scores_only: bool = False
    ) -> Response:
        """Events; raises ApiError for what fails before the first of them, the others are events themselves."""
        rest = stream_all(self._client, requests)
        try:
            # Awaited before the response begins: until then a failure still gets a status of its own.
            number, item = await anext(rest)
            meter.generated(len(item.chunk.token_ids))
            first = reply.event(number, _checked(item, scores_only))
        except BaseException:
            await rest.aclose()
            raise
        events = _events(first, rest, reply, meter, scores_only)
        return StreamingResponse(events, media_type="text/event-stream", headers=_EVENT_STREAM | _replicas(reply))


async def _events(
    first: bytes, rest: AsyncGenerator[Numbered, None], reply: Reply, meter: Meter, scores_only: bool
) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        try:
            yield first
            async for number, item in rest:
                meter.generated(len(item.chunk.token_ids))
                yield reply.event(number, _checked(item, scores_only))
            yield reply.last_event()
        except ApiError as error:
            yield _error_event(error)
        except Exception as error:
            log_defect(reply.request_id, error)
            yield _error_event(internal_error())


def _error_event(error: ApiError) -> bytes:
    return f"data: {json.dumps(error.body())}\n\n".encode()


def _checked(item: RoutedChunk, scores_only: bool) -> RoutedChunk:
    """The chunk as the client may see it; raises ApiError (504) at the end of a request whose time is over."""
    if item.chunk.finish_reason == "timeout":
        raise ApiError(504, "The request took longer than its timeout_s.", code="timeout", kind="timeout_error")
    if not scores_only:
        return item
    nothing = replace(item.chunk, token_ids=[], text="", logprobs=None, completion_tokens=0)
    return replace(item, chunk=replace(nothing, finish_reason=nothing.finish_reason and "length"))


def _replicas(reply: Reply) -> dict[str, str]:
    return {"X-Caravan-Replica": ", ".join(sorted(reply.replicas))}
