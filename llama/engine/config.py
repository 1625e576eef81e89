"""The engine's limits, and what it reports about its load."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from llama.config import ModelConfig
from llama.counts import num_active_parameters

DEFAULT_BLOCKS = 512


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits.

    Raises:
        ValueError: a field is not a positive integer, or both sizes of the cache are given.
    """

    num_blocks: int = DEFAULT_BLOCKS
    """Blocks in the cache; it holds `num_blocks * block_size` tokens, `kv_bytes_per_token` of the model each."""
    kv_cache_bytes: int | None = None
    """Size of the cache, instead of `num_blocks`: as many blocks as these bytes hold."""
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
            if value is None and name == "kv_cache_bytes":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"engine.{name}={value!r} is not a positive integer")
        if self.kv_cache_bytes is not None and self.num_blocks != DEFAULT_BLOCKS:
            raise ValueError(
                f"engine.num_blocks={self.num_blocks} and engine.kv_cache_bytes={self.kv_cache_bytes} both set the "
                "cache's size; give one"
            )

    def blocks(self, model: ModelConfig, dtype_bytes: int) -> int:
        """Blocks of the cache for a model whose keys and values take `dtype_bytes` bytes a number.

        Raises:
            ValueError: `kv_cache_bytes` does not hold one.
        """
        if self.kv_cache_bytes is None:
            return self.num_blocks
        block_bytes = model.kv_bytes_per_token(dtype_bytes) * self.block_size
        if self.kv_cache_bytes < block_bytes:
            raise ValueError(
                f"engine.kv_cache_bytes={self.kv_cache_bytes} holds no block of engine.block_size={self.block_size} "
                f"tokens, which takes {block_bytes} bytes; raise it"
            )
        return self.kv_cache_bytes // block_bytes


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


def widest_window(model: ModelConfig) -> int | None:
    """How far back, itself included, a token sees in the layer that sees furthest; None when one sees everything."""
    windows = [model.window(layer) for layer in range(model.num_layers)]
    widest = max((window for window in windows if window is not None), default=0)
    return None if None in windows else widest


def half_context(model: ModelConfig) -> float:
    """Tokens of context at which attending to them is as much arithmetic as the rest of a token's forward pass.

    A layer without a window takes 4·H·D operations a token and key (scores, then values), the rest 2 a parameter.
    """
    lookups = 0 if model.tie_embeddings else model.vocab_size * model.dim
    full_layers = sum(model.window(layer) is None for layer in range(model.num_layers))
    per_key = 4 * model.num_heads * model.resolved_head_dim * full_layers
    return 2 * (num_active_parameters(model) - lookups) / per_key if per_key else math.inf


@dataclass(frozen=True)
class EngineStats:
    """Load and counters at one moment; counters count from the engine's start."""

    running: int
    waiting: int
    num_blocks: int
    free_blocks: int
    """Blocks a request could be given now, those with reusable contents included."""
    pending_prefill_tokens: int
    """Tokens of running and waiting requests still to compute before they decode; of the waiting ones without what was
    in the cache when they arrived."""
    decode_context_tokens: int
    """Tokens in the contexts of decoding requests: what a decode step reads."""
    generated_tokens: int
    prompt_tokens: int
    """Prompt tokens of the requests admitted so far."""
    cached_tokens: int
    """Those of `prompt_tokens` that came from the cache."""
    preemptions: int
    prefix_waits: int = 0
    """Requests that waited for a prefix which another one was computing, instead of computing it too."""
    block_copies: int = 0
    """Shared blocks that were copied to be written to."""
    timeouts: int = 0
    weight_swaps: int = 0
