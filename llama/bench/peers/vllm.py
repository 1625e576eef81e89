"""vLLM's side of `python -m llama.bench engine`; runs as a script in the peer's own environment.

Its engine is stepped in this process, without the process and the sockets that a server puts in between: with one core
they only cost. Compiled, prefix cache on, chunked prefill and its budget as it comes.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from driver import Answer, serve, work_in_steps


class VLLMSteps:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def add(self, name: str, prompt: list[int], generate: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=generate,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[str, list[int]]]:
        outputs = self._engine.step()
        return [(output.request_id, list(output.outputs[0].token_ids)) for output in outputs if output.outputs]

    def forget(self) -> None:
        self._engine.reset_prefix_cache()


def start(settings: dict[str, Any]) -> tuple[Answer, Any]:
    gib = -(-settings["cache_bytes"] // 2**30)
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, settings["cpus"])),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    sys.path.pop(0)  # this file's folder, in which `vllm` is this file
    import vllm

    engine = vllm.LLMEngine.from_engine_args(
        vllm.EngineArgs(
            model=settings["directory"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=settings["max_len"],
            max_num_seqs=max(settings["batch"], 64),
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )
    )
    scheduler = engine.vllm_config.scheduler_config
    text = f"compiled, {scheduler.max_num_batched_tokens} tokens a step, in one process"
    return {"version": vllm.__version__, "settings": text}, work_in_steps(VLLMSteps(engine))


if __name__ == "__main__":
    serve(start)
