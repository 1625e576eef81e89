"""Several prompts at once: each in a context of its own, and none left behind."""

import asyncio
import contextvars
from contextlib import aclosing

import pytest

from cluster.serve.fan_out import complete_all, stream_all

CALL = contextvars.ContextVar("CALL", default="nobody's")


class _Client:
    """Streams the letters of a request's name, and notes who began, in what context, and who was left unfinished."""

    def __init__(self) -> None:
        self.contexts: list[str] = []
        self.ended: list[str] = []
        self.open = 0

    async def stream(self, request):
        self.contexts.append(CALL.get())
        self.open += 1
        try:
            for letter in request:
                await asyncio.sleep(0)
                if letter == "!":
                    raise ValueError(request)
                if letter == ".":
                    await asyncio.Event().wait()
                yield letter
            self.ended.append(request)
        finally:
            self.open -= 1

    async def complete(self, request):
        async with aclosing(self.stream(request)) as items:
            return [item async for item in items]


async def _all(client, requests):
    CALL.set("the HTTP request's")
    async with aclosing(stream_all(client, requests)) as items:
        return [item async for item in items]


@pytest.mark.parametrize(
    ("requests", "context"), [(["abc"], "the HTTP request's"), (["abc", "", "de"], "nobody's")], ids=["one", "several"]
)
def test_every_chunk_comes_under_its_prompts_number(requests, context):
    client = _Client()
    items = asyncio.run(_all(client, requests))
    for number, request in enumerate(requests):
        assert "".join(letter for prompt, letter in items if prompt == number) == request
    assert asyncio.run(complete_all(client, requests)) == [list(request) for request in requests]
    assert client.contexts[: len(requests)] == [context] * len(requests) and client.open == 0


@pytest.mark.parametrize("run", [_all, complete_all])
def test_the_first_failure_ends_the_others(run):
    client = _Client()
    with pytest.raises(ValueError, match="a!"):
        asyncio.run(run(client, ["x.", "a!", "y."]))
    assert client.open == 0 and client.ended == []


@pytest.mark.parametrize("run", [_all, complete_all])
@pytest.mark.parametrize("requests", [["."], [".", "a."]])
def test_who_goes_away_ends_them_all(run, requests):
    client = _Client()

    async def leave() -> None:
        task = asyncio.create_task(run(client, requests))
        await asyncio.sleep(0.01)
        assert client.open == len(requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.open == 0

    asyncio.run(leave())
