"""LoRA adapters in PEFT's format, both ways: a directory of `adapter_config.json` and `adapter_model.safetensors`.

A layer is called what the base model's directory calls it (llama/hf_names.py). The rows of B are those of the layer's
weight, so they follow the rotary layout as the weight's do; A is the same everywhere. Nothing here needs peft.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama.config import RopeLayout
from llama.hf import architecture_of
from llama.hf_names import stored_tensors, turn_rows
from llama.hf_values import UnsupportedModel, checked, named, read_json
from llama.lora import LoraConfig, Target, apply_lora, lora_layers
from llama.model import Transformer

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ONLY: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
"""Keys of `adapter_config.json` that have one supported value, the one that an absent one stands for."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights`, or how they begin, by which PEFT takes the adapter's start out of the base weights."""


@dataclass(frozen=True)
class _Place:
    """A linear layer that may be adapted: its name here, the base model's for it, and whose order its rows have."""

    layer: str
    module: str
    rope_layout: RopeLayout
    routed: bool
    """One of a bank of experts, which takes no adapter."""

    @property
    def target(self) -> str:
        return _last(self.layer)


def save_adapter(model: Transformer, directory: str | Path, base: str | None = None) -> None:
    """Writes the adapters of a plain model, for `peft.PeftModel.from_pretrained` to put on the exported base model.

    Args:
        base: name or path of the base model, for who looks for it in `adapter_config.json`.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters; give one that apply_lora has made")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    head_dim, ours = model.config.resolved_head_dim, model.config.rope_layout
    modules: list[str] = []
    others: set[str] = set()
    tensors: dict[str, Tensor] = {}
    for place in _places(model):
        if place.layer not in layers:
            others.add(_last(place.module))
            continue
        modules.append(place.module)
        layer = layers[place.layer]
        pair = layer.lora_a, turn_rows(layer.lora_b, head_dim, ours, place.rope_layout)
        tensors |= {key: tensor.detach().cpu().contiguous() for key, tensor in zip(_keys(place), pair, strict=True)}
    save_file(tensors, directory / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    short = set(map(_last, modules))
    config = next(iter(layers.values())).config
    settings = {
        **_ONLY,
        # With the task PEFT passes the model arguments that CaravanForCausalLM does not take.
        "task_type": "CAUSAL_LM" if architecture_of(model) is not None else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        # PEFT adapts every layer whose name ends so; where that is more than these, full names say which.
        "target_modules": modules if short & others else sorted(short),
    }
    (directory / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


@torch.no_grad()
def load_adapter(model: Transformer, directory: str | Path) -> LoraConfig:
    """Puts the adapters of a PEFT directory on a plain model, in place; returns what they are.

    Raises:
        UnsupportedModel: another kind of adapter, a damaged file, or a tensor that is missing, misshapen or of no layer
            of this model; the model is as it was then.
        FileNotFoundError: no `adapter_config.json`.
    """
    directory = Path(directory)
    if not (directory / ADAPTER_CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{directory} holds no {ADAPTER_CONFIG_FILE}; give a directory that PEFT has saved")
    settings = read_json(directory / ADAPTER_CONFIG_FILE)
    for key, only in _ONLY.items():
        if settings.get(key, only) != only and (settings[key] or only):
            raise UnsupportedModel(
                f"{ADAPTER_CONFIG_FILE}: {key}={settings[key]!r} is not supported; it must be {only}"
            )
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise UnsupportedModel(
            f"{ADAPTER_CONFIG_FILE}: init_lora_weights={start!r} is not supported: the adapter is one of changed base "
            "weights; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    try:
        tensors = load_file(directory / ADAPTER_WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UnsupportedModel(f"{directory}: {ADAPTER_WEIGHTS_FILE} cannot be read: {error}") from error
    takers = [place for place in _places(model) if not place.routed]
    targets = {place.target for place in takers if _keys(place)[0] in tensors}
    config = named(
        lambda: LoraConfig(
            rank=checked("r", settings.get("r", 8), "int"),
            alpha=checked("lora_alpha", settings.get("lora_alpha", 8), "int"),
            dropout=checked("lora_dropout", settings.get("lora_dropout", 0.0), "float"),
            targets=tuple(target for target in get_args(Target) if target in targets),
        )
    )
    places = [place for place in takers if place.target in targets]
    shapes: dict[str, list[int]] = {}
    for place in places:
        linear = model.get_submodule(place.layer)
        assert isinstance(linear, nn.Linear)
        sizes = [config.rank, linear.in_features], [linear.out_features, config.rank]
        shapes.update(zip(_keys(place), sizes, strict=True))
    for key in sorted(shapes.keys() | tensors.keys()):
        found = list(tensors[key].shape) if key in tensors else "missing"
        if key not in shapes:
            raise UnsupportedModel(
                f"{directory}: tensor {key} is of no layer of this model; give the adapter's own base"
            )
        if found != shapes[key]:
            raise UnsupportedModel(f"{directory}: tensor {key} is {found}, the model calls for {shapes[key]}")
    layers = lora_layers(apply_lora(model, config))
    for place in places:
        a, b = (tensors[key] for key in _keys(place))
        layers[place.layer].lora_a.copy_(a)
        head_dim, ours = model.config.resolved_head_dim, model.config.rope_layout
        layers[place.layer].lora_b.copy_(turn_rows(b, head_dim, place.rope_layout, ours))
    return config


def _places(model: Transformer) -> list[_Place]:
    """Every matrix that has the name of a target."""
    architecture, ours = architecture_of(model), model.config.rope_layout
    places = []
    for entry in stored_tensors(model.config, architecture):
        layer, module = entry.name.removesuffix(".weight"), entry.stored.removesuffix(".weight")
        if _last(layer) in get_args(Target):
            rows = architecture.rope_layout if architecture is not None and entry.turned else ours
            places.append(_Place(layer, module, rows, routed=layer == entry.name))
    return places


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _keys(place: _Place) -> tuple[str, str]:
    """The names of A and B."""
    return f"{_PREFIX}{place.module}.lora_A.weight", f"{_PREFIX}{place.module}.lora_B.weight"
