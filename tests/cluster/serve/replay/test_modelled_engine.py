"""The modelled engine against the engine's own simulation, a schedule by hand, and what serving asks of an engine."""

import asyncio
import random
from collections.abc import Sequence

import pytest

from cluster.serve.replay.modelled_engine import ModelledEngine
from cluster.serve.replay.timing import StepTime
from cluster.serve.replay.virtual_time import run
from llama.engine import BlocksStored, EngineConfig, PromptTooLong, QueueFull, SamplingParams
from llama.engine.core import EngineCore
from llama.engine.request import Chunk
from llama.engine.scheduler import ScheduledTokens
from llama.engine.simulation import Simulation

CONFIG = EngineConfig(num_blocks=24, block_size=8, max_batched_tokens=32, max_running=8, max_waiting=80)
TIMING = StepTime(fixed_s=0.01, prefill_s_per_token=0.001, decode_s_per_context_token=0.0001)


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


async def _times(engine: ModelledEngine, prompt: Sequence[int], tokens: int, after: float = 0.0) -> list[float]:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(after)
    return [loop.time() async for _ in engine.stream(prompt, _params(tokens))]


def test_steps_take_what_they_would_take():
    async def main() -> tuple[list[float], list[float]]:
        engine = ModelledEngine(CONFIG, TIMING)
        return tuple(await asyncio.gather(_times(engine, range(40), 3), _times(engine, range(100, 110), 2, after=0.05)))

    first, second = run(main())
    # Steps: 32 of the first prompt; its other 8, and then the second prompt beside its decodes.
    one = 0.01 + 0.032
    two = one + 0.01 + 0.008
    three = two + 0.01 + 0.010 + 41 * 0.0001
    four = three + 0.01 + (42 + 11) * 0.0001
    assert first == pytest.approx([two, three, four])
    assert second == pytest.approx([three, four])


class _Cost:
    def seconds(self, scheduled: Sequence[ScheduledTokens]) -> float:
        return TIMING.seconds(scheduled)


@pytest.mark.parametrize("seed", range(3))
def test_it_does_what_the_engines_own_simulation_does(seed):
    source = random.Random(seed)
    stems = [[source.randrange(90) for _ in range(40)] for _ in range(3)]
    arrivals = []
    at = 0.0
    for _ in range(60):
        at += source.expovariate(200)
        stem = source.choice(stems)[: source.randrange(40)]
        prompt = stem + [source.randrange(90) for _ in range(source.randrange(1, 60))]
        arrivals.append((at, prompt, source.randrange(1, 25)))

    core = EngineCore(CONFIG, num_blocks=CONFIG.num_blocks, max_seq_len=1 << 20, weights_id="modelled")
    simulation = Simulation(core, _Cost())  # type: ignore[arg-type]
    for at, prompt, tokens in arrivals:
        simulation.at(at, lambda prompt=prompt, tokens=tokens: simulation.submit(prompt, _params(tokens)))
    simulation.run()

    async def main() -> tuple[list[list[float]], object]:
        engine = ModelledEngine(CONFIG, TIMING)
        times = await asyncio.gather(*(_times(engine, prompt, tokens, at) for at, prompt, tokens in arrivals))
        engine.check_integrity()
        return times, engine.stats()

    times, stats = run(main())
    for expected, got in zip(simulation.traces, times, strict=True):
        assert got == pytest.approx(expected.times)
    assert stats == core.stats()
    assert stats.cached_tokens > 100 and stats.preemptions + stats.prefix_waits > 0  # the load is worth simulating


def test_leaving_a_stream_frees_its_blocks():
    async def main() -> None:
        engine = ModelledEngine(CONFIG, TIMING)
        stream = engine.stream(range(40), _params(100))
        await anext(stream)
        assert engine.stats().running == 1
        await stream.aclose()
        assert engine.stats().running == 0 and engine.stats().free_blocks == CONFIG.num_blocks

    run(main())


def test_events_come_before_the_chunks_they_belong_to():
    async def main() -> list[object]:
        engine, log = ModelledEngine(CONFIG, TIMING), []
        engine.on_events = lambda: log.extend(engine.drain_events())
        chunks: list[Chunk] = []
        done = asyncio.Event()

        def sink(item: object) -> None:
            assert isinstance(item, Chunk)
            assert item.event_seq == log[-1].seq
            chunks.append(item)
            if item.finish_reason:
                done.set()

        engine.add_request(range(40), _params(2), sink=sink)
        await done.wait()
        assert [chunk.completion_tokens for chunk in chunks] == [1, 2]
        assert set(engine.snapshot().hashes) == {digest for event in log for digest in event.hashes}
        assert engine.cached_blocks(engine.snapshot().hashes) == 5
        engine.flush_cache()
        return log

    log = run(main())
    assert all(isinstance(event, BlocksStored) for event in log[:-1]) and log[-1].seq == len(log)


def test_what_it_cannot_take_it_refuses():
    async def main() -> None:
        engine = ModelledEngine(EngineConfig(num_blocks=4, block_size=8, max_waiting=1), TIMING)
        with pytest.raises(PromptTooLong, match="the limit is 31"):
            await anext(engine.stream(range(32), _params(1)))
        engine.add_request([1], _params(1), sink=lambda chunk: None)
        with pytest.raises(QueueFull):
            engine.add_request([1], _params(1), sink=lambda chunk: None)

    run(main())
