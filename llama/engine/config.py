"""The engine's limits, and what it reports about its load."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llama.config import ModelConfig


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits.

    Raises:
        ValueError: a field is not a positive integer.
    """

    num_blocks: int = 512
    """Blocks in the cache; it holds `num_blocks * block_size` tokens, `kv_bytes_per_token` of the model each."""
    block_size: int = 16
    """Tokens a block."""
    max_batched_tokens: int = 512
    """Tokens a step, decodes and prefill chunks together."""
    max_running: int = 64
    """Requests computed at once; never more than `max_batched_tokens`."""
    max_waiting: int = 1024
    """Requests queued; one more is refused with `QueueFull`."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"engine.{name}={value!r} is not a positive integer")


def check_cacheable(model: ModelConfig) -> None:
    """Whether keys stay what they were when they were cached.

    Raises:
        ValueError: they do not; names field, value and remedy.
    """
    scaling = model.rope_scaling
    if scaling is not None and scaling.kind == "dynamic_ntk":
        raise ValueError(
            f"model.rope_scaling.kind={scaling.kind} turns every key anew as its sequence grows, the engine's "
            "cached keys stay as they are; use ntk or yarn"
        )


@dataclass(frozen=True)
class EngineStats:
    """Load and counters at one moment; counters count from the engine's start."""

    running: int
    waiting: int
    num_blocks: int
    free_blocks: int
    """Blocks a request could be given now, those with reusable contents included."""
    pending_prefill_tokens: int
    """Tokens of running and waiting requests still to compute before they decode, cached prefixes not yet deducted
    from the waiting ones."""
    decode_context_tokens: int
    """Tokens in the contexts of decoding requests: what a decode step reads."""
    generated_tokens: int
    prompt_tokens: int
    """Prompt tokens of the requests admitted so far."""
    cached_tokens: int
    """Those of `prompt_tokens` that came from the cache."""
    preemptions: int
