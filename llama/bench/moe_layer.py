"""A mixture-of-experts layer beside a dense feed-forward of the same active FLOPs: what routing itself costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from llama.bench.harness import MIN_ROUNDS, BenchError, Ratio, interleave, ratio
from llama.feed_forward import FeedForward
from llama.moe import MoE
from llama.presets import PRESETS
from llama.training.precision import fast_cpu_matmul


@dataclass(frozen=True)
class MoELayerBench:
    """What is measured: forward and backward of one layer.

    Raises:
        BenchError: a setting is out of range; names field, value and remedy.
    """

    model: str = "small-moe"
    """A preset; its last layer must be a mixture of experts."""
    precision: str = "bf16"
    tokens: int = 4096
    rounds: int = 9
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise BenchError(f"precision={self.precision!r} is not one of bf16, fp32")
        for name, least in (("tokens", 1), ("rounds", MIN_ROUNDS), ("threads", 1)):
            if getattr(self, name) < least:
                raise BenchError(f"{name}={getattr(self, name)} must be at least {least}")
        sparse = [name for name, config in PRESETS.items() if config.moe is not None]
        if self.model not in sparse:
            raise BenchError(f"model={self.model!r} is not one of those with experts: {', '.join(sparse)}")


@dataclass(frozen=True)
class MoELayerReport:
    bench: MoELayerBench
    dense_hidden_dim: int
    """Of the feed-forward with the same active FLOPs."""
    moe_seconds: float
    dense_seconds: float
    cost: Ratio
    """Time of the MoE layer over the dense one's."""


def measure(bench: MoELayerBench) -> MoELayerReport:
    """Runs the comparison."""
    config = PRESETS[bench.model]
    moe = config.moe
    assert moe is not None and moe.expert_hidden_dim is not None
    torch.set_num_threads(bench.threads)
    hidden = moe.top_k * moe.expert_hidden_dim + (moe.shared_hidden_dim or 0)
    # The last layer is a mixture of experts whatever the first ones are.
    layers = {"moe": MoE(config, config.num_layers - 1), "dense": FeedForward(replace(config, moe=None), hidden)}
    with fast_cpu_matmul():
        seconds = interleave({name: _work(layer, bench, config.dim) for name, layer in layers.items()}, bench.rounds)
    return MoELayerReport(
        bench,
        hidden,
        median(seconds["moe"]),
        median(seconds["dense"]),
        ratio(seconds["dense"], seconds["moe"]),
    )


def _work(layer: nn.Module, bench: MoELayerBench, dim: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    layer.to(bench.device)
    x = torch.randn(1, bench.tokens, dim, generator=generator).to(bench.device).requires_grad_()
    cotangent = torch.randn(1, bench.tokens, dim, generator=generator).to(bench.device)

    def once() -> None:
        with torch.autocast(bench.device, torch.bfloat16, enabled=bench.precision == "bf16"):
            out = layer(x)
        out.backward(cotangent.type_as(out))
        if bench.device != "cpu":
            torch.cuda.synchronize()
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return once


def as_text(report: MoELayerReport) -> str:
    bench = report.bench
    return (
        f"{bench.model}, {bench.precision}, {bench.tokens} tokens, {bench.threads} thread(s), {bench.device}: "
        f"MoE layer {report.moe_seconds * 1e3:.1f} ms, dense of hidden size {report.dense_hidden_dim} "
        f"{report.dense_seconds * 1e3:.1f} ms; cost {report.cost.median:.2f}× "
        f"({report.cost.low:.2f}–{report.cost.high:.2f})"
    )


def as_json(report: MoELayerReport) -> dict[str, Any]:
    return asdict(report)
