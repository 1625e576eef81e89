import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from pipelines.service.door import Door, TokenError, read_token
from pipelines.service.passes import COOKIE, Passes


def write(path: Path, text: bytes, mode: int = 0o600) -> str:
    path.write_bytes(text)
    path.chmod(mode)
    return str(path)


def test_a_token_is_one_word_in_a_file_of_its_owner_s(tmp_path: Path) -> None:
    assert read_token(write(tmp_path / "t", b"0123456789abcdef\n")) == "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (b"0123456789abcdef", 0o640, "open to others; chmod 600"),
        (b"0123456789abcdef", 0o604, "open to others"),
        (b"short", 0o600, "at least 16"),
        (b"", 0o600, "at least 16"),
        (b"0123456789 abcdef", 0o600, "one word"),
        (b"0123456789abcdef\nsecond-line-here", 0o600, "one word"),
        ("0123456789abcdefé".encode(), 0o600, "ASCII"),
    ],
)
def test_what_is_no_token_is_refused_unseen(tmp_path: Path, text: bytes, mode: int, words: str) -> None:
    with pytest.raises(TokenError, match=words) as caught:
        read_token(write(tmp_path / "t", text, mode))
    assert "abcdef" not in str(caught.value) and "short" not in str(caught.value).split(":")[0]


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="cannot be read: No such file"):
        read_token(str(tmp_path / "t"))


# -- the console


TOKEN = "a-token-of-some-length"
PASS = {"cookie": f"other=1; {COOKIE}={Passes(TOKEN).issue(time.time())}"}
OWN = {"origin": "http://127.0.0.1"}


async def _inside(scope: Any, receive: Any, send: Any) -> None:
    """What is behind the door: it says that somebody came in."""
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).accept()
    else:
        await PlainTextResponse("inside")(scope, receive, send)


def client(token: str | None = TOKEN, *, local_only: bool = True) -> TestClient:
    return TestClient(Door(_inside, token, local_only), base_url="http://127.0.0.1", follow_redirects=False)


def connects(http: TestClient, path: str, headers: dict[str, str]) -> bool:
    try:
        with http.websocket_connect(path, headers={"host": "127.0.0.1", **headers}):
            return True
    except WebSocketDisconnect as closed:
        assert closed.code == 1008
        return False


def test_the_console_opens_to_a_pass_and_sends_everybody_else_to_the_page_that_asks_for_the_token() -> None:
    for path in ("/", "/console", "/console/runs/r", "/console/_nicegui/x.js"):
        stranger = client().get(path)
        assert (stranger.status_code, stranger.headers["location"]) == (303, "/console/login")
        assert client().get(path, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 303
        inside = client().get(path, headers=PASS)
        assert (inside.text, inside.headers["content-security-policy"]) == ("inside", "frame-ancestors 'none'")
    assert client().get("/console/login").text == "inside"
    assert client().post("/console/login", content="token=x").text == "inside"
    assert client(None).get("/console/").text == "inside"


def test_a_pass_opens_nothing_but_the_console() -> None:
    assert client().get("/api/runs", headers=PASS).status_code == 401
    assert client().get("/consoles", headers=PASS).status_code == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_a_page_of_the_console_only_gets(method: str) -> None:
    answer = client().request(method, "/console/runs/r", headers=PASS)
    assert (answer.status_code, "use /api" in answer.text) == (405, True)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9", "http://127.0.0.1.evil.example", "x"]
)
def test_another_site_s_page_reaches_no_page_of_the_console(origin: str) -> None:
    assert client().get("/console/", headers={**PASS, "origin": origin}).status_code == 403
    assert client().post("/console/login", headers={"origin": origin}).status_code == 403
    assert not connects(client(), "/console/ws", {**PASS, "origin": origin})
    assert not connects(client(None), "/console/ws", {"origin": origin})


def test_a_page_connects_with_its_pass_and_from_the_service_s_own_site() -> None:
    assert connects(client(), "/console/ws", PASS | OWN)
    assert connects(client(None), "/console/ws", OWN)
    assert not connects(client(), "/console/ws", OWN)
    assert not connects(client(), "/console/ws", PASS)
    assert not connects(client(), "/console/ws", OWN | {"authorization": f"Bearer {TOKEN}"})
    assert not connects(client(), "/api/ws", PASS | OWN)


def test_a_name_that_was_turned_to_this_machine_is_refused() -> None:
    named = {"host": "evil.example", "origin": "http://evil.example"}
    assert client(None).get("/console/", headers=named).status_code == 403
    assert not connects(client(None), "/console/ws", named)
    assert connects(client(None, local_only=False), "/console/ws", named)
