import pytest
import torch

from llama import ModelConfig, MoEConfig, Transformer
from llama.config import RopeScaling
from llama.counts import buffer_shapes, parameter_shapes


def test_defaults_are_resolved() -> None:
    config = ModelConfig(dim=512, num_heads=8)
    assert (config.num_kv_heads, config.head_dim) == (8, 64)
    assert config.hidden_dim == 1408  # 2/3 * 4 * 512 = 1365.3, up to a multiple of 64


def test_expert_hidden_dim_divides_the_dense_one_among_active_experts() -> None:
    config = ModelConfig(dim=512, moe=MoEConfig(num_experts=4, top_k=2, num_shared_experts=1))
    assert config.moe is not None and config.moe.expert_hidden_dim == 472  # 1408 / 3 = 469.3, up to a multiple of 8


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, 1), MoEConfig(6, 1, 2, first_dense_layers=1)])
def test_parameter_count_is_the_models(tie: bool, moe: MoEConfig | None) -> None:
    config = ModelConfig(vocab_size=97, dim=48, num_layers=3, num_heads=4, num_kv_heads=2, tie_embeddings=tie, moe=moe)
    model = Transformer(config)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    idle = 0
    if moe is not None:
        idle = (3 - moe.first_dense_layers) * (moe.num_experts - moe.top_k) * 3 * 48 * config.moe.expert_hidden_dim
    assert config.num_active_parameters() == config.num_parameters() - idle


EVERYTHING: list[dict] = [
    {"norm": "layernorm", "norm_placement": "sandwich", "position": "learned", "activation": "relu", "ffn_bias": True},
    {"norm": "layernorm_bessel", "norm_placement": "post", "position": "t5", "activation": "swish_learned"},
    {"norm_placement": "deepnorm", "qk_norm": "full", "attention_bias": "qkvo", "head_dim": 6, "num_kv_heads": 1},
    {"qk_norm": "head", "attention_bias": "qkv", "activation": "geglu", "moe": MoEConfig(4, num_shared_experts=1)},
    {"activation": "gelu", "ffn_bias": True, "moe": MoEConfig(4, num_shared_experts=2, shared_gate=True, every=2)},
    {"activation": "swish_learned", "moe": MoEConfig(4, num_shared_experts=1, shared_hidden_dim=20, dense_layers=(1,))},
    {"norm": "batchnorm", "norm_placement": "sandwich", "qk_norm": "head", "moe": MoEConfig(4, dense_layers=(1,))},
    {"norm": "batchnorm", "norm_placement": "post"},
]


@pytest.mark.parametrize("settings", EVERYTHING, ids=str)
def test_every_tensors_name_and_shape_is_known_from_the_config(settings: dict) -> None:
    config = ModelConfig(vocab_size=97, dim=48, num_layers=3, num_heads=4, **settings)
    with torch.device("meta"):
        model = Transformer(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(config)
    assert {name: tuple(buffer.shape) for name, buffer in model.named_buffers()} == buffer_shapes(config)


def test_layers_with_experts() -> None:
    def layers(**moe: object) -> list[int]:
        config = ModelConfig(num_layers=6, moe=MoEConfig(4, **moe))  # type: ignore[arg-type]
        return [layer for layer in range(6) if config.is_moe_layer(layer)]

    assert layers() == [0, 1, 2, 3, 4, 5]
    assert layers(first_dense_layers=2) == [2, 3, 4, 5]
    assert layers(every=2) == [1, 3, 5]
    assert layers(every=2, first_dense_layers=2, dense_layers=(5,)) == [3]


def test_a_config_read_from_json_is_hashable() -> None:
    assert hash(MoEConfig(4, dense_layers=[1])) == hash(MoEConfig(4, dense_layers=(1,)))  # type: ignore[arg-type]


def test_windows_by_layer() -> None:
    config = ModelConfig(num_layers=3, sliding_window=7, full_attention_layers=1)
    assert [config.window(layer) for layer in range(3)] == [None, 7, 7]


def test_kv_bytes() -> None:
    config = ModelConfig(dim=64, num_layers=3, num_heads=4, num_kv_heads=2)
    assert config.kv_bytes_per_token(dtype_bytes=4) == 3 * (2 * 16 + 2 * 16) * 4


def test_flops_count_matrices_and_causal_attention() -> None:
    config = ModelConfig(vocab_size=100, dim=32, num_layers=2, num_heads=4, hidden_dim=64, tie_embeddings=False)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 100 * 32 + 5 * 32  # norms count as multiplications too
    attention = 2 * 2 * 3 * 2 * (10 / 2) * 32  # qk and pv, 2 FLOPs, forward + 2 backward, half the square, 2 layers
    assert config.flops_per_token(10) == 6 * matrices + attention


def test_flops_of_a_window_count_the_keys_that_are_seen() -> None:
    def attention(**settings: int) -> float:
        config = ModelConfig(vocab_size=100, dim=32, num_layers=1, num_heads=4, hidden_dim=64, **settings)
        return config.flops_per_token(400) - config.flops_per_token(0)

    keys = sum(min(i + 1, 50) for i in range(400)) / 400
    assert attention(sliding_window=50) == pytest.approx(12 * 32 * keys, rel=0.02)
    assert attention(sliding_window=400) == attention() == 12 * 32 * 200


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": 16.0, "num_heads": 4}, ["model.dim=16.0", "whole number"]),
        ({"num_layers": True}, ["model.num_layers=True", "whole number"]),
        ({"tie_embeddings": "no"}, ["model.tie_embeddings='no'", "neither true nor false"]),
        ({"norm_eps": float("inf")}, ["model.norm_eps=inf", "finite"]),
        ({"attention_softcap": float("nan")}, ["model.attention_softcap=nan", "finite"]),
        ({"norm": "layernorm_bessel", "dim": 1, "num_heads": 1, "head_dim": 2}, ["model.dim=1", "layernorm"]),
        ({"moe": {"num_experts": 4}}, ["model.moe={'num_experts': 4}", "MoEConfig"]),
        ({"rope_scaling": "yarn"}, ["model.rope_scaling='yarn'", "RopeScaling"]),
        ({"norm": "groupnorm"}, ["model.norm='groupnorm'", "rmsnorm, layernorm", "batchnorm"]),
        ({"norm_placement": "middle"}, ["model.norm_placement='middle'", "sandwich"]),
        ({"position": "relative"}, ["model.position='relative'", "rope, alibi"]),
        ({"activation": "tanh"}, ["model.activation='tanh'", "swiglu"]),
        ({"qk_norm": "yes"}, ["model.qk_norm='yes'", "head"]),
        ({"attention_bias": True}, ["model.attention_bias=True", "qkvo"]),
        ({"init": "xavier"}, ["model.init='xavier'", "article"]),
        ({"rope_layout": "pairs"}, ["model.rope_layout='pairs'", "interleaved"]),
        ({"position": "alibi", "rope_theta": 5e5}, ["model.rope_theta=500000.0", "model.position=alibi"]),
        ({"head_dim": 2, "rope_scaling": RopeScaling("ntk", 2.0)}, ["model.head_dim=2", "kind=ntk"]),
        ({"ffn_bias": True, "moe": MoEConfig(4)}, ["model.ffn_bias=True", "bank of experts"]),
        (
            {"position": "none", "rope_scaling": RopeScaling("linear", 2.0)},
            ["model.rope_scaling=", "model.position=none", "model.position=rope"],
        ),
        ({"t5_buckets": 16}, ["model.t5_buckets=16", "model.position=rope", "model.position=t5"]),
        ({"position": "t5", "t5_buckets": 2}, ["model.t5_buckets=2", "at least 4"]),
        ({"position": "t5", "t5_max_distance": 16}, ["model.t5_max_distance=16", "model.t5_buckets=32"]),
        ({"swish_beta": 2.0}, ["model.swish_beta=2.0", "model.activation=swiglu"]),
        ({"activation": "swish", "swish_beta": 0.0}, ["model.swish_beta=0.0", "positive"]),
        ({"position": "sinusoidal", "dim": 15, "num_heads": 3}, ["model.dim=15", "even"]),
        ({"sliding_window": 0}, ["model.sliding_window=0", "absent"]),
        ({"full_attention_layers": 1}, ["model.full_attention_layers=1", "model.sliding_window"]),
        ({"sliding_window": 4, "num_layers": 2, "full_attention_layers": 2}, ["full_attention_layers=2", "[0, "]),
        ({"attention_softcap": -1.0}, ["model.attention_softcap=-1.0"]),
        ({"attention_dropout": 1.0}, ["model.attention_dropout=1.0", "[0, 1)"]),
        ({"residual_dropout": -0.1}, ["model.residual_dropout=-0.1"]),
        ({"norm_placement": "deepnorm", "init": "article"}, ["model.init=article", "deepnorm"]),
        ({"num_layers": 2, "moe": MoEConfig(4, dense_layers=(2,))}, ["dense_layers=[2]", "num_layers=2"]),
        ({"num_layers": 2, "moe": MoEConfig(4, every=3)}, ["model.moe.every=3", "no expert layer"]),
        ({"dim": 100, "num_heads": 3}, ["model.dim=100", "model.num_heads=3", "head_dim"]),
        ({"num_heads": 12, "num_kv_heads": 5, "dim": 96}, ["model.num_heads=12", "model.num_kv_heads=5", "divisor"]),
        ({"head_dim": 7}, ["model.head_dim=7", "even"]),
        ({"vocab_size": 0}, ["model.vocab_size=0", "at least 1"]),
        ({"num_kv_heads": -1}, ["model.num_kv_heads=-1"]),
        ({"norm_eps": 0.0}, ["model.norm_eps=0.0", "positive"]),
        ({"rope_theta": 1.0}, ["model.rope_theta=1.0"]),
        ({"num_layers": 2, "moe": MoEConfig(4, first_dense_layers=2)}, ["first_dense_layers=2", "num_layers=2"]),
    ],
)
def test_inconsistent_settings_name_field_value_and_remedy(settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(**settings)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 0}, ["num_experts=0", "dense"]),
        ({"num_experts": 4, "top_k": 5}, ["top_k=5", "num_experts=4"]),
        ({"num_experts": 4, "num_shared_experts": -1}, ["num_shared_experts=-1"]),
        ({"num_experts": 4, "balance_loss_weight": -0.1}, ["balance_loss_weight=-0.1"]),
        ({"num_experts": 4, "expert_hidden_dim": 0}, ["expert_hidden_dim=0"]),
        ({"num_experts": 4, "dense_layers": ["first"]}, ["model.moe.dense_layers=['first']", "whole numbers"]),
        ({"num_experts": 4, "score": "relu"}, ["model.moe.score='relu'", "sigmoid"]),
        ({"num_experts": 4, "balance_loss": "gini"}, ["model.moe.balance_loss='gini'", "switch"]),
        ({"num_experts": 4, "gate_init": "zero"}, ["model.moe.gate_init='zero'", "kaiming_uniform"]),
        ({"num_experts": 4, "route_scale": 0.0}, ["model.moe.route_scale=0.0"]),
        ({"num_experts": 4, "capacity_factor": 0.0}, ["model.moe.capacity_factor=0.0", "dropless"]),
        ({"num_experts": 4, "every": 0}, ["model.moe.every=0"]),
        ({"num_experts": 4, "shared_gate": True}, ["shared_gate=True", "num_shared_experts"]),
        ({"num_experts": 4, "shared_hidden_dim": 8}, ["shared_hidden_dim=8", "num_shared_experts"]),
    ],
)
def test_inconsistent_moe_settings_name_field_value_and_remedy(settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        MoEConfig(**settings)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "longrope", "factor": 2.0}, ["model.rope_scaling.kind='longrope'", "yarn"]),
        ({"kind": "linear", "factor": 0.5}, ["model.rope_scaling.factor=0.5"]),
        ({"kind": "yarn", "factor": 2.0}, ["original_max_seq_len=None", "kind=yarn"]),
        ({"kind": "linear", "factor": 2.0, "original_max_seq_len": 8}, ["original_max_seq_len=8", "kind=linear"]),
        ({"kind": "ntk", "factor": 2.0, "beta_fast": 16.0}, ["beta_fast=16.0", "no effect"]),
        (
            {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 8, "low_freq_factor": 4.0},
            ["low_freq_factor=4.0", "high_freq_factor=4.0"],
        ),
        ({"kind": "yarn", "factor": 2.0, "original_max_seq_len": 8, "beta_slow": 40.0}, ["beta_slow=40.0"]),
        ({"kind": "yarn", "factor": 2.0, "original_max_seq_len": 8, "attention_factor": 0.0}, ["attention_factor=0.0"]),
    ],
)
def test_inconsistent_rope_scalings_name_field_value_and_remedy(settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        RopeScaling(**settings)
    assert all(word in str(error.value) for word in words), error.value
