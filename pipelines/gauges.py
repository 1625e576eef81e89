"""A training's latest numbers for Prometheus, through the metrics endpoint of the node that rank 0 is on.

Ray puts `ray_` before every name: `ray_caravan_train_loss{run="...", stage="pretrain"}`. The endpoint's port is
`MetricsExportPort` of the node (`ray.nodes()`); Ray passes new values on about every ten seconds.
"""

from __future__ import annotations

from dataclasses import asdict

from ray.util.metrics import Gauge

from llama.training.metrics import StepMetrics

_DESCRIPTIONS = {
    "step": "Optimizer steps done",
    "loss": "Training cross-entropy, nats per token",
    "val_loss": "Validation cross-entropy, nats per token, when it was last measured",
    "balance_loss": "Balance loss before its weight, mean over the MoE layers",
    "z_loss": "Router z loss before its weight, mean over the MoE layers",
    "learning_rate": "Learning rate",
    "grad_norm": "Global gradient norm before clipping",
    "tokens": "Tokens trained on",
    "tokens_per_second": "Tokens per second over all ranks",
    "mfu": "Model FLOPs utilisation, 0 to 1",
    "memory_bytes": "Largest peak memory of a rank",
    "epoch": "Passes over the data",
    "checkpoint_seconds": "Seconds that steps stood still for checkpoints since the previous report",
    "skipped_steps": "Steps without an update",
    "failed_checkpoints": "Checkpoints that were due and not written",
}
_BY_LAYER = {
    "expert_load": "Share of the busiest expert times the number of experts; 1 is balanced",
    "router_entropy": "Mean entropy of the router's probabilities, nats",
}


class TrainGauges:
    """Of rank 0 of one stage of a run; needs a connection to Ray."""

    def __init__(self, run: str, stage: str) -> None:
        tags = {"run": run, "stage": stage}
        self._gauges = {
            name: Gauge(f"caravan_train_{name}", description, tuple(tags)).set_default_tags(tags)
            for name, description in _DESCRIPTIONS.items()
        }
        self._by_layer = {
            name: Gauge(f"caravan_train_{name}", description, (*tags, "layer")).set_default_tags(tags)
            for name, description in _BY_LAYER.items()
        }

    def set(self, metrics: StepMetrics) -> None:
        """What was not measured keeps its last value."""
        values = asdict(metrics)
        for name, gauge in self._gauges.items():
            gauge.set(values[name])
        for layer, load in metrics.expert_load.items():
            self._by_layer["expert_load"].set(max(load) * len(load), {"layer": str(layer)})
        for layer, entropy in metrics.router_entropy.items():
            self._by_layer["router_entropy"].set(entropy, {"layer": str(layer)})
