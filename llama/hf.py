"""Hugging Face directories, both ways.

A dense model is written as `LlamaForCausalLM`, a mixture of experts as `Ernie4_5_MoeForCausalLM`, the architecture of
`transformers` that has softmax routing with a correction bias, ungated shared experts and grouped-query attention.
ERNIE turns neighbouring pairs of dimensions in its rotary embedding where LLaMA turns the two halves of a head, so
the rows of its query and key projections are the same rows in another order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama.config import ModelConfig, MoEConfig
from llama.model import Transformer
from llama.tokenizer import Tokenizer

WEIGHTS_FILE = "model.safetensors"
_ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
_FEED_FORWARD = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class UnsupportedModel(ValueError):
    """A model that has no counterpart on the other side, or an incomplete directory."""


# --- configuration --------------------------------------------------------------------------------------------------


def check_exportable(config: ModelConfig) -> None:
    """For a check before training.

    Raises:
        UnsupportedModel: `save_pretrained` cannot write such a model; names the field.
    """
    if config.moe is not None and not config.moe.normalize_top_k:
        raise UnsupportedModel(
            "model.moe.normalize_top_k=False has no counterpart in Ernie4_5_MoeForCausalLM; train with True to export"
        )


def _hf_config(config: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, Any]:
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": tokenizer.eos_id if tokenizer else None,
        "pad_token_id": tokenizer.pad_id if tokenizer else None,
        "use_cache": True,
    }
    moe = config.moe
    if moe is None:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            **common,
        }
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "use_bias": False,
        "moe_intermediate_size": moe.expert_hidden_dim,
        "moe_k": moe.top_k,
        "moe_num_experts": moe.num_experts,
        "moe_num_shared_experts": moe.num_shared_experts,
        "moe_layer_start_index": moe.first_dense_layers,
        "moe_layer_end_index": config.num_layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        **common,
    }


def _require_value(hf: dict[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if key in hf and hf[key] not in allowed:
        raise UnsupportedModel(f"config.json: {key}={hf[key]!r} is not supported; it must be {allowed[0]!r}")


def _model_config(hf: dict[str, Any]) -> ModelConfig:
    model_type = hf.get("model_type")
    if model_type not in ("llama", "ernie4_5_moe"):
        raise UnsupportedModel(f"config.json: model_type={model_type!r} is not supported; use llama or ernie4_5_moe")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UnsupportedModel(f"config.json: rope_type={rope_type!r} is not supported; it must be 'default'")
    _require_value(hf, "hidden_act", ("silu",))
    for key in ("attention_bias", "mlp_bias", "use_bias"):
        _require_value(hf, key, (False, None))
    moe = None
    if model_type == "ernie4_5_moe":
        _require_value(hf, "moe_layer_interval", (1,))
        _require_value(hf, "moe_layer_end_index", (hf["num_hidden_layers"] - 1, -1))
        moe = MoEConfig(
            num_experts=hf["moe_num_experts"],
            top_k=hf["moe_k"],
            num_shared_experts=hf["moe_num_shared_experts"],
            expert_hidden_dim=hf["moe_intermediate_size"],
            first_dense_layers=hf["moe_layer_start_index"],
        )
    default_theta = 500000.0 if moe else 10000.0
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads"),
        head_dim=hf.get("head_dim"),
        hidden_dim=hf["intermediate_size"],
        max_seq_len=hf["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", default_theta))),
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf.get("tie_word_embeddings", moe is not None),
        moe=moe,
    )


# --- weights --------------------------------------------------------------------------------------------------------


def _halves_to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from (first half, second half) order to neighbouring pairs."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _pairs_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    return weight.view(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _name_map(config: ModelConfig) -> Iterator[tuple[str, int | None, str]]:
    """(our name, expert index or None, Hugging Face name) of every tensor."""
    yield "tok_embeddings.weight", None, "model.embed_tokens.weight"
    yield "norm.weight", None, "model.norm.weight"
    if not config.tie_embeddings:
        yield "output.weight", None, "lm_head.weight"
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        yield f"{ours}.attention_norm.weight", None, f"{theirs}.input_layernorm.weight"
        yield f"{ours}.ffn_norm.weight", None, f"{theirs}.post_attention_layernorm.weight"
        for name, hf_name in _ATTENTION.items():
            yield f"{ours}.attention.{name}.weight", None, f"{theirs}.self_attn.{hf_name}.weight"
        ours, theirs = f"{ours}.feed_forward", f"{theirs}.mlp"
        if not config.is_moe_layer(layer):
            for name, hf_name in _FEED_FORWARD.items():
                yield f"{ours}.{name}.weight", None, f"{theirs}.{hf_name}.weight"
            continue
        moe = config.moe
        assert moe is not None
        yield f"{ours}.router.weight", None, f"{theirs}.gate.weight"
        yield f"{ours}.router.expert_bias", None, f"{theirs}.moe_statics.e_score_correction_bias"
        for name, hf_name in _FEED_FORWARD.items():
            for expert in range(moe.num_experts):
                yield f"{ours}.experts.{name}", expert, f"{theirs}.experts.{expert}.{hf_name}.weight"
            if moe.num_shared_experts:
                yield f"{ours}.shared.{name}.weight", None, f"{theirs}.shared_experts.{hf_name}.weight"


def _is_rotary(name: str) -> bool:
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def save_pretrained(
    model: Transformer, directory: str | Path, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None
) -> None:
    """Writes a directory that `transformers.AutoModelForCausalLM` loads.

    The weights file appears whole or not at all, and `config.json` last: a directory without it is unfinished.

    Args:
        model: a plain (unsharded) model.
        tokenizer: written beside the weights when given, chat template included.
        dtype: type of the stored weights; None keeps the model's.

    Raises:
        UnsupportedModel: no architecture of transformers computes the same function.
    """
    directory = Path(directory)
    config = model.config
    check_exportable(config)
    dtype = dtype or model.tok_embeddings.weight.dtype
    hf_config = _hf_config(config, dtype, tokenizer)
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, expert, hf_name in _name_map(config):
        tensor = state[name] if expert is None else state[name][expert]
        if config.moe is not None and _is_rotary(name):
            tensor = _halves_to_pairs(tensor, config.resolved_head_dim)
        if hf_name.endswith("e_score_correction_bias"):
            tensor = tensor.view(1, -1).float()
        else:
            tensor = tensor.to(dtype)
        tensors[hf_name] = tensor.detach().cpu().contiguous().clone()
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(directory)
    partial = directory / f".{WEIGHTS_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, directory / WEIGHTS_FILE)
    generation = {key: hf_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")
    (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", "utf-8")


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor, by its Hugging Face name."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        # Only names of files in this directory: an index must not lead elsewhere.
        return {name: directory / Path(file).name for name, file in weight_map.items()}
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise UnsupportedModel(f"{directory} holds no {WEIGHTS_FILE}; export or download the weights as safetensors")
    with safe_open(path, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), path)


def load_pretrained(directory: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Reads a Hugging Face directory of a supported architecture.

    Returns:
        a model in evaluation mode with its `config`; routing biases stay fp32.

    Raises:
        UnsupportedModel: another architecture, an unsupported setting, or a missing or misshapen tensor.
        FileNotFoundError: no `config.json`.
    """
    directory = Path(directory)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json; give a directory of a Hugging Face model")
    config = _model_config(json.loads(config_path.read_text("utf-8")))
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    state = model.state_dict()
    files = _tensor_files(directory)
    readers = {path: safe_open(path, framework="pt") for path in set(files.values())}
    for name, expert, hf_name in _name_map(config):
        target = state[name] if expert is None else state[name][expert]
        if hf_name not in files:
            if hf_name.endswith("e_score_correction_bias"):
                target.zero_()
                continue
            raise UnsupportedModel(f"{directory}: tensor {hf_name} is missing; the model is incomplete")
        tensor = readers[files[hf_name]].get_tensor(hf_name)
        if hf_name.endswith("e_score_correction_bias"):
            tensor = tensor.view(-1)
        if tensor.shape != target.shape:
            raise UnsupportedModel(
                f"{directory}: tensor {hf_name} has shape {list(tensor.shape)}, "
                f"config.json calls for {list(target.shape)}"
            )
        if config.moe is not None and _is_rotary(name):
            tensor = _pairs_to_halves(tensor, config.resolved_head_dim)
        target.copy_(tensor)
    return model.eval()
