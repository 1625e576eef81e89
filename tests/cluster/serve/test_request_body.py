"""Reading a request: its media type, no more bytes than are allowed, and no more slowly."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.serve.api_error import ApiError
from cluster.serve.request_body import BodyLimits, Message, read_body, read_json_body

CHUNKED = [(b"transfer-encoding", b"chunked")]
LIMITS = BodyLimits(max_bytes=100)


class _Client:
    """Sends parts, each after its delay, then goes away if `leaves`, else falls silent."""

    def __init__(self, *parts: tuple[float, bytes], ends: bool = True, leaves: bool = False) -> None:
        self._parts = list(parts)
        self._ends = ends
        self._leaves = leaves
        self.asked = 0

    async def receive(self) -> Message:
        self.asked += 1
        if self._parts:
            delay, body = self._parts.pop(0)
            await asyncio.sleep(delay)
            return {"type": "http.request", "body": body, "more_body": not (self._ends and not self._parts)}
        if self._leaves:
            return {"type": "http.disconnect"}
        return await asyncio.Future()


def _read(client: _Client, headers: list[tuple[bytes, bytes]] = CHUNKED, limits: BodyLimits = LIMITS) -> bytes | None:
    return asyncio.run(read_body(headers, client.receive, limits))


def test_a_body_is_read_whole():
    assert _read(_Client((0, b"ab"), (0, b""), (0, b"c"))) == b"abc"
    assert _read(_Client((0, b"x" * 100)), [(b"content-length", b"100")]) == b"x" * 100


def test_a_request_without_a_body_is_not_waited_for():
    client = _Client()
    assert _read(client, []) == b"" and client.asked == 0


def test_a_body_that_says_it_is_too_long_is_refused_unread():
    for length in (b"101", b"9" * 5000):
        client = _Client((0, b"x"))
        with pytest.raises(ApiError) as caught:
            _read(client, [(b"content-length", length)])
        assert (caught.value.status, client.asked) == (413, 0)
    # Of two lengths the worse counts.
    with pytest.raises(ApiError):
        _read(_Client((0, b"x")), [(b"content-length", b"1"), (b"content-length", b"101")])
    for junk in (b"", b"-1", b"1e3", b"\xb2"):
        with pytest.raises(ApiError) as caught:
            _read(_Client((0, b"x")), [(b"content-length", junk)])
        assert caught.value.status == 400


def test_a_body_that_becomes_too_long_is_not_read_to_its_end():
    client = _Client(*[(0, b"x" * 40)] * 100)
    with pytest.raises(ApiError) as caught:
        _read(client)
    assert (caught.value.status, caught.value.code, client.asked) == (413, "request_too_large", 3)


def test_a_client_that_goes_away_is_nobody_to_answer():
    assert _read(_Client((0, b"x"), ends=False, leaves=True)) is None


@pytest.mark.parametrize("ends", [False, True], ids=["silent", "dribbling"])
def test_a_slow_body_is_cut_off(ends):
    limits = BodyLimits(max_bytes=10_000, grace_s=0.05, bytes_per_s=1000, total_s=10)
    client = _Client(*[(0.01, b"x")] * (1000 if ends else 2), ends=ends)
    with pytest.raises(ApiError) as caught:
        _read(client, limits=limits)
    assert (caught.value.status, caught.value.code) == (408, "request_timeout") and client.asked < 50


def test_a_body_that_keeps_pace_may_take_until_the_total_time():
    paced = BodyLimits(max_bytes=10_000, grace_s=0.1, bytes_per_s=100, total_s=10)
    assert _read(_Client(*[(0.01, b"x" * 40)] * 15), limits=paced) == b"x" * 600
    total = BodyLimits(max_bytes=10_000, grace_s=0.1, bytes_per_s=1, total_s=0.1)
    with pytest.raises(ApiError) as caught:
        _read(_Client(*[(0.01, b"x" * 40)] * 100), limits=total)
    assert caught.value.status == 408


def test_deadlines_grow_with_what_has_come():
    limits = BodyLimits(total_s=60, grace_s=10, bytes_per_s=1000)
    assert [limits.deadline_s(received) for received in (0, 1000, 20_000, 10**9)] == [10, 11, 30, 60]


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
def test_json_is_taken(content_type):
    http, _ = _http(content_type, b'{"a"', b": 1}")
    assert asyncio.run(read_json_body(http)) == b'{"a": 1}'


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded"])
def test_what_a_browser_sends_for_any_page_is_refused_unread(content_type):
    http, read = _http(content_type, b"{}")
    with pytest.raises(ApiError, match="application/json") as caught:
        asyncio.run(read_json_body(http))
    assert (caught.value.status, read) == (415, [])
