"""Which stored tensor holds which of our parameters, for every architecture.

The list follows llama/counts.py, the one list of a model's tensors, so none of them can be forgotten; a bank of experts
is stored as one tensor to an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from llama.config import ModelConfig, RopeLayout
from llama.counts import Shape, buffer_shapes, parameter_shapes
from llama.hf_architectures import Architecture

CARAVAN_PREFIX = "model."
"""Where `CaravanForCausalLM` holds our `Transformer`."""
LM_HEAD = "lm_head.weight"
EMBEDDINGS = "model.embed_tokens.weight"
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_TURNED = ("attention.wq", "attention.wk", "attention.q_norm", "attention.k_norm")
"""Parts whose rows follow the rotary layout; a norm over q or k has one weight to a row."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file and its place in our state dict."""

    stored: str
    name: str
    shape: Shape
    """As stored."""
    expert: int | None = None
    """Its index in our bank of experts."""
    turned: bool = False
    """Its rows are in the order of the rotary layout."""
    buffer: bool = False
    """No parameter: it stays fp32 in every model."""


def stored_tensors(config: ModelConfig, architecture: Architecture | None) -> Iterator[StoredTensor]:
    """Every tensor of a model, as `architecture` stores it; None is Caravan's own."""
    for name, shape in parameter_shapes(config).items():
        if architecture is None:
            yield StoredTensor(CARAVAN_PREFIX + name, name, shape)
        elif ".experts." in name:
            yield from _expert_tensors(name, shape, architecture)
        else:
            part, kind = name.rsplit(".", 1)
            turned = part.endswith(_TURNED)
            yield StoredTensor(f"{_stored_part(part, architecture)}.{kind}", name, shape, turned=turned)
    for name, shape in buffer_shapes(config).items():
        if architecture is None:
            yield StoredTensor(CARAVAN_PREFIX + name, name, shape, buffer=True)
        elif architecture.moe is not None and architecture.moe.expert_bias is not None:
            layer = name.split(".")[1]
            stored = f"model.layers.{layer}.{architecture.moe.block}.{architecture.moe.expert_bias}"
            yield StoredTensor(stored, name, (1, *shape), buffer=True)


def _stored_part(part: str, architecture: Architecture) -> str:
    if part in _TOP:
        return _TOP[part]
    _, layer, inner = part.split(".", 2)
    prefix, moe = f"model.layers.{layer}", architecture.moe
    if inner in _BLOCK:
        return f"{prefix}.{_BLOCK[inner]}"
    assert moe is not None
    inner = inner.removeprefix("feed_forward.")
    if inner == "router":
        return f"{prefix}.{moe.block}.gate"
    if inner == "shared_gate":
        return f"{prefix}.{moe.block}.{moe.shared_gate}"
    return f"{prefix}.{moe.block}.{moe.shared}.{moe.projections[inner.removeprefix('shared.')]}"


def _expert_tensors(name: str, shape: Shape, architecture: Architecture) -> Iterator[StoredTensor]:
    moe = architecture.moe
    assert moe is not None
    _, layer, _, _, projection = name.split(".")
    prefix = f"model.layers.{layer}.{moe.block}.experts"
    for expert in range(shape[0]):
        stored = f"{prefix}.{expert}.{moe.projections[projection]}.weight"
        yield StoredTensor(stored, name, shape[1:], expert=expert)


def turn_rows(tensor: Tensor, head_dim: int, have: RopeLayout, want: RopeLayout) -> Tensor:
    """The rows of each head from one rotary layout's order to the other's; any shape `[heads · head_dim, ...]`."""
    if have == want:
        return tensor
    split = (2, head_dim // 2) if have == "half" else (head_dim // 2, 2)
    return tensor.unflatten(0, (-1, *split)).transpose(1, 2).flatten(0, 2)
