"""How fast a run is, how near to what the devices can do, and what it holds: the same on every rank."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llama.config import ModelConfig
from llama.training.config import TrainConfig
from llama.training.memory import peak_bytes
from llama.training.peak import peak_flops


@dataclass(frozen=True)
class Rates:
    """Since the previous measurement. The fields are those of `StepMetrics`."""

    tokens_per_second: float
    mfu: float | None
    memory_bytes: int
    checkpoint_seconds: float


class Meter:
    """A clock that is stopped for validation, and the memory. Every rank makes one, together.

    The tokens are those that are trained on: evaluation and padding are not counted, and neither is the arithmetic
    that activation checkpointing does again (PaLM, arXiv:2204.02311, appendix B).

    Args:
        tokens: trained on so far.
    """

    def __init__(self, model: ModelConfig, config: TrainConfig, device: torch.device, tokens: int) -> None:
        self._device = device
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        peak = torch.tensor(peak_flops(device, dtype) or math.nan, dtype=torch.float64, device=device)
        dist.all_reduce(peak)
        self._flops_per_token = model.flops_per_token(config.seq_len, frozen=config.lora is not None)
        self._peak_flops = peak.item()
        self._first_tokens = self._tokens = tokens
        self._started = self._measured = time.perf_counter()
        self.checkpoint_seconds = self.validation_seconds = 0.0
        self._checkpoint_before = self._validation_before = 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What the block takes is a stall for a checkpoint."""
        began = time.perf_counter()
        yield
        self.checkpoint_seconds += time.perf_counter() - began

    @contextmanager
    def validating(self) -> Iterator[None]:
        """What the block takes is no training."""
        began = time.perf_counter()
        yield
        self.validation_seconds += time.perf_counter() - began

    def measure(self, tokens: int) -> Rates:
        """With `tokens` trained on by now. A collective: the slowest rank's time, the largest rank's memory."""
        now = time.perf_counter()
        seconds = now - self._measured - (self.validation_seconds - self._validation_before)
        stalled = self.checkpoint_seconds - self._checkpoint_before
        largest = torch.tensor([seconds, stalled, peak_bytes(self._device)], dtype=torch.float64, device=self._device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        seconds, stalled, memory = largest.tolist()
        rate = (tokens - self._tokens) / seconds
        self._measured, self._tokens = now, tokens
        self._checkpoint_before, self._validation_before = self.checkpoint_seconds, self.validation_seconds
        mfu = rate * self._flops_per_token / self._peak_flops
        return Rates(rate, mfu if math.isfinite(mfu) else None, int(memory), stalled)

    @property
    def seconds(self) -> float:
        """Since the beginning, on this rank."""
        return time.perf_counter() - self._started

    def tokens_per_second(self, tokens: int) -> float | None:
        """Since the beginning, with `tokens` trained on by now, on this rank; None if there was nothing to train."""
        trained = tokens - self._first_tokens
        return trained / (self.seconds - self.validation_seconds) if trained else None
