"""The architectures of `transformers` that are read and written here: one declaration each.

A declaration says what `config.json` and the tensors of an architecture are called and what it computes where it
leaves no choice; llama/hf_config.py and llama/hf_names.py know what to do with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama.config import AttentionBias, ModelConfig, QKNorm, RopeLayout


@dataclass(frozen=True)
class MoELayers:
    """What an architecture calls the parts of its MoE layers; the upper half are keys, the lower half tensors."""

    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    hidden_dim: str = "moe_intermediate_size"
    normalize_top_k: str | None = "norm_topk_prob"
    """None: the weights of the chosen experts are always divided by their sum."""
    block: str = "mlp"
    projections: Mapping[str, str] = field(
        default_factory=lambda: {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    )
    shared: str | None = None
    shared_gate: str | None = None
    expert_bias: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One architecture."""

    name: str
    model_type: str
    defaults: Mapping[str, Any]
    """Every key of `config.json` that it reads, with the value that an absent one stands for."""
    rope_theta: float = 10000.0
    """Stands for an absent `rope_theta`."""
    rope_layout: RopeLayout = "half"
    attention_bias: AttentionBias = "none"
    """Where neither `attention_bias` nor `qkv_bias` is among the keys."""
    qk_norm: QKNorm = "none"
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys that have one supported value, the one that an absent one stands for."""
    slides: Callable[[int, int], bool] | None = None
    """(layer, max_window_layers): whether the layer has a sliding window, where `layer_types` are absent."""
    fits: Callable[[ModelConfig], bool] = lambda config: True
    """What the sizes must fulfil beyond ours."""
    moe: MoELayers | None = None
    ignored_tensors: tuple[str, ...] = ()
    """Patterns of tensors that may lie in the files and that transformers leaves unread."""

    def sets(self, key: str) -> bool:
        """Whether `config.json` has a say about `key`."""
        return key in self.defaults


_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_MISTRAL = {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_QWEN_LAYERS = {"max_window_layers": 28, "layer_types": None}
_QWEN_MOE = {
    **_QWEN,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "LlamaForCausalLM",
        "llama",
        {**_LLAMA, "attention_bias": False, "mlp_bias": False},
        fits=lambda config: config.dim % config.num_heads == 0,
    ),
    Architecture("MistralForCausalLM", "mistral", {**_MISTRAL, "sliding_window": 4096}),
    Architecture(
        "Qwen2ForCausalLM",
        "qwen2",
        {**_QWEN, **_QWEN_LAYERS},
        attention_bias="qkv",
        slides=lambda layer, max_window_layers: layer >= max_window_layers,
    ),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        {**_QWEN, **_QWEN_LAYERS, "head_dim": 128, "attention_bias": False},
        qk_norm="head",
        slides=lambda layer, max_window_layers: layer >= max_window_layers,
    ),
    Architecture(
        "MixtralForCausalLM",
        "mixtral",
        {**_MISTRAL, "rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8},
        rope_theta=1000000.0,
        moe=MoELayers(
            num_experts="num_local_experts",
            hidden_dim="intermediate_size",
            normalize_top_k=None,
            block="block_sparse_moe",
            projections={"w1": "w1", "w3": "w3", "w2": "w2"},
        ),
    ),
    Architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {
            **_QWEN_MOE,
            **_QWEN_LAYERS,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        slides=lambda layer, max_window_layers: layer % 2 == 0 and layer < max_window_layers,
        moe=MoELayers(shared="shared_expert", shared_gate="shared_expert_gate"),
    ),
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {
            **_QWEN_MOE,
            "intermediate_size": 6144,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qk_norm="head",
        moe=MoELayers(),
    ),
    Architecture(
        "OlmoeForCausalLM",
        "olmoe",
        {
            **_LLAMA,
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        qk_norm="full",
        only={"clip_qkv": None, "sliding_window": None},
        fits=lambda config: config.num_heads * config.resolved_head_dim == config.dim,
        moe=MoELayers(hidden_dim="intermediate_size"),
    ),
    Architecture(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        {
            **{key: value for key, value in _LLAMA.items() if key != "attention_dropout"},
            "vocab_size": 103424,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "num_hidden_layers": 28,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_intermediate_size": 1536,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        },
        rope_theta=500000.0,
        rope_layout="interleaved",
        only={"use_bias": False, "moe_norm_min": 1e-12},
        moe=MoELayers(
            num_experts="moe_num_experts",
            top_k="moe_k",
            normalize_top_k=None,
            shared="shared_experts",
            expert_bias="moe_statics.e_score_correction_bias",
        ),
        ignored_tensors=(r"^model\.mtp_",),
    ),
)
BY_MODEL_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES}
