"""What an engine says of itself while it works: health, load, timing."""

import threading
from dataclasses import replace

import pytest

from llama.engine import (
    Engine,
    EngineConfig,
    EngineFailed,
    SamplingParams,
    generation_root,
    hash_blocks,
)
from tests.llama.engine.models import random_model

GREEDY = SamplingParams(temperature=0, max_tokens=4)
STUCK_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(clock):
    config = EngineConfig(num_blocks=64, block_size=4, max_batched_tokens=16, max_running=2)
    engine = Engine(random_model(), config=config, clock=clock)
    yield engine
    engine.close()


def test_a_step_that_does_not_end_is_noticed_after_its_time_and_forgiven_when_it_ends(engine, clock, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()
    run = engine._runner.run

    def hanging(inputs):
        entered.set()
        assert go_on.wait(20)
        return run(inputs)

    clock.now += 10 * STUCK_S  # idleness is no illness
    engine.check_health(STUCK_S)
    monkeypatch.setattr(engine._runner, "run", hanging)
    ended = threading.Event()
    engine.add_request([1, 2, 3], replace(GREEDY, max_tokens=1), sink=lambda item: ended.set())
    assert entered.wait(20)
    clock.now += STUCK_S
    engine.check_health(STUCK_S)
    clock.now += 1
    with pytest.raises(EngineFailed, match="no step has ended for 61 s"):
        engine.check_health(STUCK_S)
    go_on.set()
    assert ended.wait(20)
    while engine.has_work:
        pass
    engine.check_health(STUCK_S)


def test_a_step_thread_that_is_gone_is_noticed_once_there_is_work(engine, monkeypatch):
    done = threading.Event()
    engine.add_request([1], replace(GREEDY, max_tokens=1), sink=lambda item: done.set())
    assert done.wait(20)
    thread = engine._thread
    with engine._work:  # as if something unforeseen had ended it
        engine._closed = True
        engine._work.notify_all()
    thread.join(20)
    engine._closed = False
    engine.check_health(STUCK_S)
    engine.add_request([1], GREEDY)
    with pytest.raises(EngineFailed, match="the step thread is gone"):
        engine.check_health(STUCK_S)


def test_a_failed_step_is_told_whoever_met_it(engine, monkeypatch):
    monkeypatch.setattr(engine._runner, "run", lambda inputs: 1 / 0)
    engine.add_request([1], GREEDY)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    with pytest.raises(EngineFailed, match="division"):
        engine.check_health(STUCK_S)


def test_a_sinks_chunks_come_from_the_background_and_not_from_step(engine):
    chunks, ended = [], threading.Event()

    def sink(chunk) -> None:
        chunks.append(chunk)
        if chunk.finish_reason is not None:
            ended.set()

    name = engine.add_request([1, 2, 3], GREEDY, sink=sink)
    assert ended.wait(20)
    assert [chunk.completion_tokens for chunk in chunks] == [1, 2, 3, 4]
    assert {chunk.request_id for chunk in chunks} == {name} and engine.step() == []


def test_what_waits_is_counted_without_what_was_cached_when_it_came(engine):
    prompt = list(range(30))
    engine.generate([prompt], GREEDY)
    hashes = hash_blocks(generation_root(""), prompt, 4)
    assert engine.cached_blocks(hashes) == len(hashes) == 7
    assert engine.cached_blocks([b"?" * 16, *hashes]) == 0
    engine.add_request(prompt, GREEDY)
    assert engine.stats().pending_prefill_tokens == 2
    engine.add_request(prompt[:28], GREEDY)  # of a prompt that is cached whole, the last block is computed
    assert engine.stats().pending_prefill_tokens == 2 + 4
    engine.add_request([9, *prompt], GREEDY)
    assert engine.stats().pending_prefill_tokens == 2 + 4 + 31
    engine.add_request(prompt, replace(GREEDY, prompt_logprobs=0))  # computes it all
    assert engine.stats().pending_prefill_tokens == 2 + 4 + 31 + 30


def test_the_last_chunk_tells_how_the_request_fared(engine, clock):
    names = [engine.add_request([token] * 20, GREEDY) for token in (1, 2, 3)]
    timings = {}
    for _ in range(40):
        clock.now += 0.5
        for chunk in engine.step():
            assert (chunk.timing is None) == (chunk.finish_reason is None)
            if chunk.timing is not None:
                timings[chunk.request_id] = chunk.timing
        if not engine.has_work:
            break
    # 20 tokens take two steps of 16; four tokens are generated, the first by the step that ends the prefill.
    assert timings[names[0]].queue_s == 0.5 and timings[names[0]].steps == 5
    assert timings[names[2]].queue_s > timings[names[1]].queue_s >= 0.5
    assert {timing.preemptions for timing in timings.values()} == {0}


def test_a_preempted_request_says_so(clock):
    engine = Engine(random_model(), config=EngineConfig(num_blocks=10, block_size=4, max_running=4), clock=clock)
    engine.add_request(list(range(8)), replace(GREEDY, max_tokens=24))
    engine.add_request(list(range(20, 28)), replace(GREEDY, max_tokens=24))
    timings = []
    while engine.has_work:
        timings += [chunk.timing for chunk in engine.step() if chunk.timing]
    assert sum(timing.preemptions for timing in timings) == engine.stats().preemptions > 0
    engine.close()
