"""What a model costs, from its config alone: every tensor's shape, and the counts that follow. Needs no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.config import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every trained parameter, as `Transformer.named_parameters` gives them."""
    dim = config.dim
    shapes: dict[str, Shape] = {"tok_embeddings.weight": (config.vocab_size, dim)}
    if config.position == "learned":
        shapes["position_embeddings.weight"] = (config.max_seq_len, dim)
    if config.position == "t5":
        shapes["relative_bias"] = (config.t5_buckets, config.num_heads)
    placement = config.norm_placement
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        norms = ["attention_norm", "ffn_norm"]
        if placement == "sandwich":
            norms += ["attention_post_norm", "ffn_post_norm"]
        for norm in norms:
            shapes |= _norm(config, f"{prefix}.{norm}")
        shapes |= _attention(config, f"{prefix}.attention")
        if config.is_moe_layer(layer):
            shapes |= _moe(config, f"{prefix}.feed_forward")
        else:
            shapes |= _feed_forward(config, f"{prefix}.feed_forward", config.ffn_hidden_dim)
    if placement in ("pre", "sandwich"):
        shapes |= _norm(config, "norm")
    if not config.tie_embeddings:
        shapes["output.weight"] = (config.vocab_size, dim)
    return shapes


def buffer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a model that is no parameter, as `Transformer.named_buffers` gives them but for
    the order: routing biases and batch norms' running statistics. They are fp32 in every model."""
    shapes: dict[str, Shape] = {}
    for layer in range(config.num_layers):
        if config.moe is not None and config.is_moe_layer(layer):
            shapes[f"layers.{layer}.feed_forward.router.expert_bias"] = (config.moe.num_experts,)
    if config.norm == "batchnorm":
        for name, shape in parameter_shapes(config).items():
            if name.endswith("norm.bias"):  # q/k norms have none
                shapes |= {f"{name.removesuffix('bias')}running_{kind}": shape for kind in ("mean", "var")}
    return shapes


def _norm(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{prefix}.weight": (config.dim,)}
    if config.norm != "rmsnorm":
        shapes[f"{prefix}.bias"] = (config.dim,)
    return shapes


def _linear(prefix: str, outputs: int, inputs: int, bias: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{prefix}.weight": (outputs, inputs)}
    if bias:
        shapes[f"{prefix}.bias"] = (outputs,)
    return shapes


def _attention(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    q_dim = config.num_heads * config.resolved_head_dim
    kv_dim = config.kv_heads * config.resolved_head_dim
    qkv_bias, output_bias = config.attention_bias != "none", config.attention_bias == "qkvo"
    shapes = {
        **_linear(f"{prefix}.wq", q_dim, config.dim, qkv_bias),
        **_linear(f"{prefix}.wk", kv_dim, config.dim, qkv_bias),
        **_linear(f"{prefix}.wv", kv_dim, config.dim, qkv_bias),
        **_linear(f"{prefix}.wo", config.dim, q_dim, output_bias),
    }
    if config.qk_norm != "none":
        per_head = config.qk_norm == "head"
        shapes[f"{prefix}.q_norm.weight"] = (config.resolved_head_dim if per_head else q_dim,)
        shapes[f"{prefix}.k_norm.weight"] = (config.resolved_head_dim if per_head else kv_dim,)
    return shapes


def _feed_forward(config: ModelConfig, prefix: str, hidden_dim: int) -> dict[str, Shape]:
    shapes = _linear(f"{prefix}.w1", hidden_dim, config.dim, config.ffn_bias)
    if config.gated:
        shapes |= _linear(f"{prefix}.w3", hidden_dim, config.dim, config.ffn_bias)
    shapes |= _linear(f"{prefix}.w2", config.dim, hidden_dim, config.ffn_bias)
    if config.activation == "swish_learned":
        shapes[f"{prefix}.activation.beta"] = (1,)
    return shapes


def _moe(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    moe = config.moe
    assert moe is not None and moe.expert_hidden_dim is not None
    experts, hidden, dim = moe.num_experts, moe.expert_hidden_dim, config.dim
    shapes: dict[str, Shape] = {
        f"{prefix}.router.weight": (experts, dim),
        f"{prefix}.experts.w1": (experts, hidden, dim),
        f"{prefix}.experts.w2": (experts, dim, hidden),
    }
    if config.gated:
        shapes[f"{prefix}.experts.w3"] = (experts, hidden, dim)
    if config.activation == "swish_learned":
        shapes[f"{prefix}.experts.activation.beta"] = (1,)
    if moe.shared_hidden_dim is not None:
        shapes |= _feed_forward(config, f"{prefix}.shared", moe.shared_hidden_dim)
    if moe.shared_gate:
        shapes[f"{prefix}.shared_gate.weight"] = (1, dim)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Trained parameters, tied embeddings counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets: of the routed experts only `top_k`."""
    return sum(_active(config, name, shape) for name, shape in parameter_shapes(config).items())


def _active(config: ModelConfig, name: str, shape: Shape) -> int:
    size = math.prod(shape)
    if config.moe is not None and ".experts.w" in name:
        return size // config.moe.num_experts * config.moe.top_k
    return size


def flops_per_token(config: ModelConfig, seq_len: int, frozen: bool = False) -> float:
    """Forward and backward FLOPs of one trained token in a causal sequence of `seq_len` tokens.

    6 per active parameter, embedding tables excluded and the output projection included, plus attention scores and
    values over the keys that a query sees on average (PaLM, arXiv:2204.02311, appendix B, with the causal half and the
    sliding window). Where the weights are `frozen`, as below adapters, backward has the gradients of activations only:
    4 per parameter; what the adapters themselves cost is left out.
    """
    tables = ("tok_embeddings.weight", "position_embeddings.weight", "output.weight", "relative_bias")
    matrices = config.vocab_size * config.dim + sum(
        _active(config, name, shape) for name, shape in parameter_shapes(config).items() if name not in tables
    )
    seen = sum(_mean_keys(seq_len, config.window(layer)) for layer in range(config.num_layers))
    return (4.0 if frozen else 6.0) * matrices + 12 * config.num_heads * config.resolved_head_dim * seen


def _mean_keys(seq_len: int, window: int | None) -> float:
    """Keys that a query sees, averaged over a long sequence's queries."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window - window**2 / (2 * seq_len)
