"""What becomes of a prompt before it is routed."""

import asyncio
import threading
from collections.abc import Mapping, Sequence

import pytest

from cluster.serve import served_model
from cluster.serve.api_error import ApiError
from cluster.serve.served_model import ServedModel
from cluster.serve.state import RoutingState
from tests.cluster.serve.local_api import routing_state
from tests.cluster.serve.reply_cases import TOKENIZER

MAX_SEQ_LEN = 8


class _Tokenizer:
    """One token a call; notes in which thread. The longest entry of its vocabulary has 300 characters."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.backend = self

    def get_vocab(self) -> dict[str, int]:
        return {"x" * 300: 0}

    def encode(self, text: str) -> list[int]:
        self.threads.append(threading.get_ident())
        return [1]

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> list[int]:
        return self.encode("")


def _model() -> tuple[ServedModel, _Tokenizer]:
    tokenizer = _Tokenizer()
    return ServedModel("m", "family", tokenizer, routing_state("w", 100, MAX_SEQ_LEN)), tokenizer  # type: ignore[arg-type]


def _encode(model: ServedModel, text: str, chat: bool) -> list[int]:
    turn = {"role": "user", "content": text}
    return asyncio.run(model.encode_chat([turn]) if chat else model.encode(text, "prompt"))


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised_and_long_ones_are_tokenised_off_the_loop(chat):
    model, tokenizer = _model()
    with pytest.raises(ApiError) as caught:
        _encode(model, "x" * (MAX_SEQ_LEN * 300 + 1), chat)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert tokenizer.threads == []
    assert _encode(model, "x" * (MAX_SEQ_LEN * 300), chat) == [1]
    assert len(tokenizer.threads) == 1 and threading.get_ident() not in tokenizer.threads


def test_a_request_waits_for_a_replica_of_its_own_model(monkeypatch):
    monkeypatch.setattr(served_model, "FIRST_REPLICA_TIMEOUT_S", 0.02)
    model, _ = _model()
    model.family = "other"
    with pytest.raises(ApiError) as caught:
        _encode(model, "x", chat=False)
    assert (caught.value.status, caught.value.code) == (503, "no_replica")
    model.family = "family"
    assert _encode(model, "x", chat=False) == [1]


def test_a_replica_that_comes_is_found():
    state = RoutingState()
    model = ServedModel("m", "family", TOKENIZER, state)

    async def run() -> str:
        task = asyncio.create_task(model.info())
        await asyncio.sleep(0.01)
        state.set_replicas(["replica-1"])
        there = routing_state("w", 100, 8)
        model._state = there
        return (await task).weights_id

    assert asyncio.run(run()) == "w"


@pytest.mark.parametrize(
    ("token_ids", "code"),
    [([], "invalid_value"), ([1] * MAX_SEQ_LEN, "context_length_exceeded"), ([1, 100], "invalid_value")],
)
def test_prompts_that_no_engine_would_take(token_ids, code):
    model, _ = _model()
    with pytest.raises(ApiError) as caught:
        asyncio.run(model.check_prompt(token_ids, "prompt"))
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "prompt", code)
    asyncio.run(model.check_prompt([1] * (MAX_SEQ_LEN - 1), "prompt"))


def test_another_models_name():
    model, _ = _model()
    model.check_name("m")
    with pytest.raises(ApiError) as caught:
        model.check_name("../m")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
