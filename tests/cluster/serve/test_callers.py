"""What a handler learns of who asks."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import Request

from cluster.serve.api_error import ApiError
from cluster.serve.callers import ANONYMOUS, CALLER, METER, Caller, Meter, caller_of, meter_of
from cluster.serve.keys import KeyFile, Keys
from cluster.serve.limits import Allowance, Limits
from llama.engine import generation_root, hash_blocks
from tests.cluster.serve.local_api import MODEL, LocalApi
from tests.cluster.serve.tiny_model import save_tiny_model


def _http(**state: object) -> Request:
    return Request({"type": "http", "headers": [], "state": state})


def test_without_a_gate_everybody_is_anonymous_and_counts_nothing():
    http = _http()
    assert caller_of(http) is ANONYMOUS and ANONYMOUS.operator and ANONYMOUS.salt == ""
    meter_of(http).prompt(10**9)
    assert ANONYMOUS.priority_for(-100) == -100 and ANONYMOUS.priority_for(None) == 0


def test_the_gates_notes_are_found():
    caller, meter = Caller("alice", "alice", 0, False), Meter()
    http = _http(**{CALLER: caller, METER: meter})
    assert caller_of(http) is caller and meter_of(http) is meter


@pytest.mark.parametrize(
    ("highest", "asked", "given"), [(0, None, 0), (0, 3, 3), (-2, None, 0), (-2, -2, -2), (5, None, 5), (5, 5, 5)]
)
def test_priorities_that_a_key_allows(highest, asked, given):
    assert Caller("a", priority=highest).priority_for(asked) == given


@pytest.mark.parametrize(("highest", "asked"), [(0, -1), (5, 4), (5, 0)])
def test_priorities_that_it_does_not(highest, asked):
    with pytest.raises(ApiError, match=f"give {highest} or more") as caught:
        Caller("a", priority=highest).priority_for(asked)
    assert (caught.value.status, caught.value.param) == (403, "priority")


def test_a_meter_counts_what_is_known_when_it_is_known_and_gives_all_back():
    allowance = Allowance(Limits(tokens_per_minute=100), lambda: 0.0)

    def left() -> int:
        return int(allowance.headers()["x-ratelimit-remaining-tokens"])

    meter = Meter(allowance)
    meter.prompt(60)
    with pytest.raises(ApiError) as caught:
        meter.prompt(60)
    assert (caught.value.status, caught.value.kind, left()) == (429, "tokens", 40)
    meter.generated(30)
    assert left() == 10
    meter.generated(30)
    with pytest.raises(ApiError):
        Meter(allowance).prompt(1)
    meter.refund()
    meter.refund()
    assert left() == 100


# -- what OpenAI's endpoints make of it


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[LocalApi]:
    api = LocalApi(save_tiny_model(tmp_path_factory.mktemp("model")))
    api.access._clock = lambda: 0.0
    yield api
    api.close()


@pytest.fixture
def keys(api, tmp_path) -> dict[str, str]:
    """Keys of fresh limits, by name."""
    file, known, keys = KeyFile(tmp_path / "keys.json"), Keys(), {}
    for name, limits in {
        "alice": {"isolated": True},
        "bob": {"priority": 2},
        "thrifty": {"tokens_per_minute": 60},
    }.items():
        known, keys[name] = known.with_key(name, **limits)
    with file.changing() as replace:
        replace(known)
    api.access.set(None)
    api.access.set(file.uri)
    return keys


def _ask(api: LocalApi, key: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 4, "ignore_eos": True} | body

    async def ask() -> httpx.Response:
        async with api.http() as http:
            return await http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

    return asyncio.run(ask())


CHAT = {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"prompt": list(range(6, 40))}


@pytest.mark.parametrize("asked", [COMPLETION, CHAT], ids=["completion", "chat"])
def test_the_engine_is_asked_in_the_callers_name(api, keys, asked):
    for name, salt, priority in (("alice", "alice", 0), ("bob", "", 2)):
        assert _ask(api, keys[name], **asked).status_code == 200
        request = api.engine.asked[-1]
        assert (request.salt, request.priority) == (salt, priority)
        assert list(request.hashes) == hash_blocks(generation_root("w", salt=salt), request.token_ids, 16)
    refused = _ask(api, keys["bob"], priority=1, **asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "priority")
    assert _ask(api, keys["bob"], priority=7, **asked).status_code == 200 and api.engine.asked[-1].priority == 7


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_prompts_and_answers_are_counted(api, keys, stream):
    def left() -> int:
        return int(api.access._allowances["thrifty"].headers()["x-ratelimit-remaining-tokens"])

    first = _ask(api, keys["thrifty"], prompt=[6] * 10, n=2, max_tokens=5, stream=stream)
    assert first.status_code == 200 and first.headers["x-ratelimit-limit-tokens"] == "60"
    assert left() == 40
    asked = len(api.engine.asked)
    refused = _ask(api, keys["thrifty"], prompt=[[6] * 30, [7] * 30], stream=stream)
    assert refused.status_code == 429 and refused.json()["error"]["type"] == "tokens"
    assert refused.headers["retry-after"] == "20" and len(api.engine.asked) == asked
    assert _ask(api, keys["thrifty"], prompt=[6] * 38, max_tokens=5, stream=stream).status_code == 200
    assert left() == 0
    assert _ask(api, keys["thrifty"], prompt=[6], stream=stream).status_code == 429
    assert _ask(api, keys["alice"], prompt=[6], stream=stream).status_code == 200
