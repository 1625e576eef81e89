"""Calls that hang, and followers that go away."""

import asyncio
import threading
from collections.abc import Generator

import pytest

from pipelines.service.bounded import Bounded
from pipelines.service.errors import Busy


def test_a_follower_that_goes_away_is_counted_until_its_thread_is_free() -> None:
    said, closed = threading.Event(), threading.Event()

    def silent() -> Generator[str, None, None]:
        try:
            said.wait(20)
            yield "late"
        finally:
            closed.set()

    async def scenario() -> None:
        bounded = Bounded(4, 5.0)
        for _ in range(2):
            follower = asyncio.ensure_future(anext(bounded.follow(silent())))
            await asyncio.sleep(0.05)
            follower.cancel()
            await asyncio.wait([follower])
        with pytest.raises(Busy, match="2 logs are followed already"):
            await anext(bounded.follow(silent()))
        said.set()
        while bounded._followed:
            await asyncio.sleep(0.01)
        assert closed.is_set()
        assert await anext(bounded.follow(silent())) == "late"
        bounded.close()

    try:
        asyncio.run(asyncio.wait_for(scenario(), 15))
    finally:
        said.set()
