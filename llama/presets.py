"""Published architectures by name, and small ones for CPUs.

`dataclasses.replace` makes variants. A size that was derived stays as it is unless it is given anew, None included:
`replace(preset("small"), dim=1024, head_dim=None, hidden_dim=None)`.
"""

from __future__ import annotations

from dataclasses import replace

from llama.config import ModelConfig, MoEConfig, RopeScaling

_LLAMA_3 = ModelConfig(
    vocab_size=128256,
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    hidden_dim=14336,
    max_seq_len=8192,
    rope_theta=500000.0,
    tie_embeddings=False,
)

PRESETS: dict[str, ModelConfig] = {
    # For a CPU: the quickstart's two, and the shapes of `python -m llama.bench train`.
    "tiny": ModelConfig(
        vocab_size=2048, dim=192, num_layers=3, num_heads=6, num_kv_heads=2, hidden_dim=576, max_seq_len=512
    ),
    "tiny-moe": ModelConfig(
        vocab_size=2048,
        dim=192,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        hidden_dim=576,
        max_seq_len=512,
        moe=MoEConfig(num_experts=4, num_shared_experts=1, expert_hidden_dim=192),
    ),
    "small": ModelConfig(vocab_size=6400, dim=512, num_layers=8, num_heads=16, num_kv_heads=8, max_seq_len=2048),
    "small-moe": ModelConfig(
        vocab_size=6400,
        dim=512,
        num_layers=8,
        num_heads=16,
        num_kv_heads=8,
        max_seq_len=2048,
        moe=MoEConfig(num_experts=4, num_shared_experts=1, expert_hidden_dim=1408),
    ),
    # arXiv:2307.09288
    "llama-2-7b": ModelConfig(
        vocab_size=32000,
        dim=4096,
        num_layers=32,
        num_heads=32,
        hidden_dim=11008,
        max_seq_len=4096,
        tie_embeddings=False,
    ),
    # arXiv:2407.21783, table 3
    "llama-3-8b": _LLAMA_3,
    "llama-3-70b": ModelConfig(
        vocab_size=128256,
        dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        hidden_dim=28672,
        max_seq_len=8192,
        rope_theta=500000.0,
        tie_embeddings=False,
    ),
    "llama-3.1-8b": replace(
        _LLAMA_3,
        max_seq_len=131072,
        rope_scaling=RopeScaling("llama3", factor=8.0, original_max_seq_len=8192),
    ),
    "llama-3.2-1b": ModelConfig(
        vocab_size=128256,
        dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=8192,
        max_seq_len=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor=32.0, original_max_seq_len=8192),
    ),
    # arXiv:2401.04088, table 1
    "mixtral-8x7b": ModelConfig(
        vocab_size=32000,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=14336,
        max_seq_len=32768,
        rope_theta=1e6,
        tie_embeddings=False,
        moe=MoEConfig(num_experts=8, expert_hidden_dim=14336),
    ),
    # arXiv:2505.09388, tables 1 and 2
    "qwen3-0.6b": ModelConfig(
        vocab_size=151936,
        dim=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        hidden_dim=3072,
        max_seq_len=40960,
        norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm="head",
    ),
    "qwen3-30b-a3b": ModelConfig(
        vocab_size=151936,
        dim=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        hidden_dim=6144,
        max_seq_len=40960,
        norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm="head",
        tie_embeddings=False,
        moe=MoEConfig(num_experts=128, top_k=8, expert_hidden_dim=768),
    ),
}


def preset(name: str) -> ModelConfig:
    """The preset called `name`.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]
