"""The shape of a model: every architectural setting, typed once and validated once.

`ModelConfig` is a frozen dataclass without dependencies. A recipe embeds it as it is; pydantic reads
`__pydantic_config__` to refuse unknown keys, so no second definition of a setting exists anywhere. A setting that
would have no effect beside the others is refused, not ignored, wherever it differs from its default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

from llama import counts

Norm = Literal["rmsnorm", "layernorm", "layernorm_bessel", "batchnorm"]
NormPlacement = Literal["pre", "post", "sandwich", "deepnorm"]
Position = Literal["rope", "alibi", "sinusoidal", "learned", "t5", "none"]
RopeLayout = Literal["half", "interleaved"]
RopeScalingKind = Literal["linear", "ntk", "dynamic_ntk", "yarn", "llama3"]
Activation = Literal["relu", "gelu", "gelu_tanh", "swish", "swish_learned", "glu", "reglu", "geglu", "swiglu"]
GATED = ("glu", "reglu", "geglu", "swiglu")
"""Activations of the form w2(σ(w1·x) ⊙ w3·x) (Shazeer, arXiv:2002.05202)."""
QKNorm = Literal["none", "head", "full"]
AttentionBias = Literal["none", "qkv", "qkvo"]
Init = Literal["residual", "article"]
RouterScore = Literal["softmax", "sigmoid"]
GateInit = Literal["normal", "kaiming_uniform"]
BalanceLoss = Literal[
    "switch", "switch_sequence", "importance_entropy", "frequency_entropy", "kl_uniform", "expert_load"
]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_types(path: str, config: object) -> None:
    """Whole numbers, finite numbers and booleans where the annotations say so: torch would notice later, or never."""
    for field in fields(config):  # type: ignore[arg-type]  # any of the dataclasses below
        value, kind = getattr(config, field.name), str(field.type)
        if value is None and kind.endswith("| None"):
            continue
        match kind.removesuffix(" | None"):
            case "int":
                _require(type(value) is int, f"{path}.{field.name}={value!r} is not a whole number; give an int")
            case "float":
                number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                _require(number, f"{path}.{field.name}={value!r} is not a finite number; give a float")
            case "bool":
                _require(isinstance(value, bool), f"{path}.{field.name}={value!r} is neither true nor false")


def _require_choice(path: str, value: object, choices: object) -> None:
    names = get_args(choices)
    _require(value in names, f"{path}={value!r} is not one of {', '.join(names)}")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch to sequences beyond those trained on; formulas in `llama/rope.py`."""

    kind: RopeScalingKind
    factor: float
    """How many times longer the sequences become; at least 1."""
    original_max_seq_len: int | None = None
    """Tokens the model was trained on; needed by dynamic_ntk, yarn and llama3."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above `original_max_seq_len / low_freq_factor` are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below `original_max_seq_len / high_freq_factor` are kept."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn at least this often over the original length are kept."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn at most this often are stretched fully."""
    attention_factor: float | None = None
    """yarn: factor on cosine and sine; None means 0.1·ln(factor) + 1 (arXiv:2309.00071, eq. 22)."""
    truncate: bool = True
    """yarn: round the bounds of the ramp to whole dimensions."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        path = "model.rope_scaling"
        _require_types(path, self)
        _require_choice(f"{path}.kind", self.kind, RopeScalingKind)
        _require(self.factor >= 1, f"{path}.factor={self.factor} must be at least 1; 1 changes nothing")
        own = {
            "dynamic_ntk": ("original_max_seq_len",),
            "yarn": ("original_max_seq_len", "beta_fast", "beta_slow", "attention_factor", "truncate"),
            "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
        }.get(self.kind, ())
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            _require(
                field.name in own or value == field.default,
                f"{path}.{field.name}={value} has no effect with {path}.kind={self.kind}; leave it out",
            )
        if own:
            _require(
                self.original_max_seq_len is not None and self.original_max_seq_len >= 1,
                f"{path}.original_max_seq_len={self.original_max_seq_len} must be the length trained on, at least 1, "
                f"with {path}.kind={self.kind}",
            )
        _require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"{path}.low_freq_factor={self.low_freq_factor} must be positive and below "
            f"{path}.high_freq_factor={self.high_freq_factor}; 1 and 4 are Llama 3.1's",
        )
        _require(
            0 < self.beta_slow < self.beta_fast,
            f"{path}.beta_slow={self.beta_slow} must be positive and below {path}.beta_fast={self.beta_fast}; "
            "1 and 32 are the paper's",
        )
        _require(
            self.attention_factor is None or self.attention_factor > 0,
            f"{path}.attention_factor={self.attention_factor} must be positive, or absent for the paper's",
        )


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts feed-forward: token-choice top-k routing over experts.

    Source of the layout (many small routed experts beside always-on shared ones): DeepSeekMoE, arXiv:2401.06066, §3.
    """

    num_experts: int
    top_k: int = 2
    num_shared_experts: int = 0
    """Shared experts see every token; they form one feed-forward of `shared_hidden_dim`."""
    expert_hidden_dim: int | None = None
    """Hidden size of one expert; None takes the dense rule divided by `top_k + num_shared_experts`."""
    shared_hidden_dim: int | None = None
    """Hidden size of the shared experts together; None means `num_shared_experts * expert_hidden_dim`."""
    shared_gate: bool = False
    """Multiply the shared experts' answer by sigmoid(gate·x), as Qwen2-MoE does."""
    score: RouterScore = "softmax"
    """How router logits become affinities; sigmoid as in DeepSeek-V3 (arXiv:2412.19437, §2.1.2, eq. 15)."""
    normalize_top_k: bool = True
    """Divide the chosen experts' affinities by their sum."""
    route_scale: float = 1.0
    """Factor on the routed experts' weights (DeepSeek-V3's routed scaling factor)."""
    gate_init: GateInit = "normal"
    """Start values of the router's weight: N(0, 0.02²), or Kaiming-uniform (He et al., arXiv:1502.01852)."""
    capacity_factor: float | None = None
    """Each expert takes at most ceil(capacity_factor · tokens · top_k / num_experts) tokens of a forward pass while
    training, the rest skip it (Switch Transformer, arXiv:2101.03961, §2.2); None is dropless."""
    balance_loss: BalanceLoss = "switch"
    """Which auxiliary loss evens out the experts' load; formulas in `llama/balance.py`."""
    balance_loss_weight: float = 0.01
    z_loss_weight: float = 0.0
    bias_update_rate: float = 0.0
    """Step of the auxiliary-loss-free bias balancing (DeepSeek-V3, arXiv:2412.19437, §2.1.2); 0 turns it off."""
    first_dense_layers: int = 0
    """The first layers that keep a dense feed-forward."""
    every: int = 1
    """Of the layers counted from 1, those divisible by `every` hold experts; the others are dense."""
    dense_layers: tuple[int, ...] = ()
    """Further layers, counted from 0, that keep a dense feed-forward."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_types("model.moe", self)
        layers = tuple(self.dense_layers)  # JSON has lists
        _require(
            all(type(layer) is int for layer in layers),
            f"model.moe.dense_layers={list(layers)} must be whole numbers, layers counted from 0",
        )
        object.__setattr__(self, "dense_layers", layers)
        _require(
            self.num_experts >= 1,
            f"model.moe.num_experts={self.num_experts} must be at least 1; for a dense model leave model.moe out",
        )
        _require(
            1 <= self.top_k <= self.num_experts,
            f"model.moe.top_k={self.top_k} must lie between 1 and model.moe.num_experts={self.num_experts}",
        )
        _require(self.every >= 1, f"model.moe.every={self.every} must be at least 1; 1 means every layer")
        for name in ("num_shared_experts", "first_dense_layers"):
            value = getattr(self, name)
            _require(value >= 0, f"model.moe.{name}={value} must not be negative; 0 means none")
        for name in ("balance_loss_weight", "z_loss_weight", "bias_update_rate"):
            value = getattr(self, name)
            _require(value >= 0, f"model.moe.{name}={value} must not be negative; 0 turns it off")
        for name in ("expert_hidden_dim", "shared_hidden_dim"):
            value = getattr(self, name)
            _require(
                value is None or value >= 1, f"model.moe.{name}={value} must be at least 1, or absent for the default"
            )
        for name, choices in (("score", RouterScore), ("gate_init", GateInit), ("balance_loss", BalanceLoss)):
            _require_choice(f"model.moe.{name}", getattr(self, name), choices)
        _require(self.route_scale > 0, f"model.moe.route_scale={self.route_scale} must be positive; 1 changes nothing")
        _require(
            self.capacity_factor is None or self.capacity_factor > 0,
            f"model.moe.capacity_factor={self.capacity_factor} must be positive, or absent for dropless routing",
        )
        for name, value in (("shared_hidden_dim", self.shared_hidden_dim), ("shared_gate", self.shared_gate)):
            _require(
                self.num_shared_experts > 0 or not value,
                f"model.moe.{name}={value} needs model.moe.num_shared_experts of at least 1",
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the LLaMA family: blocks of attention and a dense or MoE feed-forward, on a residual stream.

    The defaults are LLaMA's: pre-norm RMSNorm, rotary positions, SwiGLU. After construction `num_kv_heads`,
    `head_dim`, `hidden_dim`, `moe.expert_hidden_dim` and `moe.shared_hidden_dim` are integers.

    Raises:
        ValueError: a setting is out of range or two settings contradict each other; names field, value and remedy.
    """

    vocab_size: int = 32000
    dim: int = 512
    """Width of the residual stream."""
    num_layers: int = 8
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads (GQA, arXiv:2305.13245); None means one per query head, 1 is multi-query attention."""
    head_dim: int | None = None
    """Size of one head; None means dim / num_heads."""
    hidden_dim: int | None = None
    """Feed-forward hidden size; None takes ⅔·4·dim rounded up to `multiple_of` (LLaMA, arXiv:2302.13971, §2.2)."""
    multiple_of: int = 64
    max_seq_len: int = 2048
    """Tokens of the longest sequence."""
    norm: Norm = "rmsnorm"
    """layernorm is the usual one; layernorm_bessel divides by the n−1 standard deviation plus eps; batchnorm is to be
    compared with: it mixes positions in training (llama/norm.py)."""
    norm_placement: NormPlacement = "pre"
    """pre: x + f(norm(x)); post: norm(x + f(x)); sandwich: x + norm(f(norm(x))); deepnorm: norm(α·x + f(x))."""
    norm_eps: float = 1e-5
    position: Position = "rope"
    """rope turns queries and keys; alibi and t5 bias the scores by distance; sinusoidal and learned are added to the
    embeddings; none leaves order to the causal mask."""
    rope_theta: float = 10000.0
    rope_layout: RopeLayout = "half"
    """Which dimensions of a head turn together: i and i + head_dim/2, or the neighbours 2i and 2i + 1."""
    rope_scaling: RopeScaling | None = None
    t5_buckets: int = 32
    t5_max_distance: int = 128
    """Relative distances from here on share one bias."""
    activation: Activation = "swiglu"
    """σ in w2(σ(w1·x)), or of the gate in w2(σ(w1·x) ⊙ w3·x) for glu, reglu, geglu and swiglu."""
    swish_beta: float = 1.0
    """β of x·sigmoid(β·x): fixed with `swish`, the start value with `swish_learned`."""
    ffn_bias: bool = False
    """Biases of dense and shared feed-forwards; the expert banks have none."""
    qk_norm: QKNorm = "none"
    """RMSNorm of queries and keys before positions: over each head (Qwen3), or over all heads together (OLMoE)."""
    attention_bias: AttentionBias = "none"
    """Biases of the query, key and value projections, or of these and the output projection."""
    sliding_window: int | None = None
    """Keys that a query sees, itself included (Mistral, arXiv:2310.06825, §2); None sees all."""
    full_attention_layers: int = 0
    """The first layers that see all keys in spite of `sliding_window`."""
    attention_softcap: float | None = None
    """Scores become c·tanh(score / c) (Gemma 2, arXiv:2408.00118, §2)."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight in training."""
    residual_dropout: float = 0.0
    """Probability of dropping an element of a sub-layer's output in training (arXiv:1706.03762, §5.4)."""
    tie_embeddings: bool = True
    init: Init = "residual"
    """Matrices start as N(0, 0.02²); those scaled by 1/√(2·layers) are wo and w2 (residual) or wo and w3 (article)."""
    moe: MoEConfig | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        _require_types("model", self)
        for name, kind in (("moe", MoEConfig), ("rope_scaling", RopeScaling)):
            value = getattr(self, name)
            _require(
                value is None or isinstance(value, kind),
                f"model.{name}={value!r} is no {kind.__name__}; make one of it",
            )
        self._check_choices()
        self._check_ranges()
        self._check_effect()
        self._resolve_heads()
        if self.hidden_dim is None:
            hidden = 8 * self.dim // 3
            object.__setattr__(self, "hidden_dim", -(-hidden // self.multiple_of) * self.multiple_of)
        if self.moe is not None:
            object.__setattr__(self, "moe", self._resolved_moe(self.moe))

    def _check_choices(self) -> None:
        for name, choices in (
            ("norm", Norm),
            ("norm_placement", NormPlacement),
            ("position", Position),
            ("rope_layout", RopeLayout),
            ("activation", Activation),
            ("qk_norm", QKNorm),
            ("attention_bias", AttentionBias),
            ("init", Init),
        ):
            _require_choice(f"model.{name}", getattr(self, name), choices)

    def _check_ranges(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "multiple_of", "max_seq_len"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name}={value} must be at least 1")
        for name in ("num_kv_heads", "head_dim", "hidden_dim"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.{name}={value} must be at least 1, or absent for the default")
        _require(self.norm_eps > 0, f"model.norm_eps={self.norm_eps} must be positive; 1e-5 is usual")
        _require(self.rope_theta > 1, f"model.rope_theta={self.rope_theta} must be above 1; 10000 is usual")
        _require(self.swish_beta > 0, f"model.swish_beta={self.swish_beta} must be positive; 1 is usual")
        _require(
            self.t5_buckets >= 4 and self.t5_max_distance > self.t5_buckets // 2,
            f"model.t5_buckets={self.t5_buckets} must be at least 4 and half of it below "
            f"model.t5_max_distance={self.t5_max_distance}; 32 and 128 are T5's",
        )
        for name in ("sliding_window", "attention_softcap"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"model.{name}={value} must be positive, or absent for none")
        for name in ("attention_dropout", "residual_dropout"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"model.{name}={value} must lie in [0, 1); 0 turns it off")
        _require(
            0 <= self.full_attention_layers < self.num_layers or self.full_attention_layers == 0,
            f"model.full_attention_layers={self.full_attention_layers} must lie in [0, model.num_layers="
            f"{self.num_layers}); to see all keys everywhere leave model.sliding_window out",
        )

    def _check_effect(self) -> None:
        """Refuses settings that the others leave without any effect."""
        owners = (
            ("position", ("rope",), ("rope_theta", "rope_layout", "rope_scaling")),
            ("position", ("t5",), ("t5_buckets", "t5_max_distance")),
            ("activation", ("swish", "swish_learned"), ("swish_beta",)),
        )
        defaults = {field.name: field.default for field in fields(self)}
        for owner, values, names in owners:
            if getattr(self, owner) in values:
                continue
            for name in names:
                value = getattr(self, name)
                _require(
                    value == defaults[name],
                    f"model.{name}={value} has no effect with model.{owner}={getattr(self, owner)}; leave it out or "
                    f"set model.{owner}={values[0]}",
                )
        plain_feed_forward = (
            self.moe is None
            or self.moe.num_shared_experts > 0
            or any(not self.is_moe_layer(layer) for layer in range(self.num_layers))
        )
        _require(
            not self.ffn_bias or plain_feed_forward,
            f"model.ffn_bias={self.ffn_bias} has no effect: every feed-forward is a bank of experts, which have no "
            "biases; leave it out",
        )
        _require(
            self.sliding_window is not None or self.full_attention_layers == 0,
            f"model.full_attention_layers={self.full_attention_layers} has no effect without model.sliding_window; "
            "leave it out",
        )
        _require(
            self.init == "residual" or self.norm_placement != "deepnorm",
            f"model.init={self.init} contradicts model.norm_placement=deepnorm, which brings its own initialisation; "
            "leave model.init out",
        )

    def _resolve_heads(self) -> None:
        if self.head_dim is None:
            _require(
                self.dim % self.num_heads == 0,
                f"model.dim={self.dim} is not divisible by model.num_heads={self.num_heads}; "
                "choose a divisor or set model.head_dim",
            )
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        _require(
            self.position != "rope" or self.resolved_head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} is odd; rotary embedding turns pairs, choose an even number",
        )
        _require(
            self.norm != "layernorm_bessel" or self.dim > 1,
            f"model.dim={self.dim} has no n-1 deviation; choose 2 or more, or model.norm=layernorm",
        )
        _require(
            self.position != "sinusoidal" or self.dim % 2 == 0,
            f"model.dim={self.dim} is odd; sinusoidal positions are pairs of sine and cosine, choose an even number",
        )
        stretch = self.rope_scaling
        _require(
            stretch is None or stretch.kind not in ("ntk", "dynamic_ntk") or self.resolved_head_dim > 2,
            f"model.head_dim={self.head_dim} is too small for model.rope_scaling.kind={stretch and stretch.kind}, "
            "whose exponent is head_dim / (head_dim - 2); choose 4 or more, or another kind",
        )
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        _require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}; "
            f"choose a divisor of {self.num_heads}",
        )

    def _resolved_moe(self, moe: MoEConfig) -> MoEConfig:
        outside = [layer for layer in moe.dense_layers if not 0 <= layer < self.num_layers]
        _require(
            not outside,
            f"model.moe.dense_layers={list(moe.dense_layers)} names layer {outside[:1]} outside "
            f"model.num_layers={self.num_layers}; layers count from 0",
        )
        _require(
            any(self.is_moe_layer(layer) for layer in range(self.num_layers)),
            f"model.moe.first_dense_layers={moe.first_dense_layers}, model.moe.every={moe.every} and "
            f"model.moe.dense_layers={list(moe.dense_layers)} leave no expert layer in "
            f"model.num_layers={self.num_layers}; lower them or leave model.moe out",
        )
        hidden = moe.expert_hidden_dim
        if hidden is None:
            active = moe.top_k + moe.num_shared_experts
            # Grouped GEMM wants rows of a multiple of 16 bytes, in bf16 a multiple of 8 columns.
            hidden = -(-self.ffn_hidden_dim // (active * 8)) * 8
        shared = moe.shared_hidden_dim
        if shared is None and moe.num_shared_experts:
            shared = moe.num_shared_experts * hidden
        return replace(moe, expert_hidden_dim=hidden, shared_hidden_dim=shared)

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

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate: w2(σ(w1·x) ⊙ w3·x) instead of w2(σ(w1·x))."""
        return self.activation in GATED

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer`, counted from 0, holds experts."""
        moe = self.moe
        if moe is None or layer < moe.first_dense_layers or layer in moe.dense_layers:
            return False
        return (layer + 1) % moe.every == 0

    def window(self, layer: int) -> int | None:
        """Keys that a query of `layer` sees, itself included; None for all."""
        return self.sliding_window if layer >= self.full_attention_layers else None

    # What a decoder and an encoder–decoder (llama/seq2seq_config.py) differ in.

    @property
    def stacks(self) -> tuple[int, int]:
        """Layers of the encoder, which a decoder alone does without, and of the decoder."""
        return 0, self.num_layers

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block. With norms after the residual sum that has normalised already."""
        return self.norm_placement in ("pre", "sandwich")

    def residual_writes(self, encoder: bool = False) -> int:
        """Sub-layers that write into the residual stream of a stack."""
        return 2 * self.num_layers

    # Costs; formulas in llama/counts.py.

    def num_parameters(self) -> int:
        """Trained parameters, tied embeddings counted once."""
        return counts.num_parameters(counts.parameter_shapes(self))

    def num_active_parameters(self) -> int:
        """Parameters that one token meets: of the routed experts only `top_k`."""
        return counts.num_active_parameters(self)

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes that one token occupies in the key/value cache, over all layers."""
        return 2 * self.num_layers * self.kv_heads * self.resolved_head_dim * dtype_bytes

    def flops_per_token(self, seq_len: int, *, frozen: bool = False) -> float:
        """Forward and backward FLOPs of one trained token in a causal sequence of `seq_len` tokens; of `frozen` weights
        no gradient is taken, as below adapters."""
        return counts.flops_per_token(self, seq_len, frozen)
