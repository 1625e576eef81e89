"""Our side of `python -m llama.bench engine`: the engine as it comes, its cache as large as the bench needs."""

from __future__ import annotations

from typing import Any

import torch

from llama.bench.peers.driver import Answer, serve, work_in_steps
from llama.engine import Engine, EngineConfig, SamplingParams
from llama.hf import load_pretrained


class CaravanSteps:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, name: str, prompt: list[int], generate: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=generate, ignore_eos=True)
        self._engine.add_request(prompt, params, request_id=name)

    def step(self) -> list[tuple[str, list[int]]]:
        return [(chunk.request_id, chunk.token_ids) for chunk in self._engine.step()]

    def forget(self) -> None:
        self._engine.flush_cache()


def start(settings: dict[str, Any]) -> tuple[Answer, Any]:
    torch.set_num_threads(settings["threads"])
    config = EngineConfig(
        num_blocks=-(-settings["cache_tokens"] // EngineConfig.block_size),
        max_running=max(settings["batch"], EngineConfig.max_running),
    )
    engine = Engine(load_pretrained(settings["directory"], dtype=torch.bfloat16), config=config)
    text = f"torch {torch.__version__}, {config.max_batched_tokens} tokens a step, blocks of {config.block_size}"
    return {"version": "", "settings": text}, work_in_steps(CaravanSteps(engine))


if __name__ == "__main__":
    serve(start)
