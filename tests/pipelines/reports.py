"""Reports of a training that never was, for tests of what writes, reads and draws them."""

from typing import Any

from llama.training.metrics import StepMetrics


def report(step: int, **changed: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "steps": 100,
        "loss": 6.0 - step / 50,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens": 64 * step,
        "tokens_per_second": 1000.0,
        "mfu": 0.25,
        "memory_bytes": 2**30,
        "samples": 4 * step,
        "epoch": step / 10,
        "checkpoint_seconds": 0.0,
        "val_loss": None,
        "balance_loss": None,
        "z_loss": None,
        "expert_load": {},
        "router_entropy": {},
        "all_to_all_bytes": 0,
        "skipped_steps": 0,
    }
    return StepMetrics(**values | changed)
