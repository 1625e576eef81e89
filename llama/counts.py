"""What a model costs, from its config alone: every tensor's shape, and the counts that follow. Needs no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.config import ModelConfig
    from llama.seq2seq_config import Seq2SeqConfig

Shape = tuple[int, ...]

_TABLES = {
    f"{stack}{table}"
    for stack in ("", "encoder_")
    for table in ("tok_embeddings.weight", "position_embeddings.weight", "output.weight", "relative_bias")
}
"""Parameters that a token looks something up in."""


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every trained parameter, as `Transformer.named_parameters` gives them."""
    dim = config.dim
    shapes: dict[str, Shape] = {"tok_embeddings.weight": (config.vocab_size, dim)}
    if config.position == "learned":
        shapes["position_embeddings.weight"] = (config.max_seq_len, dim)
    if config.position == "t5":
        shapes["relative_bias"] = (config.t5_buckets, config.num_heads)
    cross = config.stacks[0] > 0
    for layer in range(config.num_layers):
        shapes |= _block(config, f"layers.{layer}", config.is_moe_layer(layer), cross)
    if config.has_final_norm:
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


def encoder_shapes(config: Seq2SeqConfig) -> dict[str, Shape]:
    """What a `Seq2Seq` has beside its decoder."""
    shapes: dict[str, Shape] = {}
    if config.position == "learned":
        shapes["encoder_position_embeddings.weight"] = (config.source_len, config.dim)
    if config.position == "t5":
        shapes["encoder_relative_bias"] = (config.t5_buckets, config.num_heads)
    for layer in range(config.stacks[0]):
        shapes |= _block(config, f"encoder_layers.{layer}")
    if config.has_final_norm:
        shapes |= _norm(config, "encoder_norm")
    return shapes


def _block(config: ModelConfig, prefix: str, moe: bool = False, cross: bool = False) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for sublayer in ("attention", "cross", "ffn") if cross else ("attention", "ffn"):
        shapes |= _norm(config, f"{prefix}.{sublayer}_norm")
        if config.norm_placement == "sandwich":
            shapes |= _norm(config, f"{prefix}.{sublayer}_post_norm")
    shapes |= _attention(config, f"{prefix}.attention")
    if cross:
        shapes |= _attention(config, f"{prefix}.cross_attention")
    if moe:
        return shapes | _moe(config, f"{prefix}.feed_forward")
    return shapes | _feed_forward(config, f"{prefix}.feed_forward", config.ffn_hidden_dim)


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


def num_parameters(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


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
    matrices = config.vocab_size * config.dim + sum(
        _active(config, name, shape) for name, shape in parameter_shapes(config).items() if name not in _TABLES
    )
    seen = sum(_mean_keys(seq_len, config.window(layer)) for layer in range(config.num_layers))
    return (4.0 if frozen else 6.0) * matrices + 12 * config.num_heads * config.resolved_head_dim * seen


def seq2seq_flops_per_token(config: Seq2SeqConfig, seq_len: int, frozen: bool = False) -> float:
    """Forward and backward FLOPs of one trained token of a target of `seq_len` tokens, whose source is as long (or the
    longest there is): of the encoder's share too, and of the attention to its output."""
    source = min(seq_len, config.source_len)
    encoder_layers, layers = config.stacks
    encoder = sum(math.prod(shape) for name, shape in encoder_shapes(config).items() if name not in _TABLES)
    attended = encoder_layers * source**2 / seq_len + layers * source
    heads = 12 * config.num_heads * config.resolved_head_dim
    share = (4.0 if frozen else 6.0) * source / seq_len
    return flops_per_token(config, seq_len, frozen) + share * encoder + heads * attended


def _mean_keys(seq_len: int, window: int | None) -> float:
    """Keys that a query sees, averaged over a long sequence's queries."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window - window**2 / (2 * seq_len)


def generation_flops(config: ModelConfig, prompt: int, new_tokens: int, cached: bool) -> list[float]:
    """Cumulative FLOPs after each of `new_tokens` tokens generated behind a prompt of at least one token.

    With the cache the first token takes a forward pass over the prompt, and each further one a pass over its
    predecessor; without it, each takes a pass over all tokens before it. A pass costs 2 per element of every matrix
    that a token meets, 4 per head dimension and key that a query sees (scores, then values), and the logits of its
    last position. Norms, activations and the embedding look-up are left out.
    """
    matrices = sum(
        _active(config, name, shape)
        for name, shape in parameter_shapes(config).items()
        if len(shape) > 1 and name not in _TABLES
    )
    windows = Counter(config.window(layer) for layer in range(config.num_layers))
    heads_dim = config.num_heads * config.resolved_head_dim

    def forward(start: int, end: int) -> float:
        keys = sum(layers * (_seen(end, window) - _seen(start, window)) for window, layers in windows.items())
        return 2.0 * ((end - start) * matrices + config.vocab_size * config.dim) + 4.0 * heads_dim * keys

    return list(
        accumulate(forward(prompt + step - 1 if cached and step else 0, prompt + step) for step in range(new_tokens))
    )


def _seen(length: int, window: int | None) -> int:
    """Keys that the first `length` queries see, all together."""
    full = length if window is None else min(length, window)
    return full * (full + 1) // 2 + (length - full) * full
