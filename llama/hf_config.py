"""`config.json`, both ways.

Which architecture expresses a model is not decided by rules: it is written as each in turn, and the first that reads
back as the same function has it. What none expresses is written as Caravan's own (llama/hf_caravan.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llama.config import Activation, AttentionBias, ModelConfig, MoEConfig
from llama.hf_architectures import ARCHITECTURES, BY_MODEL_TYPE, Architecture
from llama.hf_caravan import CARAVAN_MODEL_TYPE, model_config_from_json
from llama.hf_rope import folded_theta, read_rope, write_rope
from llama.hf_values import UnsupportedModel, checked, named

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "relu": "reglu",
    "sigmoid": "glu",
}
"""`hidden_act` is the gate's function."""
_ONLY: dict[str, Any] = {"quantization_config": None, "per_layer_config": None, "is_causal": True}
_KINDS = {key: "int | None" for key in ("num_key_value_heads", "head_dim", "sliding_window")}
_KINDS["attention_dropout"] = "float | None"
"""Kinds of values that the type of the default does not tell."""


def find_architecture(config: ModelConfig, expert_bias: bool) -> Architecture | None:
    """The architecture of transformers that computes what `config` describes; None when there is none.

    Args:
        expert_bias: whether routing biases count, trained now or before.
    """
    for architecture in ARCHITECTURES:
        if config.moe is None or architecture.moe is None:
            expressible = config.moe is None and architecture.moe is None
        else:
            expressible = architecture.moe.expert_bias is not None or not expert_bias
        if expressible and architecture.fits(config) and _survives(config, architecture):
            return architecture
    return None


def _survives(config: ModelConfig, architecture: Architecture) -> bool:
    if config.position != "rope" or not config.gated:
        return False
    try:
        back = _read(write_config(config, architecture), architecture)
    except ValueError:
        return False
    return _function(back) == _function(config)


def _function(config: ModelConfig) -> ModelConfig:
    """`config` without what leaves the trained model's function as it is: two functions are equal if these are.

    Training's settings fall away (dropout, initialisation, balance, capacity), the row order of rotary projections, the
    longest sequence, and different spellings of the same layers.
    """
    moe = config.moe
    if moe is not None:
        dense = tuple(layer for layer in range(config.num_layers) if not config.is_moe_layer(layer))
        moe = MoEConfig(
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            expert_hidden_dim=moe.expert_hidden_dim,
            num_shared_experts=min(moe.num_shared_experts, 1),
            shared_hidden_dim=moe.shared_hidden_dim,
            shared_gate=moe.shared_gate,
            score=moe.score,
            normalize_top_k=moe.normalize_top_k,
            route_scale=moe.route_scale,
            dense_layers=dense,
        )
    folded = config.rope_scaling is not None and config.rope_scaling.kind == "ntk"
    return replace(
        config,
        multiple_of=1,
        max_seq_len=1,
        hidden_dim=1 if moe is not None and not moe.dense_layers else config.hidden_dim,
        rope_theta=folded_theta(config),
        rope_scaling=None if folded else config.rope_scaling,
        rope_layout="half",
        attention_dropout=0.0,
        residual_dropout=0.0,
        init="residual",
        moe=moe,
    )


# --- reading --------------------------------------------------------------------------------------------------------


class _Keys:
    """The settings of a `config.json`, absent ones by the architecture's defaults, numbers checked to be numbers."""

    def __init__(self, hf: Mapping[str, Any], architecture: Architecture) -> None:
        self._hf = dict(hf)
        # transformers has two names for one setting and has saved both.
        for key, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
            if architecture.sets(key) and other in hf:
                self._hf.setdefault(key, hf[other])
                if self._hf[key] != hf[other]:
                    raise UnsupportedModel(f"config.json: {key}={hf[key]!r} contradicts {other}={hf[other]!r}")
        self._defaults = architecture.defaults

    def __getitem__(self, key: str) -> Any:
        default = self._defaults[key]
        return checked(key, self._hf.get(key, default), _KINDS.get(key, type(default).__name__))


def read_architecture(hf: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a `config.json`; None for Caravan's own.

    Raises:
        UnsupportedModel: another one; names it.
    """
    model_type = hf.get("model_type")
    if model_type == CARAVAN_MODEL_TYPE:
        return None
    if str(model_type) not in BY_MODEL_TYPE:
        known = ", ".join((*BY_MODEL_TYPE, CARAVAN_MODEL_TYPE))
        raise UnsupportedModel(f"config.json: model_type={model_type!r} is not supported; it must be one of {known}")
    return BY_MODEL_TYPE[str(model_type)]


def read_config(hf: Mapping[str, Any]) -> tuple[ModelConfig, Architecture | None]:
    """The model that a `config.json` describes, and its architecture; None for Caravan's own.

    Keys that transformers' own model leaves unread are left unread here; the rotary layout is `half`, for which an
    interleaved architecture's rows are reordered.

    Raises:
        UnsupportedModel: another architecture, or a setting without a counterpart; names key and value.
    """
    architecture = read_architecture(hf)
    if architecture is None:
        return model_config_from_json(hf.get("model")), None
    return named(lambda: _read(hf, architecture)), architecture


def _read(hf: Mapping[str, Any], architecture: Architecture) -> ModelConfig:
    for key, value in {**_ONLY, **architecture.only}.items():
        if hf.get(key, value) != value:
            raise UnsupportedModel(
                f"config.json: {key}={hf[key]!r} is not supported in {architecture.name}; it must be {value!r}"
            )
    keys = _Keys(hf, architecture)
    activation = keys["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json: hidden_act={activation!r} is not supported; it must be one of {', '.join(_ACTIVATIONS)}"
        )
    theta, scaling, length = read_rope(hf, architecture)
    window, full_attention_layers = _read_windows(keys, architecture, hf.get("layer_types"))
    config = ModelConfig(
        vocab_size=keys["vocab_size"],
        dim=keys["hidden_size"],
        num_layers=keys["num_hidden_layers"],
        num_heads=keys["num_attention_heads"],
        num_kv_heads=keys["num_key_value_heads"],
        head_dim=keys["head_dim"],
        hidden_dim=keys["intermediate_size"],
        max_seq_len=length,
        norm_eps=keys["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        activation=_ACTIVATIONS[activation],
        ffn_bias=architecture.sets("mlp_bias") and bool(keys["mlp_bias"]),
        qk_norm=architecture.qk_norm,
        attention_bias=_read_attention_bias(keys, architecture),
        sliding_window=window,
        full_attention_layers=full_attention_layers,
        attention_dropout=(keys["attention_dropout"] or 0.0) if architecture.sets("attention_dropout") else 0.0,
        tie_embeddings=bool(keys["tie_word_embeddings"]),
        moe=_read_moe(keys, architecture),
    )
    if not architecture.fits(config):
        raise UnsupportedModel(
            f"config.json: hidden_size={config.dim}, num_attention_heads={config.num_heads} and "
            f"head_dim={config.head_dim} do not fit together in {architecture.name}"
        )
    return config


def _read_attention_bias(keys: _Keys, architecture: Architecture) -> AttentionBias:
    if architecture.sets("attention_bias"):
        return "qkvo" if keys["attention_bias"] else "none"
    if architecture.sets("qkv_bias"):
        return "qkv" if keys["qkv_bias"] else "none"
    return architecture.attention_bias


def _read_windows(keys: _Keys, architecture: Architecture, types: Any) -> tuple[int | None, int]:
    """The sliding window and the number of first layers without it; `types` are the `layer_types`."""
    window = keys["sliding_window"] if architecture.sets("sliding_window") else None
    if architecture.sets("use_sliding_window") and not keys["use_sliding_window"]:
        window = None
    num_layers = keys["num_hidden_layers"]
    if architecture.slides is None:
        same = "full_attention" if window is None else "sliding_attention"
        # transformers makes Ministral of a Mistral that has them.
        if types is not None and types != [same] * num_layers:
            raise UnsupportedModel(
                f"config.json: layer_types={types!r} is not supported in {architecture.name}; with "
                f"sliding_window={window!r} it must be {same} for each of num_hidden_layers={num_layers}"
            )
        return window, 0
    if types is None:
        slides = [window is not None and architecture.slides(i, keys["max_window_layers"]) for i in range(num_layers)]
    else:
        slides = [kind == "sliding_attention" for kind in types]
        if len(types) != num_layers or set(types) - {"sliding_attention", "full_attention"}:
            raise UnsupportedModel(
                f"config.json: layer_types={types!r} is not supported; it must be sliding_attention or full_attention "
                f"for each of num_hidden_layers={num_layers}"
            )
    if not any(slides):
        return None, 0
    full = slides.index(True)
    if window is None or not all(slides[full:]):
        raise UnsupportedModel(
            f"config.json: layer_types={types!r} with sliding_window={keys['sliding_window']!r}, "
            f"use_sliding_window={keys['use_sliding_window']!r} and max_window_layers={keys['max_window_layers']!r} "
            "is not supported; sliding layers need a window and must all come after the full ones"
        )
    return window, full


def _read_moe(keys: _Keys, architecture: Architecture) -> MoEConfig | None:
    names = architecture.moe
    if names is None:
        return None
    hidden_dim = keys[names.hidden_dim]
    shared_dim = 0
    if architecture.sets("moe_num_shared_experts"):
        shared_dim = keys["moe_num_shared_experts"] * hidden_dim
    if architecture.sets("shared_expert_intermediate_size"):
        shared_dim = keys["shared_expert_intermediate_size"]
    first_dense, every, dense = _read_moe_layers(keys, architecture)
    return MoEConfig(
        num_experts=keys[names.num_experts],
        top_k=keys[names.top_k],
        num_shared_experts=shared_dim // hidden_dim if shared_dim % hidden_dim == 0 else 1,
        expert_hidden_dim=hidden_dim,
        shared_hidden_dim=shared_dim or None,
        shared_gate=names.shared_gate is not None,
        normalize_top_k=names.normalize_top_k is None or bool(keys[names.normalize_top_k]),
        first_dense_layers=first_dense,
        every=every,
        dense_layers=dense,
    )


def _read_moe_layers(keys: _Keys, architecture: Architecture) -> tuple[int, int, tuple[int, ...]]:
    """`first_dense_layers`, `every` and `dense_layers`."""
    num_layers = keys["num_hidden_layers"]
    if architecture.sets("decoder_sparse_step"):
        dense = keys["mlp_only_layers"] or []
        return 0, keys["decoder_sparse_step"], tuple(sorted(layer for layer in dense if 0 <= layer < num_layers))
    if architecture.sets("moe_layer_start_index"):
        every, last = keys["moe_layer_interval"], keys["moe_layer_end_index"]
        last = num_layers - 1 if last == -1 else last
        return keys["moe_layer_start_index"], every, tuple(range(max(last + 1, 0), num_layers))
    return 0, 1, ()


# --- writing --------------------------------------------------------------------------------------------------------


def write_config(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """`config.json` of `architecture`, as far as its keys can say what `config` does."""
    moe, names = config.moe, architecture.moe
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": next(act for act, activation in _ACTIVATIONS.items() if activation == config.activation),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
        "attention_bias": config.attention_bias == "qkvo",
        "qkv_bias": config.attention_bias != "none",
        "mlp_bias": config.ffn_bias,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.full_attention_layers if config.sliding_window else config.num_layers,
        "layer_types": [
            "full_attention" if config.window(layer) is None else "sliding_attention"
            for layer in range(config.num_layers)
        ],
        **write_rope(config),
    }
    if moe is not None and names is not None:
        values |= _write_moe(config, moe, architecture)
        values |= {
            names.num_experts: moe.num_experts,
            names.top_k: moe.top_k,
            names.hidden_dim: moe.expert_hidden_dim,
        }
    keys = (*architecture.defaults, "rope_theta", "rope_parameters", "rope_scaling")
    fixed = {key: value for key, value in architecture.only.items() if value is not None}
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **fixed,
        **{key: values[key] for key in keys},
    }


def _write_moe(config: ModelConfig, moe: MoEConfig, architecture: Architecture) -> dict[str, Any]:
    assert moe.expert_hidden_dim is not None
    layers = [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]
    shared_dim = moe.shared_hidden_dim or 0
    return {
        "norm_topk_prob": moe.normalize_top_k,
        "shared_expert_intermediate_size": shared_dim,
        "moe_num_shared_experts": shared_dim // moe.expert_hidden_dim,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": [
            layer for layer in range(config.num_layers) if (layer + 1) % moe.every == 0 and layer not in layers
        ],
        "moe_layer_start_index": layers[0],
        "moe_layer_end_index": layers[-1],
        "moe_layer_interval": moe.every,
    }
