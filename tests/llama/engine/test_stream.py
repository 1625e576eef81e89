import asyncio
import threading
from contextlib import aclosing
from dataclasses import replace

import pytest

from llama.engine import Chunk, Engine, EngineClosed, EngineConfig, EngineFailed, PromptTooLong, SamplingParams
from tests.llama.engine.models import MAX_SEQ_LEN, ByteTokenizer, ScriptedModel, plain_greedy, random_model

GREEDY = SamplingParams(temperature=0, max_tokens=20)


@pytest.fixture
def engine():
    engine = Engine(random_model(), config=EngineConfig(num_blocks=64, block_size=4, max_batched_tokens=16))
    yield engine
    engine.close()
    assert "engine-step" not in [thread.name for thread in threading.enumerate()]


async def collect(engine: Engine, prompt, params=GREEDY) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(prompt, params)]


def tokens(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def test_many_streams_at_once_give_what_generate_gives(engine):
    prompts = [[i, i + 1, i + 2, *range(i)] for i in range(12)]

    async def main() -> list[list[Chunk]]:
        return await asyncio.gather(*(collect(engine, prompt) for prompt in prompts))

    for prompt, chunks in zip(prompts, asyncio.run(main()), strict=True):
        assert tokens(chunks) == plain_greedy(engine._runner.model, prompt, 20)
        assert [chunk.finish_reason for chunk in chunks] == [None] * 19 + ["length"]
        assert [chunk.completion_tokens for chunk in chunks] == list(range(1, 21))
        assert {(chunk.prompt_tokens, chunk.num_cached_tokens) for chunk in chunks} == {(len(prompt), 0)}


def test_streams_generate_and_steps_share_one_engine(engine):
    model = engine._runner.model
    by_hand = engine.add_request([5, 5], GREEDY)

    async def main():
        streaming = asyncio.create_task(collect(engine, [1, 2, 3]))
        completions = await asyncio.to_thread(engine.generate, [[4], [6]], GREEDY)
        return await streaming, completions

    chunks, completions = asyncio.run(main())
    assert tokens(chunks) == plain_greedy(model, [1, 2, 3], 20)
    assert [c.token_ids for c in completions] == [plain_greedy(model, [token], 20) for token in (4, 6)]
    rest = []
    while engine.has_work:
        rest += engine.step()
    assert {chunk.request_id for chunk in rest} == {by_hand}
    assert tokens(rest) == plain_greedy(model, [5, 5], 20)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_an_abandoned_stream_is_aborted(engine, how):
    long = replace(GREEDY, max_tokens=MAX_SEQ_LEN)
    run = engine._runner.run
    steps = 0
    abandoned = threading.Event()

    def run_five_steps_then_wait(inputs):
        nonlocal steps
        steps += 1
        assert steps <= 5 or abandoned.wait(20)
        return run(inputs)

    async def read(gate: asyncio.Event) -> None:
        async for _ in engine.stream([1, 2], long):
            gate.set()

    async def main() -> None:
        if how == "close":
            async with aclosing(engine.stream([1, 2], long)) as stream:
                async for _ in stream:
                    break
        else:
            gate = asyncio.Event()
            task = asyncio.create_task(read(gate))
            await gate.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert engine.stats().running == 0
        abandoned.set()
        assert tokens(await collect(engine, [3])) == plain_greedy(engine._runner.model, [3], 20)
        assert engine.stats().generated_tokens <= 5 + 20

    engine._runner.run = run_five_steps_then_wait
    asyncio.run(main())
    engine.check_integrity()
    assert engine.stats().free_blocks == 64


def test_abort_while_the_model_runs(engine):
    """The blocks of the aborted request are given out again; the step in flight must neither commit nor emit."""
    inside, go_on = threading.Event(), threading.Event()
    run = engine._runner.run

    def gated_run(inputs):
        inside.set()
        assert go_on.wait(20)
        return run(inputs)

    engine._runner.run = gated_run
    names = [engine.add_request([token] * 9, replace(GREEDY, max_tokens=3)) for token in (1, 2)]
    stepping = threading.Thread(target=engine.step)
    stepping.start()
    assert inside.wait(20)
    engine.abort(names[0])
    assert engine.stats().running == 1
    engine.check_integrity()
    go_on.set()
    stepping.join()
    chunks = []
    while engine.has_work:
        chunks += engine.step()
        engine.check_integrity()
    assert not any(chunk.request_id == names[0] and chunk.token_ids for chunk in chunks)
    assert engine.snapshot().hashes and engine.stats().generated_tokens == 3


def test_abort_between_the_step_and_its_chunks(engine):
    """What the step computed for the aborted request is not handed out after its last chunk, nor under a reused id."""
    engine.add_request([1, 2, 3, 4], GREEDY, request_id="mine")

    def on_events() -> None:
        engine.on_events = lambda: None
        engine.abort("mine")
        engine.add_request([9], replace(GREEDY, max_tokens=2), request_id="mine")

    engine.on_events = on_events
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    assert [chunk.finish_reason for chunk in chunks] == ["abort", None, "length"]
    assert tokens(chunks) == plain_greedy(engine._runner.model, [9], 2)


def test_abort_from_outside_ends_the_stream(engine):
    async def main() -> list[Chunk]:
        chunks = []
        async for chunk in engine.stream([1, 2], replace(GREEDY, max_tokens=MAX_SEQ_LEN), request_id="mine"):
            chunks.append(chunk)
            engine.abort("mine")
            engine.abort("nobody")
        return chunks

    assert asyncio.run(main())[-1].finish_reason == "abort"


def test_a_crash_reaches_every_stream_and_later_calls():
    engine = Engine(ScriptedModel(list(b"abcdefghijklm"), fail_at=4), ByteTokenizer())

    async def main():
        results = await asyncio.gather(*(collect(engine, "a") for _ in range(3)), return_exceptions=True)
        with pytest.raises(EngineFailed, match="scripted failure"):
            await collect(engine, "a")
        return results

    results = asyncio.run(asyncio.wait_for(main(), 20))
    assert [type(result) for result in results] == [EngineFailed] * 3
    assert all(isinstance(result.__cause__, ArithmeticError) for result in results)
    engine.close()


@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_a_hook_that_raises_is_a_crash_too(engine, error):
    def on_events() -> None:
        raise error("no listener")

    engine.on_events = on_events
    with pytest.raises(EngineFailed, match="no listener"):
        asyncio.run(asyncio.wait_for(collect(engine, [1] * 8), 20))


def test_an_interrupt_that_ends_the_step_thread_is_a_crash_too(engine, monkeypatch):
    def run(inputs: object) -> None:
        raise SystemExit("leaving")

    monkeypatch.setattr(engine._runner, "run", run)
    with pytest.raises(EngineFailed, match="leaving"):
        asyncio.run(asyncio.wait_for(collect(engine, [1] * 8), 20))


def test_close_ends_open_streams(engine):
    async def main() -> list[Chunk]:
        chunks = []
        async for chunk in engine.stream([1, 2], replace(GREEDY, max_tokens=MAX_SEQ_LEN)):
            chunks.append(chunk)
            if len(chunks) == 1:  # others may be on their way
                engine.add_request([3], GREEDY)  # its last chunk is nobody's any more
                await asyncio.to_thread(engine.close)
        assert not engine.has_work
        with pytest.raises(EngineClosed):
            await collect(engine, [1])
        return chunks

    assert asyncio.run(main())[-1].finish_reason in ("abort", "length")


def test_bad_input_is_raised_at_the_first_item(engine):
    with pytest.raises(PromptTooLong):
        asyncio.run(collect(engine, [1] * MAX_SEQ_LEN))
    with pytest.raises(ValueError, match="prompt is empty"):
        asyncio.run(collect(engine, []))
    assert not engine.has_work


def test_text_streams_in_whole_characters_without_the_stop_string():
    engine = Engine(ScriptedModel([*"a né 🚀<end>tail".encode(), 256]), ByteTokenizer())
    chunks = asyncio.run(collect(engine, "a", replace(GREEDY, max_tokens=50, stop=("<end>",))))
    engine.close()
    assert "".join(chunk.text for chunk in chunks) == " né 🚀"
    assert not any("\ufffd" in chunk.text for chunk in chunks)
    assert chunks[-1].finish_reason == "stop"
