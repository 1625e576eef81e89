"""Reading a request: its media type, and no more bytes than are allowed."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.serve.protocol import ApiError
from cluster.serve.request_body import MAX_BODY_BYTES, read_json_body


def _http(content_type: str | None, *parts: bytes) -> tuple[Any, list[int]]:
    """A request, and the sizes of the parts that were asked of it."""
    read: list[int] = []

    async def stream() -> AsyncIterator[bytes]:
        for part in parts:
            read.append(len(part))
            yield part

    headers = {} if content_type is None else {"content-type": content_type}
    return SimpleNamespace(headers=headers, stream=stream), read


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
def test_a_body_is_read_whole(content_type):
    http, _ = _http(content_type, b'{"a"', b": 1}")
    assert asyncio.run(read_json_body(http)) == b'{"a": 1}'


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded"])
def test_what_a_browser_sends_for_any_page_is_refused_unread(content_type):
    http, read = _http(content_type, b"{}")
    with pytest.raises(ApiError, match="application/json") as caught:
        asyncio.run(read_json_body(http))
    assert (caught.value.status, read) == (415, [])


def test_a_body_that_is_too_long_is_not_read_to_its_end():
    exact, _ = _http("application/json", b"x" * MAX_BODY_BYTES)
    assert len(asyncio.run(read_json_body(exact))) == MAX_BODY_BYTES
    http, read = _http("application/json", *[b"x" * (1 << 20)] * 100)
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_json_body(http))
    assert caught.value.status == 413 and len(read) == 5
