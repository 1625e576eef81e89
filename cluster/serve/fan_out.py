"""Several prompts of one HTTP request, asked of the engines at the same time.

Each is asked in a task with a context of its own: Serve tells calls apart by the request that they are made in, and of
two that seem to be the same one never gets its replica.
"""

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from cluster.serve.engine_client import EngineClient, RoutedChunk
from cluster.serve.messages import GenerateRequest

_T = TypeVar("_T")
Numbered = tuple[int, RoutedChunk]
"""The number of the prompt, and a chunk of it."""


async def complete_all(client: EngineClient, requests: Sequence[GenerateRequest]) -> list[list[RoutedChunk]]:
    """All chunks of each. The first failure ends the others and is raised."""
    if len(requests) == 1:
        return [await client.complete(requests[0])]
    tasks = [_spawn(client.complete(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def stream_all(client: EngineClient, requests: Sequence[GenerateRequest]) -> AsyncGenerator[Numbered, None]:
    """The chunks as they come. The first failure ends the others and is raised."""
    if len(requests) == 1:
        async with aclosing(client.stream(requests[0])) as items:
            async for chunk in items:
                yield 0, chunk
        return
    queue: asyncio.Queue[Numbered | Exception | None] = asyncio.Queue()

    async def pump(number: int, request: GenerateRequest) -> None:
        try:
            async with aclosing(client.stream(request)) as items:
                async for chunk in items:
                    queue.put_nowait((number, chunk))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [_spawn(pump(number, request)) for number, request in enumerate(requests)]
    try:
        unfinished = len(tasks)
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield item
    finally:
        await _end(tasks)


def _spawn(work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
