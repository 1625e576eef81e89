"""The oracle's light engine against the modelled one."""

import asyncio
import random

import pytest

from cluster.serve.replay.modelled_engine import ModelledEngine
from cluster.serve.replay.rollout import Job, rollout
from cluster.serve.replay.timing import StepTime
from cluster.serve.replay.virtual_time import run
from llama.engine import EngineConfig, SamplingParams

TIMING = StepTime()


@pytest.mark.parametrize("seed", range(5))
def test_it_foresees_what_an_engine_does(seed):
    source = random.Random(seed)
    lengths = [(source.randrange(1, 9000), source.randrange(1, 300)) for _ in range(30)]
    config = EngineConfig(num_blocks=2000, block_size=512, max_batched_tokens=2048, max_running=1024)

    async def main() -> list[tuple[float, float]]:
        engine, loop = ModelledEngine(config, TIMING), asyncio.get_running_loop()

        async def one(prompt: int, tokens: int) -> tuple[float, float]:
            ids = [source.randrange(256) for _ in range(prompt)]
            params = SamplingParams(max_tokens=tokens, ignore_eos=True)
            times = [loop.time() async for _ in engine.stream(ids, params)]
            return times[0], times[-1]

        return await asyncio.gather(*(one(*length) for length in lengths))

    jobs = [Job(prompt, prompt, tokens, blocks=-(-prompt // 512)) for prompt, tokens in lengths]
    foreseen = rollout(jobs, start_s=0.0, free_blocks=2000, max_batched_tokens=2048, timing=TIMING)
    for got, expected in zip(foreseen, run(main()), strict=True):
        assert got == pytest.approx(expected)


def test_started_requests_go_on_from_where_they_are():
    fixed, context = TIMING.fixed_s, TIMING.decode_s_per_context_token
    jobs = [Job(0, 1000, 2, started=True), Job(100, 600, 1, started=True)]
    first, second = rollout(jobs, start_s=5.0, free_blocks=0, max_batched_tokens=2048, timing=TIMING)
    step = 5 + fixed + 100 / 32_000 + 1000 * context
    assert second == pytest.approx((step, step))
    assert first == pytest.approx((5.0, step + fixed + 1001 * context))


def test_who_finds_no_room_waits_for_it():
    jobs = [Job(512, 512, 10, blocks=1), Job(1024, 1024, 10, blocks=2)]
    roomy, tight = (
        rollout(jobs, start_s=0.0, free_blocks=free, max_batched_tokens=2048, timing=TIMING) for free in (3, 2)
    )
    assert roomy[1][0] < roomy[0][1]
    assert tight[1][0] > tight[0][1]
