"""The settings of a training run, each typed once; a recipe embeds them as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from llama.config import ModelConfig


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_trainable(model: ModelConfig) -> None:
    """Whether every part of the model gets a gradient.

    Raises:
        ValueError: one does not; names field, value and remedy.
    """
    moe = model.moe
    _require(
        moe is None or moe.top_k > 1 or moe.num_experts == 1 or not moe.normalize_top_k,
        "model.moe.normalize_top_k=True with model.moe.top_k=1 makes every weight 1, and the router learns nothing "
        "from the loss; set model.moe.normalize_top_k=False",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) and the gradient clipping before it."""

    lr: float = 3e-3
    """Peak learning rate, reached at the end of the warm-up."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; norms, embeddings and biases have none."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"train.optimizer.lr={self.lr} must be positive")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"train.optimizer.{name}={value} must lie in [0, 1)")
        _require(self.eps > 0, f"train.optimizer.eps={self.eps} must be positive; 1e-8 is usual")
        for name in ("weight_decay", "grad_clip"):
            value = getattr(self, name)
            _require(value >= 0, f"train.optimizer.{name}={value} must not be negative; 0 turns it off")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps: a linear warm-up, then `kind` down to `min_lr_ratio` of the peak."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak one; `constant` stays at the peak and does not use it."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require(
            self.kind in ("cosine", "linear", "constant"),
            f"train.schedule.kind={self.kind!r} is not one of cosine, linear, constant",
        )
        _require(
            self.warmup_steps >= 0,
            f"train.schedule.warmup_steps={self.warmup_steps} must not be negative; 0 means no warm-up",
        )
        _require(
            0 <= self.min_lr_ratio <= 1,
            f"train.schedule.min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks are arranged; `dp_replicate * dp_shard` is the number of workers."""

    dp_replicate: int = 1
    """Copies of the sharded model (HSDP)."""
    dp_shard: int = -1
    """Ranks that share one copy's parameters (FSDP); -1 takes all that are left."""
    ep: int = 1
    """Ranks that share the experts of one copy; divides dp_shard."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "ep"):
            value = getattr(self, name)
            _require(value >= 1, f"train.parallel.{name}={value} must be at least 1; 1 turns it off")
        _require(
            self.dp_shard == -1 or self.dp_shard >= 1,
            f"train.parallel.dp_shard={self.dp_shard} must be at least 1, or -1 for all workers that are left",
        )


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Raises:
        ValueError: a setting is out of range or two contradict each other; names field, value and remedy.
    """

    steps: int = 200
    global_batch: int = 16
    """Sequences per optimizer step, over all ranks; the same whatever the number of ranks."""
    micro_batch: int = 8
    """Sequences per forward pass of one rank; the rest of the global batch is accumulated."""
    seq_len: int = 256
    """Tokens per sequence."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; weights, reductions and optimizer state are fp32 either way."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always writes one, and 0 writes only that."""
    keep_last: int = 2
    """Committed checkpoints kept."""
    log_every: int = 10
    """Steps between metrics; the first and the last step always report."""
    seed: int = 0

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch", "seq_len", "keep_last", "log_every"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}={value} must be at least 1")
        _require(
            self.global_batch % self.micro_batch == 0,
            f"train.global_batch={self.global_batch} is not divisible by train.micro_batch={self.micro_batch}; "
            f"choose a divisor of {self.global_batch}",
        )
        _require(self.precision in ("fp32", "bf16"), f"train.precision={self.precision!r} is not one of fp32, bf16")
        _require(
            self.checkpoint_every >= 0,
            f"train.checkpoint_every={self.checkpoint_every} must not be negative; 0 writes only the last step's",
        )
        _require(0 <= self.seed < 2**31, f"train.seed={self.seed} must lie in [0, 2**31)")

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` ranks adds up for one optimizer step.

        Raises:
            ValueError: the global batch does not split evenly.
        """
        per_pass = self.micro_batch * world_size
        _require(
            self.global_batch % per_pass == 0,
            f"train.global_batch={self.global_batch} is not divisible by train.micro_batch={self.micro_batch} times "
            f"{world_size} workers; choose a multiple of {per_pass} or a smaller train.micro_batch",
        )
        return self.global_batch // per_pass
