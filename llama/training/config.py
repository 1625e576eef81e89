"""The settings of a training run, each typed once; a recipe embeds them as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from llama.config import ModelConfig
from llama.lora import LoraConfig


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


def check_compilable(model: ModelConfig, train: TrainConfig) -> None:
    """Whether `train.compile`, if set, can be obeyed.

    Raises:
        ValueError: it cannot; names field, value and remedy.
    """
    # The compiler cannot carry what a repeated block writes, experts into the routing record and batch norms into their
    # statistics, and would leave the block as it is.
    writer = "experts" if model.moe is not None else "batch norms" if model.norm == "batchnorm" else None
    _require(
        not train.compile or writer is None or train.activation_checkpointing == "none",
        f"train.compile=True compiles no {writer} with train.activation_checkpointing={train.activation_checkpointing}"
        "; set train.activation_checkpointing=none or train.compile=False",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and what a gradient meets before it: clipping, and the skipping of steps.

    `adamw` is AdamW (Loshchilov & Hutter, arXiv:1711.05101) for every parameter; `muon` is Muon for the matrices of the
    blocks and AdamW for the rest, with the same learning rate and decay (llama/training/muon.py).
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-3
    """Peak learning rate, reached at the end of the warm-up."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon's."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; norms, embeddings and biases have none."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    skip_sigma: float = 0.0
    """A step is skipped when its gradient's norm lies more than so many standard deviations above the mean of the last
    `skip_window` norms; 0 skips only what is not finite (llama/training/skip.py)."""
    skip_window: int = 128

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require(self.kind in ("adamw", "muon"), f"train.optimizer.kind={self.kind!r} is not one of adamw, muon")
        _require(self.lr > 0, f"train.optimizer.lr={self.lr} must be positive")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"train.optimizer.{name}={value} must lie in [0, 1)")
        _require(
            self.kind == "muon" or self.momentum == 0.95,
            f"train.optimizer.momentum={self.momentum} is Muon's; set train.optimizer.kind=muon or leave it out",
        )
        _require(self.eps > 0, f"train.optimizer.eps={self.eps} must be positive; 1e-8 is usual")
        for name in ("weight_decay", "grad_clip", "skip_sigma"):
            value = getattr(self, name)
            _require(value >= 0, f"train.optimizer.{name}={value} must not be negative; 0 turns it off")
        _require(self.skip_window >= 4, f"train.optimizer.skip_window={self.skip_window} must be at least 4")
        _require(
            self.skip_sigma > 0 or self.skip_window == 128,
            f"train.optimizer.skip_window={self.skip_window} has no use without train.optimizer.skip_sigma; "
            "set that too, 6 is usual",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps: a linear warm-up, then `kind` down to `min_lr_ratio` of the peak."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak one; `constant` stays at the peak and does not use it."""
    decay_ratio: float = 0.1
    """`wsd` stays at the peak until this share of all steps is left."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require(
            self.kind in ("cosine", "linear", "constant", "wsd"),
            f"train.schedule.kind={self.kind!r} is not one of cosine, linear, constant, wsd",
        )
        _require(
            self.warmup_steps >= 0,
            f"train.schedule.warmup_steps={self.warmup_steps} must not be negative; 0 means no warm-up",
        )
        _require(
            0 <= self.min_lr_ratio <= 1,
            f"train.schedule.min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]",
        )
        _require(
            self.kind != "constant" or self.min_lr_ratio == 0.1,
            f"train.schedule.min_lr_ratio={self.min_lr_ratio} has no use with train.schedule.kind=constant, which "
            "stays at the peak; leave it out",
        )
        _require(0 < self.decay_ratio <= 1, f"train.schedule.decay_ratio={self.decay_ratio} must lie in (0, 1]")
        _require(
            self.kind == "wsd" or self.decay_ratio == 0.1,
            f"train.schedule.decay_ratio={self.decay_ratio} is that of wsd; set train.schedule.kind=wsd or leave it "
            "out",
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
    lora: LoraConfig | None = None
    """Train adapters and nothing else; None trains all weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward; weights, reductions and optimizer state are fp32 either way."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What backward computes again instead of finding it in memory: nothing, each block's whole forward pass, or all of
    it but the products, attention and all-to-alls (llama/training/recompute.py)."""
    compile: bool = False
    """Compiles each block (`torch.compile`); the first step takes a minute."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always writes one, and 0 writes only that."""
    keep_last: int = 2
    """Committed checkpoints kept, the latest ones."""
    keep_best: int = 0
    """Besides them the checkpoints of the lowest validation loss."""
    keep_every: int = 0
    """Besides them, and for ever, the checkpoints of steps that this divides; 0 keeps no such."""
    validate_every: int = 0
    """Steps between validations, and one after the last step; 0 turns them off. A stop at once leaves out that of its
    step."""
    validate_rows: int = 64
    """Rows of the validation split to validate on, over all ranks; of a split with fewer all."""
    log_every: int = 10
    """Steps between metrics; the first and the last step always report."""
    hang_seconds: float = 600.0
    """Seconds without a step, a save or a load after which a rank counts as hanging: its stacks are written down and
    its process ends. Must exceed the longest step, the first with its compilation; 0 never does."""
    seed: int = 0

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch", "seq_len", "keep_last", "log_every", "validate_rows"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}={value} must be at least 1")
        _require(
            self.global_batch % self.micro_batch == 0,
            f"train.global_batch={self.global_batch} is not divisible by train.micro_batch={self.micro_batch}; "
            f"choose a divisor of {self.global_batch}",
        )
        _require(self.precision in ("fp32", "bf16"), f"train.precision={self.precision!r} is not one of fp32, bf16")
        _require(
            self.activation_checkpointing in ("none", "full", "selective"),
            f"train.activation_checkpointing={self.activation_checkpointing!r} is not one of none, full, selective",
        )
        _require(
            self.lora is None or self.optimizer.kind != "muon",
            "train.optimizer.kind=muon is for matrices of the blocks, and train.lora trains none of them; set "
            "train.optimizer.kind=adamw",
        )
        _require(
            self.checkpoint_every >= 0,
            f"train.checkpoint_every={self.checkpoint_every} must not be negative; 0 writes only the last step's",
        )
        _require(
            self.hang_seconds >= 0,
            f"train.hang_seconds={self.hang_seconds} must not be negative; 0 turns the watchdog off",
        )
        for name in ("keep_best", "keep_every", "validate_every"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}={value} must not be negative; 0 turns it off")
        _require(
            self.validate_every > 0 or self.validate_rows == 64,
            f"train.validate_rows={self.validate_rows} has no use without train.validate_every; set that too, or leave "
            "it out",
        )
        _require(
            self.keep_best == 0 or (self.validate_every > 0 and self.checkpoint_every % self.validate_every == 0),
            f"train.keep_best={self.keep_best} needs a validation at every checkpoint, but train.validate_every="
            f"{self.validate_every} does not divide train.checkpoint_every={self.checkpoint_every}; set "
            "train.validate_every to a divisor of it",
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
