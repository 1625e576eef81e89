import threading
from dataclasses import replace

import pytest
import torch

from llama.engine import Engine, EngineClosed, EngineConfig, SamplingParams
from llama.engine.swap import WeightSwap
from tests.llama.engine.models import plain_greedy, random_model

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def engine():
    engine = Engine(random_model(), config=EngineConfig(num_blocks=64, block_size=4), weights_id="old")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def new():
    return random_model(seed=1).state_dict()


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_a_future_that_somebody_gave_up_does_not_end_the_engine(engine, new):
    """`asyncio.wrap_future` cancels it when the task that waits is cancelled."""
    engine.add_request([1], GREEDY)
    engine.step()
    swap = engine.load_weights(new, weights_id="new")
    assert not swap.cancel()
    finish(engine)
    assert swap.done() and swap.exception() is None
    assert engine.generate([[1, 2]], GREEDY)[0].token_ids == plain_greedy(random_model(seed=1), [1, 2], 8)


def test_generate_leaves_no_swap_to_others(engine, new):
    """The thread that called `load_weights` waits and does not step."""
    inside, go_on = threading.Event(), threading.Event()
    run = engine._runner.run

    def gated_run(inputs):
        inside.set()
        assert go_on.wait(20)
        return run(inputs)

    engine._runner.run = gated_run
    generating = threading.Thread(target=engine.generate, args=([[1, 2]], GREEDY))
    generating.start()
    assert inside.wait(20)
    swap = engine.load_weights(new, weights_id="new")
    assert not swap.done()
    go_on.set()
    swap.result(timeout=20)
    generating.join()
    assert engine.weights_id == "new"


def test_an_engine_closed_while_the_weights_are_written_says_so(engine, new, monkeypatch):
    apply = WeightSwap.apply

    def closing_apply(self):
        apply(self)
        engine.close()

    monkeypatch.setattr(WeightSwap, "apply", closing_apply)
    swap = engine.load_weights(new, weights_id="new")
    assert isinstance(swap.exception(timeout=0), EngineClosed)


def test_a_hook_that_raises_leaves_nobody_waiting_for_the_weights(engine, new):
    engine.add_request([1], replace(GREEDY, max_tokens=2))
    engine.step()
    swap = engine.load_weights(new, weights_id="new")

    def on_events() -> None:
        raise OSError("no listener")

    engine.on_events = on_events
    with pytest.raises(OSError, match="no listener"):
        finish(engine)
    swap.result(timeout=0)


def test_what_is_no_weight_is_refused_at_the_door(engine, new):
    for value, message in (
        (torch.zeros(32, device="meta"), r"weights\['norm.weight'\] is a tensor on meta"),
        (torch.zeros(32).to_sparse(), r"weights\['norm.weight'\] is a tensor on cpu in layout torch.sparse"),
        ([0.0] * 32, r"weights\['norm.weight'\] is a list"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load_weights(new | {"norm.weight": value}, weights_id="new")
    for name in (5, None, "\ud800"):
        with pytest.raises(ValueError, match="weights_id="):
            engine.load_weights(new, weights_id=name)
        with pytest.raises(ValueError, match="weights_id="):
            Engine(random_model(), weights_id=name)
    assert engine.generate([[1, 2]], GREEDY)[0].token_ids == plain_greedy(random_model(), [1, 2], 8)
