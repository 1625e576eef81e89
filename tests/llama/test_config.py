import pytest

from llama import ModelConfig, MoEConfig, Transformer


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


def test_kv_bytes() -> None:
    config = ModelConfig(dim=64, num_layers=3, num_heads=4, num_kv_heads=2)
    assert config.kv_bytes_per_token(dtype_bytes=4) == 3 * (2 * 16 + 2 * 16) * 4


def test_flops_count_matrices_and_causal_attention() -> None:
    config = ModelConfig(vocab_size=100, dim=32, num_layers=2, num_heads=4, hidden_dim=64, tie_embeddings=False)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 100 * 32 + 5 * 32  # norms count as multiplications too
    attention = 2 * 2 * 3 * 2 * (10 / 2) * 32  # qk and pv, 2 FLOPs, forward + 2 backward, half the square, 2 layers
    assert config.flops_per_token(10) == 6 * matrices + attention


@pytest.mark.parametrize(
    ("settings", "words"),
    [
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
    ],
)
def test_inconsistent_moe_settings_name_field_value_and_remedy(settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        MoEConfig(**settings)
    assert all(word in str(error.value) for word in words), error.value
