"""Rotary scaling as `config.json` spells it, both ways.

Two layouts are read: `rope_parameters` with everything in it, and the older `rope_scaling` beside `rope_theta`.

The longest sequence is `max_position_embeddings`, which configs with linear and llama3 scaling state after the stretch.
With dynamic scaling it is the length before, and with yarn it may be either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llama.config import ModelConfig, RopeScaling
from llama.hf_architectures import Architecture
from llama.hf_values import UnsupportedModel, checked

_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_ORIGINAL = "original_max_position_embeddings"
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", _ORIGINAL, *_YARN),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
"""What each `rope_type` takes beside `rope_theta`."""
_HARMLESS: dict[str, Any] = {"partial_rotary_factor": 1.0, "finetuned": None}


def read_rope(hf: Mapping[str, Any], architecture: Architecture) -> tuple[float, RopeScaling | None, int]:
    """Returns theta, the scaling and the longest sequence.

    Raises:
        UnsupportedModel: another `rope_type`, or a setting of it that is not known here or no number; names key and
            value.
    """
    # transformers gives `rope_scaling` precedence, too.
    source = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(source) or {}
    if not isinstance(rope, Mapping):
        raise UnsupportedModel(f"config.json: {source}={rope!r} must hold the settings of a rope_type")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KEYS:
        raise UnsupportedModel(
            f"config.json: rope_type={kind!r} is not supported; it must be one of {', '.join(_KEYS)}"
        )
    if hf.get("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedModel(
            f"config.json: partial_rotary_factor={hf['partial_rotary_factor']!r} is not supported; it must be 1.0"
        )
    for key, value in rope.items():
        known = key in ("rope_type", "type", "rope_theta", *_KEYS[kind])
        # dynamic scaling counts from max_position_embeddings, whatever else is written there.
        unused = key == _ORIGINAL and kind in ("default", "linear", "dynamic")
        if not (known or unused or value is None or value == _HARMLESS.get(key)):
            raise UnsupportedModel(f"config.json: {key}={value!r} is not supported with rope_type={kind!r}; remove it")
    theta = checked("rope_theta", rope.get("rope_theta", hf.get("rope_theta", architecture.rope_theta)), "float")
    length = hf.get("max_position_embeddings", architecture.defaults["max_position_embeddings"])
    checked("max_position_embeddings", length, "int")
    original = checked(_ORIGINAL, hf.get(_ORIGINAL) or rope.get(_ORIGINAL) or length, "int")
    scaling = _read_scaling(kind, rope, original, length)
    if scaling is not None and kind in ("dynamic", "yarn"):
        length = max(length, int((original if kind == "yarn" else length) * scaling.factor))
    return float(theta), scaling, length


def _read_scaling(kind: str, rope: Mapping[str, Any], original: int, length: int) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = _required(rope, "factor", kind)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "dynamic":
        return RopeScaling("dynamic_ntk", factor, original_max_seq_len=length)
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor,
            original_max_seq_len=original,
            low_freq_factor=_required(rope, "low_freq_factor", kind),
            high_freq_factor=_required(rope, "high_freq_factor", kind),
        )
    attention_factor, beta_fast, beta_slow, numerator, denominator = (
        checked(key, rope.get(key), "float | None")
        for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    )
    if attention_factor is None and numerator and denominator:
        attention_factor = _magnitude(factor, numerator) / _magnitude(factor, denominator)
    return RopeScaling(
        "yarn",
        factor,
        original_max_seq_len=original,
        beta_fast=beta_fast or 32.0,
        beta_slow=beta_slow or 1.0,
        attention_factor=attention_factor,
        truncate=checked("truncate", rope.get("truncate", True), "bool"),
    )


def _magnitude(factor: float, scale: float) -> float:
    """DeepSeek's variant of yarn's factor on cosine and sine (arXiv:2309.00071, eq. 22, times `scale`)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _required(rope: Mapping[str, Any], key: str, kind: str) -> float:
    value = rope.get(key)
    if value is None:
        raise UnsupportedModel(f"config.json: {key} is missing; rope_type={kind!r} needs it")
    return float(checked(key, value, "float"))


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of rotary positions and of the longest sequence, in both layouts."""
    length, scaling = config.max_seq_len, config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": folded_theta(config)}
    if scaling is not None and scaling.kind != "ntk":
        rope |= {"rope_type": scaling.kind.removesuffix("_ntk"), "factor": scaling.factor}
    if scaling is not None and scaling.kind == "dynamic_ntk":
        assert scaling.original_max_seq_len is not None
        length = scaling.original_max_seq_len
    if scaling is not None and scaling.kind in ("yarn", "llama3"):
        rope[_ORIGINAL] = scaling.original_max_seq_len
    if scaling is not None and scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling is not None and scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    return {
        "max_position_embeddings": length,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }


def folded_theta(config: ModelConfig) -> float:
    """The base of the frequencies; NTK-aware scaling is nothing but a larger one, see llama/rope.py."""
    scaling, dim = config.rope_scaling, config.resolved_head_dim
    if scaling is None or scaling.kind != "ntk":
        return config.rope_theta
    return config.rope_theta * scaling.factor ** (dim / (dim - 2))
