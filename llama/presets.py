"""Published architectures by name, and small ones for CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama.config import ModelConfig, MoEConfig, RopeScaling

_TINY = {
    "vocab_size": 2048,
    "dim": 192,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "hidden_dim": 576,
    "max_seq_len": 512,
}
_SMALL = {"vocab_size": 6400, "dim": 512, "num_layers": 8, "num_heads": 16, "num_kv_heads": 8, "max_seq_len": 2048}
_LLAMA_3 = {
    "vocab_size": 128256,
    "dim": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "hidden_dim": 14336,
    "max_seq_len": 8192,
    "rope_theta": 500000.0,
    "tie_embeddings": False,
}
_LLAMA_3_SCALING = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 8192}
_QWEN_3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_seq_len": 40960,
    "norm_eps": 1e-6,
    "rope_theta": 1e6,
    "qk_norm": "head",
}

_SETTINGS: dict[str, dict[str, Any]] = {
    # For a CPU: the shapes of the quickstarts, and those of `python -m llama.bench`.
    "tiny": _TINY,
    "tiny-moe": _TINY | {"moe": {"num_experts": 4, "num_shared_experts": 1, "expert_hidden_dim": 192}},
    "small": _SMALL,
    "small-moe": _SMALL | {"moe": {"num_experts": 4, "num_shared_experts": 1, "expert_hidden_dim": 1408}},
    # For one GPU: a step of `python -m llama.bench` with fp32 master weights, beside the peer's.
    "moe-3b": {
        "vocab_size": 32000,
        "dim": 2048,
        "num_layers": 14,
        "num_heads": 16,
        "num_kv_heads": 8,
        "hidden_dim": 4096,
        "max_seq_len": 4096,
        "norm_eps": 1e-6,
        "qk_norm": "head",
        "tie_embeddings": False,
        "moe": {"num_experts": 32, "top_k": 4, "expert_hidden_dim": 1024},
    },
    # arXiv:2307.09288
    "llama-2-7b": {
        "vocab_size": 32000,
        "dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "hidden_dim": 11008,
        "max_seq_len": 4096,
        "tie_embeddings": False,
    },
    # arXiv:2407.21783, table 3
    "llama-3-8b": _LLAMA_3,
    "llama-3-70b": _LLAMA_3 | {"dim": 8192, "num_layers": 80, "num_heads": 64, "hidden_dim": 28672},
    "llama-3.1-8b": _LLAMA_3 | {"max_seq_len": 131072, "rope_scaling": _LLAMA_3_SCALING},
    "llama-3.2-1b": _LLAMA_3
    | {
        "dim": 2048,
        "num_layers": 16,
        "hidden_dim": 8192,
        "max_seq_len": 131072,
        "rope_scaling": _LLAMA_3_SCALING | {"factor": 32.0},
        "tie_embeddings": True,
    },
    # arXiv:2401.04088, table 1
    "mixtral-8x7b": {
        "vocab_size": 32000,
        "dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "hidden_dim": 14336,
        "max_seq_len": 32768,
        "rope_theta": 1e6,
        "tie_embeddings": False,
        "moe": {"num_experts": 8, "expert_hidden_dim": 14336},
    },
    # arXiv:2505.09388, tables 1 and 2
    "qwen3-0.6b": _QWEN_3 | {"dim": 1024, "num_layers": 28, "num_heads": 16, "num_kv_heads": 8, "hidden_dim": 3072},
    "qwen3-30b-a3b": _QWEN_3
    | {
        "dim": 2048,
        "num_layers": 48,
        "num_heads": 32,
        "num_kv_heads": 4,
        "hidden_dim": 6144,
        "tie_embeddings": False,
        "moe": {"num_experts": 128, "top_k": 8, "expert_hidden_dim": 768},
    },
}
_ROTARY = ("rope_theta", "rope_layout", "rope_scaling")


def preset_settings(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `ModelConfig` that make the preset with `changes`, as plain values.

    A mapping for `moe` or `rope_scaling` changes the preset's own; without rotary positions its rotary settings go.

    Raises:
        ValueError: there is no such preset; the message lists them.
    """
    if name not in _SETTINGS:
        raise ValueError(f"model.preset={name!r} is not one of {', '.join(_SETTINGS)}")
    settings = dict(_SETTINGS[name])
    if changes.get("position", "rope") != "rope":
        settings = {key: value for key, value in settings.items() if key not in _ROTARY}
    for key, value in changes.items():
        own = settings.get(key)
        if isinstance(own, dict) and isinstance(value, Mapping):
            # Another kind of rotary scaling has settings of its own.
            value = {**own, **value} if value.get("kind", own.get("kind")) == own.get("kind") else dict(value)
        settings[key] = value
    return settings


def preset(name: str, **changes: Any) -> ModelConfig:
    """The preset called `name`, with `changes` to its settings; sizes that it leaves open follow the changed ones.

    Raises:
        ValueError: there is none, or the changes contradict each other.
    """
    settings = preset_settings(name, changes)
    for key, kind in (("moe", MoEConfig), ("rope_scaling", RopeScaling)):
        if isinstance(settings.get(key), dict):
            settings[key] = kind(**settings[key])
    return ModelConfig(**settings)


PRESETS: dict[str, ModelConfig] = {name: preset(name) for name in _SETTINGS}
