"""transformers' side of `python -m llama.bench engine`: `generate`, and its continuous batching for the trace."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from llama.bench.peers.driver import Answer, fastest, serve

_CACHES = ("dynamic", "static")
_PAGE = 32
"""Tokens of a page of continuous batching's cache, and so of what it shares between requests."""


class _Clock(transformers.StoppingCriteria):
    """Notes when each token is there; ends nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Worker:
    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self._model, self._settings = model, settings
        self._prompts: list[list[int]] = []
        self._caches: dict[str, Any] = {}

    @torch.inference_mode()
    def __call__(self, task: dict[str, Any]) -> Answer:
        if task["kind"] == "trace":
            return self._trace(task["requests"])
        ids_BT = torch.tensor(task["prompts"])
        if task["kind"] == "prefill":
            began = time.perf_counter()
            tokens = self._generate(ids_BT, 1)
            return {"seconds": time.perf_counter() - began, "tokens": tokens[:, -1].tolist()}
        if task["prompts"] != self._prompts:
            self._caches = {kind: self._cached(kind, ids_BT, task["generate"]) for kind in _CACHES}
            best = fastest({kind: partial(self._decode, kind, ids_BT, task["generate"]) for kind in _CACHES})
            self._caches, self._prompts = {best: self._caches[best]}, task["prompts"]
        (kind,) = self._caches
        return self._decode(kind, ids_BT, task["generate"])

    def _generate(self, ids_BT: Tensor, count: int, **settings: Any) -> Tensor:
        return self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=count,
            disable_compile=True,
            **settings,
        )

    def _cached(self, kind: str, ids_BT: Tensor, generate: int) -> Any:
        """A cache that holds the prompts but for their last tokens."""
        config, (_, length) = self._model.config, ids_BT.shape
        if kind == "static":
            cache: Any = transformers.StaticCache(config, max_cache_len=length + generate)
        else:
            cache = transformers.DynamicCache(config=config)
        self._model(ids_BT[:, :-1], past_key_values=cache, logits_to_keep=1)
        return cache

    def _decode(self, kind: str, ids_BT: Tensor, generate: int) -> Answer:
        cache, (batch, length) = self._caches[kind], ids_BT.shape
        if kind == "static":
            for layer in cache.layers:
                layer.cumulative_length.fill_(length - 1)
        else:
            cache.crop(length - 1 - cache.get_seq_length())
        clock = _Clock()
        tokens = self._generate(ids_BT, generate + 1, past_key_values=cache, stopping_criteria=[clock])
        return {
            "seconds": clock.times[-1] - clock.times[0],
            "generated": batch * (len(clock.times) - 1),
            "tokens": tokens[:, length].tolist(),
            "settings": f"{kind} cache",
        }

    def _trace(self, requests: list[dict[str, Any]]) -> Answer:
        config = transformers.ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=-(-self._settings["cache_tokens"] // _PAGE),
            max_batch_tokens=512,
            auto_switch_to_flash=False,
        )
        self._model.generation_config.do_sample = False
        manager = self._model.init_continuous_batching(continuous_batching_config=config)
        manager.start()
        try:
            # Its thread is ready when it has answered.
            manager.add_request([0], request_id="first", max_new_tokens=1)
            _result(manager)
            began = time.perf_counter()
            for index, request in enumerate(requests):
                time.sleep(max(0.0, request["at"] - (time.perf_counter() - began)))
                manager.add_request(
                    request["prompt"],
                    request_id=str(index),
                    max_new_tokens=request["generate"],
                    record_timestamps=True,
                )
            results: dict[int, Any] = {}
            while len(results) < len(requests):
                result = _result(manager)
                results[int(result.request_id)] = result
        finally:
            manager.stop(block=True)
        return {"times": [[at - began for at in results[index].timestamps] for index in range(len(requests))]}


def _result(manager: Any) -> Any:
    result = manager.get_result(timeout=300)
    if result is None or result.error:
        raise RuntimeError(f"continuous batching failed: {result.error if result else 'no result in 300 s'}")
    return result


def start(settings: dict[str, Any]) -> tuple[Answer, Any]:
    torch.set_num_threads(settings["threads"])
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["directory"], dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    text = (
        f"torch {torch.__version__}, generate with the faster cache; the trace by continuous batching, pages of {_PAGE}"
    )
    return {"version": transformers.__version__, "settings": text}, Worker(model, settings)


if __name__ == "__main__":
    serve(start)
