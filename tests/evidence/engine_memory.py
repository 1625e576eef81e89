"""Evidence that the engine leaks nothing: resident memory after 20,000 requests within 2% of that after 2,000.

    python tests/evidence/engine_memory.py [--requests 20000]

A small model behind the engine's own step thread serves streams of random prompts: shared prefixes, completions,
aborts, deadlines, penalties and now and then new weights. The block events are drained as a replica would. Integrity is
checked every 1,000 requests, and at the end every block is free. Needs a few minutes of one core; exits non-zero when
the bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import time
from contextlib import aclosing

import torch

from llama.bench.harness import resident_mib
from llama.config import ModelConfig
from llama.engine import Engine, EngineConfig, SamplingParams
from llama.model import Transformer

LARGEST_GROWTH = 1.02
IN_FLIGHT = 32
CONFIG = ModelConfig(vocab_size=512, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=256)


def build(seed: int) -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(seed)
    return model


async def request(engine: Engine, rng: random.Random, families: list[list[int]]) -> None:
    prompt = rng.choice(families)[: rng.randrange(1, 64)] + [rng.randrange(512) for _ in range(rng.randrange(1, 16))]
    params = SamplingParams(
        max_tokens=rng.randrange(1, 12),
        temperature=rng.choice([0.0, 1.0]),
        top_p=rng.choice([1.0, 0.9]),
        n=rng.choice([1, 1, 1, 2]),
        logprobs=rng.choice([None, None, 2]),
        seed=rng.randrange(1000),
    )
    stream = engine.stream(
        prompt,
        params,
        salt=f"tenant-{rng.randrange(100_000)}" if rng.random() < 0.2 else "",
        priority=rng.choice([0, 0, 1]),
        timeout_s=rng.choice([None, None, None, 0.05]),
    )
    leave_after = rng.randrange(1, 5) if rng.random() < 0.1 else None
    received = 0
    async with aclosing(stream) as chunks:  # type: ignore[type-var]
        async for _ in chunks:
            received += 1
            if received == leave_after:
                return


async def serve(engine: Engine, rng: random.Random, families: list[list[int]], count: int) -> None:
    free = asyncio.Semaphore(IN_FLIGHT)

    async def one() -> None:
        try:
            await request(engine, rng, families)
        finally:
            free.release()

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            await free.acquire()
            group.create_task(one())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    requests = parser.parse_args().requests
    torch.set_num_threads(1)
    rng = random.Random(3)
    families = [[rng.randrange(512) for _ in range(64)] for _ in range(8)]
    weights = [build(seed).state_dict() for seed in range(2)]
    engine = Engine(build(0), config=EngineConfig(num_blocks=256, max_batched_tokens=128, max_running=16))
    engine.on_events = engine.drain_events  # type: ignore[assignment]
    early = requests // 10
    resident: dict[int, float] = {}
    began = time.monotonic()
    with asyncio.Runner() as runner:
        for done in range(early // 2, requests + 1, early // 2):
            runner.run(serve(engine, rng, families, early // 2))
            swap = done // (early // 2)
            engine.load_weights(weights[swap % 2], weights_id=f"weights-{swap}").result(timeout=60)
            engine.check_integrity()
            gc.collect()
            resident[done] = resident_mib()
            print(f"{done} requests, {time.monotonic() - began:.0f} s: {resident[done]:.1f} MiB")
    stats = engine.stats()
    engine.close()
    growth = resident[requests] / resident[early]
    print(
        f"after {requests} requests {growth:.4f} times the memory after {early} (at most {LARGEST_GROWTH}); "
        f"{stats.preemptions} preemptions, {stats.timeouts} timeouts, {stats.weight_swaps} swaps, "
        f"{stats.block_copies} copied blocks, {stats.num_blocks - stats.free_blocks} blocks leaked"
    )
    return 0 if growth <= LARGEST_GROWTH and stats.free_blocks == stats.num_blocks else 1


if __name__ == "__main__":
    sys.exit(main())
