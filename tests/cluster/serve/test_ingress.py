"""What the ingress does with a prompt before it is routed. The rest is in test_serving."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.serve.ingress import Ingress
from cluster.serve.messages import GenerateRequest, ReplicaInfo, ReplicaLoad, ReplicaUpdate
from cluster.serve.protocol import ApiError
from cluster.serve.state import RoutingState
from llama.engine import CacheSnapshot

MAX_SEQ_LEN = 8
LONGEST_TOKEN = 3


class _Tokenizer:
    """One token a call; notes in which thread."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def encode(self, text: str) -> list[int]:
        self.threads.append(threading.get_ident())
        return [1]

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode("")


class _Ingress(Ingress):
    def __init__(self) -> None:
        """Without Ingress's own, which wants a model and Serve."""

    def __del__(self) -> None:  # type: ignore[override]
        """Not Serve's asynchronous hook, which Python would not await."""


def _update(replica: str, weights_id: str) -> ReplicaUpdate:
    info = ReplicaInfo(replica, 1, "node", weights_id, 100, MAX_SEQ_LEN, 16, 10)
    return ReplicaUpdate("e", ReplicaLoad(0, 0, 9, 0, 0, 0, 0, 0, 0), snapshot=CacheSnapshot("e", 0, ()), info=info)


@pytest.fixture
def ingress() -> Ingress:
    """One that returns its requests instead of sending them."""
    ingress = _Ingress()
    ingress._served_name = "m"
    ingress._weights_id = "w"
    ingress._longest_token = LONGEST_TOKEN
    ingress._tokenizer = _Tokenizer()  # type: ignore[assignment]
    ingress._state = RoutingState()
    ingress._state.set_replicas(["a", "b"])
    ingress._state.apply_update("a", _update("a", "w"))

    async def respond(generate: GenerateRequest, *_: object) -> GenerateRequest:
        return generate

    ingress._respond = respond  # type: ignore[method-assign, assignment]
    return ingress


def _post(ingress: Ingress, text: str, chat: bool) -> GenerateRequest:
    body: dict[str, Any] = {"model": "m"}
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}

    async def stream() -> AsyncIterator[bytes]:
        yield json.dumps(body).encode()

    http: Any = SimpleNamespace(headers={"content-type": "application/json"}, stream=stream)
    return asyncio.run((ingress.chat_completions if chat else ingress.completions)(http))  # type: ignore[return-value]


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised_and_others_are_tokenised_off_the_loop(ingress, chat):
    with pytest.raises(ApiError) as caught:
        _post(ingress, "x" * (MAX_SEQ_LEN * LONGEST_TOKEN + 1), chat)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert ingress._tokenizer.threads == []
    assert _post(ingress, "x" * (MAX_SEQ_LEN * LONGEST_TOKEN), chat).weights_id == "w"
    assert len(ingress._tokenizer.threads) == 1 and threading.get_ident() not in ingress._tokenizer.threads


def test_a_request_waits_for_a_replica_of_its_own_model(ingress, monkeypatch):
    monkeypatch.setattr("cluster.serve.ingress.FIRST_REPLICA_TIMEOUT_S", 0.02)
    ingress._state.apply_update("a", _update("a", "old"))
    with pytest.raises(ApiError) as caught:
        _post(ingress, "x", chat=False)
    assert (caught.value.status, caught.value.code) == (503, "no_replica")
    ingress._state.apply_update("b", _update("b", "w"))
    assert _post(ingress, "x", chat=False).weights_id == "w"
