"""What the machine allows an engine: memory read and matrix products, measured, and the rates that follow from them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from llama.bench.workload import Cell
from llama.config import ModelConfig
from llama.training.peak import gemm_flops

_BYTES = 2
"""Of a bf16 number."""


@dataclass(frozen=True)
class Ceilings:
    """Of this machine, with the bench's threads."""

    read_gbps: float
    """10⁹ bytes a second, read again and again from as many as the model's weights take: of what a cache holds of them
    a cache's rate."""
    bf16_gflops: float
    """Square products."""
    fp32_gflops: float
    """The same; on processors without matrix units the bf16 product of the library may be the slower one."""

    @property
    def gflops(self) -> float:
        return max(self.bf16_gflops, self.fp32_gflops)


def measure_ceilings(config: ModelConfig) -> Ceilings:
    """With the threads that torch is set to; takes some seconds."""
    return Ceilings(
        read_gbps(weight_bytes(config)),
        gemm_flops(1024, torch.bfloat16, repeats=30) / 1e9,
        gemm_flops(1024, torch.float32, repeats=30) / 1e9,
    )


def read_gbps(size: int, repeats: int = 20) -> float:
    """The best of several passes over `size` bytes, 10⁹ bytes a second."""
    half = size // 8
    a, b = torch.ones(half), torch.ones(half)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.dot(a, b).item()
        best = min(best, time.perf_counter() - began)
    return 8 * half / best / 1e9


def weight_bytes(config: ModelConfig) -> int:
    """What a step reads of the weights: all but an embedding table of its own, of which it reads its tokens' rows."""
    table = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return _BYTES * (config.num_parameters() - table)


def bandwidth_ceiling(config: ModelConfig, cell: Cell, generate: int, read_gbps: float) -> float:
    """Tokens a second of decode if reading weights and cache were all there is: bandwidth / (W + B · KV · context) · B.

    The context is that of the middle of `generate` tokens.
    """
    cache = cell.batch * config.kv_bytes_per_token(_BYTES) * (cell.context + generate / 2)
    return read_gbps * 1e9 / (weight_bytes(config) + cache) * cell.batch


def gemm_ceiling(config: ModelConfig, cell: Cell, generate: int, gflops: float) -> float:
    """Tokens a second if arithmetic at this rate were all there is; prompt tokens for prefill."""
    # A third of a training step is its forward pass, and `flops_per_token` takes half of its length as mean context.
    if cell.kind == "decode":
        return gflops * 1e9 / (config.flops_per_token(round(2 * cell.context + generate)) / 3)
    # Only a prompt's last token goes through the output projection.
    spared = 2 * config.vocab_size * config.dim * (1 - 1 / cell.context)
    return gflops * 1e9 / (config.flops_per_token(cell.context) / 3 - spared)
