"""What published architectures are made of, found out from models of transformers and presets of ours, not from lists.

A tiny model of the architecture is built from its config class, everything but the sizes left at the class's defaults;
norms are recognised by what they do to numbers, their placement by what they are given, activations by their values.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llama.activation import build_activation
from llama.config import ModelConfig

HEADS, HEAD_DIM = 4, 16
SMALL = {
    "vocab_size": 96,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}


@dataclass(frozen=True)
class Source:
    """Where an architecture's parts are in its class of transformers. Names are relative to the model or the layer."""

    config: str
    model: str
    layers: str = "layers"
    attention: str = "self_attn"
    feed_forward: str = "mlp"
    sizes: dict[str, Any] = field(default_factory=dict)


def module(root: nn.Module, path: str) -> Any:
    return root.get_submodule(path) if path else root


def norm_kind(norm: nn.Module, dim: int) -> str:
    """By what is left of a token's mean: none with layernorm, all of it in proportion with rmsnorm."""
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(0)) * 3 + 2
    with torch.no_grad():
        y = norm(x)
    if torch.allclose(y, (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True), atol=1e-3):
        return "layernorm"
    if torch.allclose(y, x / x.square().mean(-1, keepdim=True).sqrt(), atol=1e-3):
        return "rmsnorm"
    return "?"


def activation_kind(function: Callable[[Tensor], Tensor], gated: bool) -> str:
    x = torch.linspace(-4, 4, 101)
    kinds = ("relu", "gelu", "gelu_tanh", "swish")
    (kind,) = (each for each in kinds if torch.allclose(function(x), build_activation(each)(x), atol=1e-6))  # type: ignore[arg-type]
    gate = {"swish": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu (tanh)", "relu": "reglu"}
    return gate[kind] if gated else kind


class Calls:
    """The order in which a layer calls its norms, its attention and its feed-forward, and what with."""

    def __init__(self, layer: nn.Module, attention: nn.Module, feed_forward: nn.Module) -> None:
        self.made: list[tuple[str, Tensor, Tensor]] = []
        inside = {id(each) for part in (attention, feed_forward) for each in part.modules()}
        for each in layer.modules():
            if each is attention or each is feed_forward:
                kind = "attention" if each is attention else "feed-forward"
            elif "Norm" in type(each).__name__ and id(each) not in inside:
                kind = "norm"
            else:
                continue
            each.register_forward_hook(self._hook(kind), with_kwargs=True)

    def _hook(self, kind: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            self.made.append((kind, given, output[0] if isinstance(output, tuple) else output))

        return keep

    def placement(self) -> str:
        order = [kind for kind, _, _ in self.made]
        given = [x for _, x, _ in self.made]
        if order == ["norm", "attention", "norm", "norm", "feed-forward", "norm"]:
            return "sandwich"
        if order == ["attention", "norm", "feed-forward", "norm"]:
            # Of the sum with the residual stream, or of the sub-layer's output alone.
            return "output" if torch.equal(given[1], self.made[0][2]) else "post"
        if sorted(order) == sorted(["norm", "attention", "norm", "feed-forward"]) and order[0] == "norm":
            norms = [x for kind, x, _ in self.made if kind == "norm"]
            return "parallel" if torch.equal(*norms) else "pre"
        if order == ["norm", "attention", "feed-forward"]:
            return "parallel"
        return " ".join(order)


def observe(source: Source) -> dict[str, str]:
    """The cells of the architecture's row."""
    import transformers

    kind = getattr(transformers, source.config)
    default = kind()
    config = kind(**{**small_sizes(default), **source.sizes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, source.model)(config).eval()
    layer = module(model, source.layers)[-1]  # the first may be a dense one
    attention, feed_forward = module(layer, source.attention), module(layer, source.feed_forward)
    calls = Calls(layer, attention, feed_forward)
    with torch.no_grad():
        model(input_ids=torch.arange(7)[None], use_cache=False)
    placement = calls.placement()
    norms = [each for each in layer.modules() if "Norm" in type(each).__name__]
    (norm,) = {norm_kind(each, each.weight.numel()) for each in norms}
    return {
        "position": position(model, config, layer),
        "norm": f"{norm}, {placement}",
        "activation": activation_kind(activation_of(feed_forward), gated(feed_forward)),
        "attention": attention_kind(default, attention),
        "experts": experts(default),
    }


def small_sizes(default: Any) -> dict[str, Any]:
    sizes = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    if default.to_dict().get("head_dim") is not None:
        sizes["head_dim"] = HEAD_DIM
    if getattr(default, "num_key_value_heads", None) is not None:
        sizes["num_key_value_heads"] = max(1, HEADS * default.num_key_value_heads // default.num_attention_heads)
    return sizes


def position(model: nn.Module, config: Any, layer: nn.Module) -> str:
    rotary = [each for each in model.modules() if "RotaryEmbedding" in type(each).__name__]
    if rotary:
        turned = 2 * next(value for name, value in rotary[0].named_buffers() if name.endswith("inv_freq")).numel()
        head = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or HEAD_DIM
        return "rope" if turned == head else f"rope on {turned / head:.0%} of a head"
    tables = [each for name, each in model.named_modules() if name.endswith(("wpe", "position_embeddings"))]
    if tables:
        return "learned"
    if any("relative_attention_bias" in name for name, _ in model.named_modules()):
        return "t5"
    source = inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
    return "alibi" if "def build_alibi_tensor" in source or "def build_mpt_alibi_tensor" in source else "?"


def activation_of(feed_forward: nn.Module) -> Callable[[Tensor], Tensor]:
    names = ("act", "act_fn", "gelu_impl", "intermediate_act_fn", "activation_fn")
    found = [getattr(each, name) for each in feed_forward.modules() for name in names if hasattr(each, name)]
    return found[0]


def gated(feed_forward: nn.Module) -> bool:
    """Whether a name of its weights speaks of a gate; a router and the gate of shared experts are others."""
    names = [name for name, _ in feed_forward.named_parameters()]
    return any("gate_proj" in name or "gate_up_proj" in name for name in names)


def attention_kind(config: Any, attention: nn.Module) -> str:
    names = dict(attention.named_modules())
    if getattr(config, "kv_lora_rank", None):
        return f"MLA, keys and values of rank {config.kv_lora_rank}"
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):
        kv_heads = 1
    said = ["MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else f"GQA, {kv_heads} of {heads} heads"]
    if "q_norm" in names:
        size = names["q_norm"].weight.numel()
        said.append(f"q/k norm over {'each head' if size == HEAD_DIM else 'all heads'}")
    kinds = set(getattr(config, "layer_types", None) or [])
    if getattr(config, "sliding_window", None) and kinds != {"full_attention"}:
        some = " in every other layer" if kinds == {"sliding_attention", "full_attention"} else ""
        said.append(f"window {config.sliding_window}{some}")
    if getattr(config, "attn_logit_softcapping", None):
        said.append(f"softcap {config.attn_logit_softcapping:g}")
    return ", ".join(said)


def experts(config: Any) -> str:
    routed = next(
        (n for name in ("n_routed_experts", "num_local_experts", "num_experts") if (n := getattr(config, name, None))),
        0,
    )
    if not routed:
        return "none"
    shared = getattr(config, "n_shared_experts", None) or 0
    if getattr(config, "shared_expert_intermediate_size", None):
        shared = 1
    return f"{config.num_experts_per_tok} of {routed}" + (f", {shared} shared" if shared else "")


def observe_torch() -> dict[str, str]:
    """The same of an encoder layer of `torch.nn.Transformer`, which leaves positions and tokens to its caller."""
    heads = inspect.signature(nn.Transformer).parameters["nhead"].default
    layer = nn.Transformer(
        d_model=64, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=48, batch_first=True
    ).encoder.layers[0]
    for each in layer.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    calls = Calls(layer, layer.self_attn, layer.linear1)
    x = torch.randn(1, 7, 64)
    layer(x)  # in training mode: outside it a fused kernel would call no part
    placement = calls.placement()
    return {
        "position": "—",
        "norm": f"{norm_kind(layer.norm1, 64)}, {placement}",
        "activation": activation_kind(layer.activation, gated=hasattr(layer, "linear3")),
        "attention": "MHA" if layer.self_attn.in_proj_weight.shape[0] == 3 * 64 and heads > 1 else "?",
        "experts": "none",
    }


def observe_tokenizer(name: str) -> str:
    """What a tokenizer class of transformers makes without any files."""
    import transformers

    backend = json.loads(getattr(transformers, name)().backend_tokenizer.to_str())
    kind = backend["model"]["type"]
    steps = (
        backend["pre_tokenizer"].get("pretokenizers", [backend["pre_tokenizer"]]) if backend["pre_tokenizer"] else []
    )
    if any(step["type"] == "ByteLevel" for step in steps):
        kind += " over bytes"
    elif backend["model"].get("byte_fallback"):
        kind += ", byte fallback"
    return f"{kind} (`{name}`)"


def observe_preset(config: ModelConfig) -> dict[str, str]:
    """The same of one of ours, from its settings."""
    kv_heads, heads, moe = config.kv_heads, config.num_heads, config.moe
    said = ["MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else f"GQA, {kv_heads} of {heads} heads"]
    if config.qk_norm != "none":
        said.append(f"q/k norm over {'each head' if config.qk_norm == 'head' else 'all heads'}")
    if config.sliding_window:
        said.append(f"window {config.sliding_window}")
    scaling = config.rope_scaling
    return {
        "position": config.position + (f", {scaling.kind} scaling" if scaling else ""),
        "norm": f"{config.norm}, {config.norm_placement}",
        "activation": config.activation,
        "attention": ", ".join(said),
        "experts": "none"
        if moe is None
        else f"{moe.top_k} of {moe.num_experts}"
        + (f", {moe.num_shared_experts} shared" if moe.num_shared_experts else ""),
    }


SOURCES = {
    "GPT2Config": Source("GPT2Config", "GPT2Model", "h", "attn", sizes={"n_inner": 48}),
    "BertConfig": Source("BertConfig", "BertModel", "encoder.layer", "attention.self", "intermediate"),
    "T5Config": Source(
        "T5Config",
        "T5EncoderModel",
        "encoder.block",
        "layer.0.SelfAttention",
        "layer.1.DenseReluDense",
        sizes={"d_model": 64, "num_heads": 4, "d_kv": 16, "d_ff": 48, "num_layers": 2},
    ),
    "BloomConfig": Source("BloomConfig", "BloomModel", "h", "self_attention"),
    "GPTNeoXConfig": Source("GPTNeoXConfig", "GPTNeoXModel", "layers", "attention"),
    "LlamaConfig": Source("LlamaConfig", "LlamaModel"),
    "MistralConfig": Source("MistralConfig", "MistralModel"),
    "Qwen2MoeConfig": Source(
        "Qwen2MoeConfig",
        "Qwen2MoeModel",
        sizes={
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "GemmaConfig": Source("GemmaConfig", "GemmaModel"),
    "Gemma2Config": Source("Gemma2Config", "Gemma2Model"),
    "OlmoeConfig": Source("OlmoeConfig", "OlmoeModel", sizes={"num_experts": 4, "num_experts_per_tok": 2}),
    "Olmo2Config": Source("Olmo2Config", "Olmo2Model"),
    "DeepseekV3Config": Source(
        "DeepseekV3Config",
        "DeepseekV3Model",
        sizes={
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "Phi3Config": Source("Phi3Config", "Phi3Model", sizes={"pad_token_id": 0}),
    "FalconConfig": Source("FalconConfig", "FalconModel", "h", "self_attention"),
    "MptConfig": Source(
        "MptConfig", "MptModel", "blocks", "attn", "ffn", sizes={"d_model": 64, "n_heads": 4, "n_layers": 2}
    ),
}
