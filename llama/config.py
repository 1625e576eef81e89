"""The shape of a model: every architectural setting, typed once and validated once.

`ModelConfig` is a frozen dataclass without dependencies. A recipe embeds it as it is; pydantic reads
`__pydantic_config__` to refuse unknown keys, so no second definition of a setting exists anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts feed-forward: token-choice top-k routing over experts, dropless.

    Source of the layout (many small routed experts beside always-on shared ones): DeepSeekMoE, arXiv:2401.06066, §3.
    """

    num_experts: int
    top_k: int = 2
    num_shared_experts: int = 0
    """Shared experts see every token; they form one SwiGLU of `num_shared_experts * expert_hidden_dim`."""
    expert_hidden_dim: int | None = None
    """Hidden size of one expert; None takes the dense rule divided by `top_k + num_shared_experts`."""
    normalize_top_k: bool = True
    """Divide the chosen experts' probabilities by their sum."""
    balance_loss_weight: float = 0.01
    z_loss_weight: float = 0.0
    bias_update_rate: float = 0.0
    """Step of the auxiliary-loss-free bias balancing (DeepSeek-V3, arXiv:2412.19437, §2.1.2); 0 turns it off."""
    first_dense_layers: int = 0
    """The first layers that keep a dense feed-forward."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require(
            self.num_experts >= 1,
            f"model.moe.num_experts={self.num_experts} must be at least 1; for a dense model leave model.moe out",
        )
        _require(
            1 <= self.top_k <= self.num_experts,
            f"model.moe.top_k={self.top_k} must lie between 1 and model.moe.num_experts={self.num_experts}",
        )
        for name in ("num_shared_experts", "first_dense_layers"):
            value = getattr(self, name)
            _require(value >= 0, f"model.moe.{name}={value} must not be negative; 0 means none")
        for name in ("balance_loss_weight", "z_loss_weight", "bias_update_rate"):
            value = getattr(self, name)
            _require(value >= 0, f"model.moe.{name}={value} must not be negative; 0 turns it off")
        _require(
            self.expert_hidden_dim is None or self.expert_hidden_dim >= 1,
            f"model.moe.expert_hidden_dim={self.expert_hidden_dim} must be at least 1, or absent for the default",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A LLaMA decoder: pre-norm blocks of grouped-query attention with RoPE and a SwiGLU or MoE feed-forward.

    After construction `num_kv_heads`, `head_dim`, `hidden_dim` and `moe.expert_hidden_dim` are integers.

    Raises:
        ValueError: a setting is out of range or two settings contradict each other; names field, value and remedy.
    """

    vocab_size: int = 32000
    dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    """Key/value heads (GQA, arXiv:2305.13245); None means one per query head."""
    head_dim: int | None = None
    hidden_dim: int | None = None
    """Feed-forward hidden size; None takes ⅔·4·dim rounded up to `multiple_of` (LLaMA, arXiv:2302.13971, §2.2)."""
    multiple_of: int = 64
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    moe: MoEConfig | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "multiple_of", "max_seq_len"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}={value} must be at least 1")
        for name in ("num_kv_heads", "head_dim", "hidden_dim"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.{name}={value} must be at least 1, or absent for the default")
        _require(self.norm_eps > 0, f"model.norm_eps={self.norm_eps} must be positive; 1e-5 is usual")
        _require(self.rope_theta > 1, f"model.rope_theta={self.rope_theta} must be above 1; 10000 is usual")
        if self.head_dim is None:
            _require(
                self.dim % self.num_heads == 0,
                f"model.dim={self.dim} is not divisible by model.num_heads={self.num_heads}; "
                "choose a divisor or set model.head_dim",
            )
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        _require(
            self.resolved_head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} is odd; rotary embedding turns pairs, choose an even number",
        )
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        _require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}; "
            f"choose a divisor of {self.num_heads}",
        )
        if self.hidden_dim is None:
            hidden = 8 * self.dim // 3
            object.__setattr__(self, "hidden_dim", -(-hidden // self.multiple_of) * self.multiple_of)
        if self.moe is not None:
            _require(
                self.moe.first_dense_layers < self.num_layers,
                f"model.moe.first_dense_layers={self.moe.first_dense_layers} leaves no expert layer in "
                f"model.num_layers={self.num_layers}; lower it or leave model.moe out",
            )
            if self.moe.expert_hidden_dim is None:
                active = self.moe.top_k + self.moe.num_shared_experts
                # Grouped GEMM wants rows of a multiple of 16 bytes, in bf16 a multiple of 8 columns.
                hidden = -(-self.ffn_hidden_dim // (active * 8)) * 8
                object.__setattr__(self, "moe", replace(self.moe, expert_hidden_dim=hidden))

    # The optional fields after resolution, typed as what they are.

    @property
    def kv_heads(self) -> int:
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def resolved_head_dim(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @property
    def ffn_hidden_dim(self) -> int:
        assert self.hidden_dim is not None
        return self.hidden_dim

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_dense_layers

    def _attention_parameters(self) -> int:
        return 2 * self.dim * self.resolved_head_dim * (self.num_heads + self.kv_heads)

    def _layer_parameters(self, layer: int, experts: int) -> int:
        norms = 2 * self.dim
        if not self.is_moe_layer(layer):
            return self._attention_parameters() + norms + 3 * self.dim * self.ffn_hidden_dim
        moe = self.moe
        assert moe is not None and moe.expert_hidden_dim is not None
        expert = 3 * self.dim * moe.expert_hidden_dim
        gate = self.dim * moe.num_experts
        return self._attention_parameters() + norms + gate + expert * (experts + moe.num_shared_experts)

    def _embedding_parameters(self) -> int:
        return self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)

    def num_parameters(self) -> int:
        """Trained parameters, tied embeddings counted once."""
        experts = self.moe.num_experts if self.moe else 0
        layers = sum(self._layer_parameters(layer, experts) for layer in range(self.num_layers))
        return self._embedding_parameters() + layers + self.dim

    def num_active_parameters(self) -> int:
        """Parameters that one token meets: of the routed experts only `top_k`."""
        experts = self.moe.top_k if self.moe else 0
        layers = sum(self._layer_parameters(layer, experts) for layer in range(self.num_layers))
        return self._embedding_parameters() + layers + self.dim

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes that one token occupies in the key/value cache, over all layers."""
        return 2 * self.num_layers * self.kv_heads * self.resolved_head_dim * dtype_bytes

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward FLOPs of one trained token in a causal sequence of `seq_len` tokens.

        6 per active matrix parameter, the input embedding excluded, plus attention scores and values at half the
        square (PaLM, arXiv:2204.02311, appendix B, with the causal half).
        """
        matrices = self.num_active_parameters() - self._embedding_parameters() + self.vocab_size * self.dim
        attention = 6 * self.num_layers * self.num_heads * self.resolved_head_dim * seq_len
        return 6.0 * matrices + attention
