"""The gate, in front of small ASGI applications. What Serve's proxy adds to it is in evidence/serving_security."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from cluster.serve.access import Access
from cluster.serve.api_error import ApiError
from cluster.serve.callers import caller_of, meter_of, request_id_of
from cluster.serve.gate import DIRECT, Gate, ResponseBroken
from cluster.serve.keys import KeyFile, Keys
from cluster.serve.request_body import BodyLimits
from tests.cluster.serve.test_limits import Clock

LIMITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "slow": {"requests_per_minute": 2, "priority": 3},
    "single": {"concurrency": 1, "isolated": True},
    "thrifty": {"tokens_per_minute": 100},
    "boss": {"operator": True, "requests_per_minute": 1},
}


class _Door:
    """A key file, its keys, and a gate before an application that tells what it was told."""

    def __init__(self, path: Path, app: Any = None, **options: Any) -> None:
        keys, self.keys = Keys(), {}
        for name, limits in LIMITS.items():
            keys, self.keys[name] = keys.with_key(name, **limits)
        self.file = KeyFile(path)
        self.write(keys)
        self.clock = Clock()
        self.access = Access(clock=self.clock)
        self.access.set(self.file.uri)
        self.gate = Gate(app or _tell, self.access, **options)

    def write(self, keys: Keys) -> None:
        with self.file.changing() as replace:
            replace(keys)

    def bearer(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[name]}"}


async def _tell(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the caller, the path, the headers and the body."""
    http = Request(scope, receive)
    caller = caller_of(http)
    told = {
        "caller": [caller.name, caller.salt, caller.priority, caller.operator],
        "id": request_id_of(http),
        "path": scope["path"],
        "headers": dict(http.headers),
        "body": (await http.body()).decode(),
    }
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(told).encode()})


def _open(app: Any = None, origins: tuple[str, ...] = (), **options: Any) -> Gate:
    """A gate that needs no key."""
    access = Access()
    access.set(None, origins)
    return Gate(app or _tell, access, **options)


@pytest.fixture
def door(tmp_path) -> _Door:
    return _Door(tmp_path / "keys.json")


def _client(gate: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(gate, raise_app_exceptions=False), base_url="http://localhost"
    )


def _ask(gate: Any, path: str = "/v1/models", method: str = "GET", **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with _client(gate) as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def _scope(path: str = "/v1/models", headers: list[tuple[bytes, bytes]] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path, "headers": headers or [], "query_string": b"", **more}


async def _call(gate: Any, scope: Any, receive: Callable[[], Awaitable[Any]] | None = None) -> list[Any]:
    """The messages that come back."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await gate(scope, receive or asyncio.Future, send)
    return sent


def _error(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# -- who asks


def test_without_keys_everybody_may_ask_everything():
    for path in ("/v1/models", "/caravan/replicas", "/metrics"):
        assert _ask(_open(), path).json()["caller"] == ["", "", None, True]


def test_a_key_says_who_asks_and_goes_no_further(door):
    told = _ask(door.gate, headers=door.bearer("plain")).json()
    assert told["caller"] == ["plain", "", 0, False] and "authorization" not in told["headers"]
    assert _ask(door.gate, headers=door.bearer("single")).json()["caller"] == ["single", "single", 0, False]
    assert _ask(door.gate, headers={"Authorization": f"bEARER  {door.keys['slow']} "}).json()["caller"][2] == 3


@pytest.mark.parametrize("path", ["/v1/models", "/caravan/replicas", "/metrics", "/", "//health", "/health/", "/Ready"])
def test_without_a_key_there_is_openais_answer(door, path):
    response = _ask(door.gate, path)
    assert response.status_code == 401 and response.headers["www-authenticate"] == 'Bearer realm="caravan"'
    assert response.headers["x-request-id"] and response.headers["content-type"] == "application/json"
    assert _error(response)["code"] == "invalid_api_key"


def test_probes_need_no_key(door):
    for path in ("/health", "/ready"):
        assert _ask(door.gate, path).json()["caller"][3] is False
        assert _ask(door.gate, path, headers={"authorization": "Bearer wrong"}).status_code == 200


@pytest.mark.parametrize("path", ["/caravan/replicas", "/caravan", "/metrics", "/metrics/"])
def test_the_operators_routes_need_an_operators_key_and_are_not_counted(door, path):
    response = _ask(door.gate, path, headers=door.bearer("plain"))
    assert response.status_code == 403 and _error(response)["code"] == "operator_key_needed"
    for _ in range(3):
        assert _ask(door.gate, path, headers=door.bearer("boss")).status_code == 200


def test_a_path_is_seen_as_the_router_sees_it(door):
    async def status(path: str, root: str) -> int:
        bearer = [(b"authorization", door.bearer("plain")["authorization"].encode())]
        return (await _call(door.gate, _scope(path, bearer, root_path=root)))[0]["status"]

    assert asyncio.run(status("/root/caravan/replicas", "/root")) == 403
    assert asyncio.run(status("/root/v1/models", "/root")) == 200


def _junk(key: bytes) -> list[list[bytes]]:
    """Authorization headers that must not open, made from a key that does."""
    return [
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [key],
        [b"Basic " + key],
        [b"Bearer\t" + key],
        [b"Bearer " + key[:-1]],
        [b"Bearer " + key + b"\0"],
        [b"Bearer " + key.upper()],
        [b"Bearer " + key + b" " + key],
        [b"Bearer \xff\xfe" + key],
        [b"Bearer " + "ключ".encode()],
        [b"Bearer " + b"x" * 1_000_000],
        [b"\x80" * 1000],
        [b"Bearer " + key] * 2,
        [b"Bearer " + key, b"Bearer other"],
        [b"Bearer other", b"Bearer " + key],
        [b"Bearer other"] * 10_000,
    ]


@pytest.mark.parametrize("index", range(len(_junk(b"k"))))
def test_hostile_authorization_opens_nothing_and_comes_back_nowhere(door, index, caplog):
    key = door.keys["plain"].encode()
    headers = [(b"authorization", value) for value in _junk(key)[index]]
    sent = asyncio.run(_call(door.gate, _scope(headers=headers)))
    assert sent[0]["status"] == 401
    assert key not in repr(sent).encode() and b"other" not in sent[1]["body"] and len(sent[1]["body"]) < 400
    assert not caplog.records


def test_a_removed_key_is_out_and_what_others_have_used_stays_used(door):
    async def scenario() -> None:
        async with _client(door.gate) as client:
            slow, plain = door.bearer("slow"), door.bearer("plain")
            assert [(await client.get("/v1/models", headers=slow)).status_code for _ in range(3)] == [200, 200, 429]
            door.write(door.file.read().without("plain"))
            await door.access.refresh()
            assert (await client.get("/v1/models", headers=plain)).status_code == 401
            assert (await client.get("/v1/models", headers=slow)).status_code == 429

    asyncio.run(scenario())


# -- how much


def test_requests_a_minute_are_told_as_openai_tells_them(door):
    async def scenario() -> None:
        async with _client(door.gate) as client:
            bearer = door.bearer("slow")
            first = await client.get("/v1/models", headers=bearer)
            assert first.headers["x-ratelimit-limit-requests"] == "2"
            assert first.headers["x-ratelimit-remaining-requests"] == "1"
            assert first.headers["x-ratelimit-reset-requests"] == "30s"
            await client.get("/v1/models", headers=bearer)
            refused = await client.get("/v1/models", headers=bearer)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "30"
            assert refused.headers["x-ratelimit-remaining-requests"] == "0" and refused.headers["x-request-id"]
            assert (_error(refused)["type"], _error(refused)["code"]) == ("requests", "rate_limit_exceeded")
            assert (await client.get("/v1/models", headers=door.bearer("plain"))).status_code == 200
            door.clock.now += 30
            assert (await client.get("/v1/models", headers=bearer)).status_code == 200

    asyncio.run(scenario())


def test_tokens_are_counted_as_they_become_known_and_given_back_when_the_server_fails(tmp_path):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        meter = meter_of(Request(scope))
        meter.prompt(60)
        meter.generated(30)
        await send({"type": "http.response.start", "status": int(scope["path"][1:]), "headers": []})
        await send({"type": "http.response.body"})

    door = _Door(tmp_path / "keys.json", app)
    bearer = door.bearer("thrifty")
    assert _ask(door.gate, "/503", headers=bearer).headers["x-ratelimit-remaining-tokens"] == "10"
    assert _ask(door.gate, "/200", headers=bearer).headers["x-ratelimit-remaining-tokens"] == "10"
    refused = _ask(door.gate, "/200", headers=bearer)
    assert refused.status_code == 429 and _error(refused)["type"] == "tokens"
    assert refused.headers["retry-after"] == "30" and refused.headers["x-ratelimit-remaining-tokens"] == "10"


@pytest.mark.parametrize("how", ["cancelled", "disconnect", "answered", "failed"])
def test_however_a_request_ends_its_place_is_free_again(tmp_path, how):
    async def scenario() -> None:
        started, gone = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            started.set()
            if how == "failed":
                raise ZeroDivisionError
            if how == "answered":
                return await _tell(scope, receive, send)
            assert (await receive())["type"] == "http.request"
            assert (await receive())["type"] == "http.disconnect"

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        door = _Door(tmp_path / "keys.json", app)
        bearer = [(b"authorization", door.bearer("single")["authorization"].encode())]
        first = asyncio.create_task(_call(door.gate, _scope(headers=bearer), receive))
        await started.wait()
        if how in ("cancelled", "disconnect"):
            assert (await _call(door.gate, _scope(headers=bearer)))[0]["status"] == 429
        first.cancel() if how == "cancelled" else gone.set()
        await asyncio.wait([first])
        assert door.access._allowances["single"].running == 0

    asyncio.run(scenario())


# -- how slowly


def test_a_body_is_handed_on_whole_and_a_long_one_is_refused(tmp_path):
    door = _Door(tmp_path / "keys.json", body_limits=BodyLimits(max_bytes=10))
    bearer = door.bearer("plain")

    async def parts(number: int) -> Any:
        for _ in range(number):
            yield b"12345"

    assert _ask(door.gate, method="POST", content=b"1234567890", headers=bearer).json()["body"] == "1234567890"
    assert _ask(door.gate, method="POST", content=parts(2), headers=bearer).json()["body"] == "1234512345"
    for content in (b"12345678901", parts(1000)):
        response = _ask(door.gate, method="POST", content=content, headers=bearer)
        assert response.status_code == 413 and response.headers["connection"] == "close"
        assert _error(response)["code"] == "request_too_large" and response.headers["x-request-id"]


def test_a_stranger_is_refused_before_the_body_is_read(door):
    read = []

    async def receive() -> Any:
        read.append(1)
        return {"type": "http.request", "body": b"x", "more_body": True}

    sent = asyncio.run(_call(door.gate, _scope(headers=[(b"transfer-encoding", b"chunked")]), receive))
    assert sent[0]["status"] == 401 and not read


@pytest.mark.parametrize("then", ["silence", "disconnect"])
def test_a_body_that_stops_is_cut_off_and_one_whose_sender_left_is_forgotten(tmp_path, then):
    async def app(*_: Any) -> None:
        pytest.fail("half a request reached the application")

    door = _Door(tmp_path / "keys.json", app, body_limits=BodyLimits(grace_s=0.02))
    messages = [{"type": "http.request", "body": b"{", "more_body": True}]
    messages += [{"type": "http.disconnect"}] if then == "disconnect" else []

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Future()

    headers = [(b"content-length", b"9"), (b"authorization", door.bearer("single")["authorization"].encode())]
    sent = asyncio.run(_call(door.gate, _scope(headers=headers), receive))
    assert [message["status"] for message in sent[:1]] == ([408] if then == "silence" else [])
    assert door.access._allowances["single"].running == 0


@pytest.mark.parametrize("begun", ["", "text/event-stream; charset=utf-8", "application/json"])
def test_a_request_that_takes_too_long_is_ended(begun):
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            if begun:
                await send(
                    {"type": "http.response.start", "status": 200, "headers": [(b"content-type", begun.encode())]}
                )
                await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await asyncio.Future()
        finally:
            ended.append(True)

    gate = _open(app, request_s=0.02)
    if begun == "application/json":
        with pytest.raises(ResponseBroken):
            asyncio.run(_call(gate, _scope()))
    else:
        sent = asyncio.run(_call(gate, _scope()))
        body = sent[-1]["body"]
        assert sent[0]["status"] == (200 if begun else 504) and not sent[-1].get("more_body")
        assert json.loads(body.removeprefix(b"data: "))["error"]["code"] == "request_timeout"
    assert ended == [True]


# -- what comes through, and what comes out


def test_a_stream_comes_through_piece_by_piece_and_a_disconnect_ends_it(door):
    """With FastAPI inside, as in the ingress."""

    async def scenario() -> None:
        gone, closed = asyncio.Event(), asyncio.Event()
        sent: asyncio.Queue[Any] = asyncio.Queue()
        api = FastAPI()

        async def pieces() -> Any:
            try:
                for number in range(3):
                    yield f"data: {number}\n\n"
                await asyncio.Future()
            finally:
                closed.set()

        @api.post("/v1/completions")
        async def completions() -> StreamingResponse:
            return StreamingResponse(pieces(), media_type="text/event-stream")

        api.add_middleware(Gate, access=door.access)  # type: ignore[arg-type]

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        bearer = [(b"authorization", door.bearer("single")["authorization"].encode())]
        request = asyncio.create_task(api(_scope("/v1/completions", bearer), receive, sent.put))
        assert (await sent.get())["status"] == 200
        assert [(await sent.get())["body"] for _ in range(3)] == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]
        assert not closed.is_set()
        gone.set()
        await asyncio.wait_for(closed.wait(), 5)
        await request

    asyncio.run(scenario())


@pytest.mark.parametrize("begun", [False, True])
def test_an_unforeseen_failure_is_an_answer_and_a_log_line_without_what_it_says(begun, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("the prompt was: my secret")

    if begun:
        with pytest.raises(ResponseBroken) as caught:
            asyncio.run(_call(_open(app), _scope()))
        assert "secret" not in str(caught.value) and caught.value.__suppress_context__
    else:
        response = _ask(_open(app))
        assert response.status_code == 500 and _error(response)["code"] == "internal_error"
        assert response.headers["x-request-id"] in caplog.text
    assert (
        "ValueError" in caplog.text
        and "test_gate.py" in caplog.text
        and "my secret" not in caplog.text.replace('raise ValueError("the prompt was: my secret")', "")
    )


def test_the_applications_own_refusals_pass():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ApiError(418, "teapot", code="teapot")

    response = _ask(_open(app))
    assert response.status_code == 418 and _error(response)["code"] == "teapot"


@pytest.mark.parametrize(
    ("came", "kept"),
    [
        (b"0123-abc.DEF_:", True),
        (b"x" * 64, True),
        (b"x" * 65, False),
        (b"", False),
        (b"a b", False),
        (b'"}\x1b[31m', False),
        (b"\xff\xfe", False),
        (b"a\n", False),
    ],
)
def test_an_id_that_came_is_kept_when_it_is_plain_and_its_giver_says_it(came, kept):
    async def scenario() -> None:
        sent = await _call(_open(), _scope(headers=[(b"x-request-id", came)]))
        told = json.loads(sent[1]["body"])["id"]
        assert (told == came.decode(errors="replace")) is kept and len(told) <= 64 and told.isascii()
        assert not [name for name, _ in sent[0]["headers"] if name == b"x-request-id"]
        sent = await _call(_open(), _scope(headers=[(b"x-request-id", came)], **{DIRECT: True}))
        said = [value.decode() for name, value in sent[0]["headers"] if name == b"x-request-id"]
        assert said == [json.loads(sent[1]["body"])["id"]] and (said == [came.decode(errors="replace")]) is kept
        sent = await _call(_open(), _scope())
        made = dict(sent[0]["headers"])[b"x-request-id"].decode()
        assert json.loads(sent[1]["body"])["id"] == made and len(made) == 32

    asyncio.run(scenario())


def test_there_is_no_way_in_through_a_websocket(door):
    async def app(*_: Any) -> None:
        pytest.fail("let in")

    for gate in (_open(app), Gate(app, door.access)):
        sent = asyncio.run(_call(gate, {"type": "websocket", "path": "/health", "headers": []}))
        assert [message["type"] for message in sent] == ["websocket.close"]


# -- web pages of other origins

PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
ORIGIN = "https://chat.example.org"


def test_web_pages_may_not_ask_unless_their_origin_is_named(door):
    closed = _ask(door.gate, method="OPTIONS", headers={"Origin": ORIGIN, **PREFLIGHT})
    assert closed.status_code == 401 and not any(name.startswith("access-control") for name in closed.headers)
    gate = door.gate
    door.access.set(door.file.uri, (ORIGIN,))
    asked = _ask(gate, method="OPTIONS", headers={"Origin": ORIGIN, **PREFLIGHT})
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
    refused = _ask(gate, headers={"Origin": ORIGIN})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == ORIGIN
    answer = _ask(gate, headers={"Origin": ORIGIN, **door.bearer("slow")})
    assert "x-ratelimit-remaining-requests" in answer.headers["access-control-expose-headers"]
    for response in (asked, refused, answer):
        assert "access-control-allow-credentials" not in response.headers
    for origin in ("https://evil.org", "null", f"{ORIGIN}.evil.org", "http://chat.example.org", f"{ORIGIN}:444"):
        other = _ask(gate, method="OPTIONS", headers={"Origin": origin, **PREFLIGHT})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
        other = _ask(gate, headers={"Origin": origin, **door.bearer("plain")})
        assert "access-control-allow-origin" not in other.headers
    door.access.set(door.file.uri)
    assert "access-control-allow-origin" not in _ask(gate, headers={"Origin": ORIGIN}).headers
