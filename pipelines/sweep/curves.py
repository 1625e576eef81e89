"""What a sweep draws over the training, and measures of it.

curve.imbalance    how unevenly the experts were loaded at the end: MaxVio = max load / mean load − 1 (Wang et al.,
                   arXiv:2408.15664, §4.1), averaged over the layers and the last quarter of the reports
curve.gap          validation loss less training loss, nats per token, the latter averaged over the same quarter
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
"""A report of the training: the fields of StepMetrics."""


def _imbalance(row: Row) -> float | None:
    """MaxVio of a report, averaged over the layers; None of a dense model's."""
    loads = (row.get("expert_load") or {}).values()
    return fmean(max(load) * len(load) - 1 for load in loads) if loads else None


def _late(curve: Sequence[Row]) -> Sequence[Row]:
    """The last quarter of the reports, one at least."""
    return curve[-max(1, len(curve) // 4) :]


def _late_imbalance(curve: Sequence[Row]) -> float | None:
    found = [value for row in _late(curve) if (value := _imbalance(row)) is not None]
    return fmean(found) if found else None


def _gap(curve: Sequence[Row]) -> float | None:
    losses = [row["loss"] for row in _late(curve) if row["loss"] is not None]
    validated = curve[-1]["val_loss"]
    return validated - fmean(losses) if losses and validated is not None else None


CURVE_MEASURES: Mapping[str, Callable[[Sequence[Row]], float | None]] = {"imbalance": _late_imbalance, "gap": _gap}
"""What `curve.NAME` measures."""

CURVES: Mapping[str, tuple[str, Callable[[Row], float | None]]] = {
    "loss": ("training loss (nats per token)", lambda row: row["loss"]),
    "val_loss": ("validation loss (nats per token)", lambda row: row["val_loss"]),
    "imbalance": ("expert imbalance: max load / mean load − 1", _imbalance),
    "balance_loss": ("balance loss, before its weight", lambda row: row["balance_loss"]),
    "grad_norm": ("gradient norm before clipping", lambda row: row["grad_norm"]),
    "learning_rate": ("learning rate", lambda row: row["learning_rate"]),
    "tokens_per_second": ("tokens per second", lambda row: row["tokens_per_second"]),
}
"""What can be drawn: the axis' label, and its value in a report."""

LABELS = {
    "pretrain.val_loss": "validation loss (nats per token)",
    "pretrain.loss": "training loss of the last step (nats per token)",
    "evaluate.loss": "held-out loss (nats per token)",
    "evaluate.perplexity": "held-out perplexity",
    "evaluate.bits_per_byte": "held-out text (bits per byte)",
    "extrapolate.within.own": "loss within the length of training (nats per token)",
    "extrapolate.beyond_twice.own": "loss beyond twice the length of training (nats per token)",
    "tokenizer.bytes_per_token": "bytes per token",
    "curve.imbalance": "expert imbalance: max load / mean load − 1",
    "curve.gap": "validation less training loss (nats per token)",
}
"""Of measures, for an axis; others are called by their names."""
