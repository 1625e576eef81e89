import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama import ModelConfig, MoEConfig, Transformer
from llama.attention import CausalAttend, LayerContext, document_positions
from llama.losses import IGNORE_INDEX
from llama.model import TransformerBlock
from llama.moe import RoutingRecord

MOE = MoEConfig(num_experts=4, num_shared_experts=1, expert_hidden_dim=16)


def build(moe: MoEConfig | None = None, **settings) -> Transformer:
    config = ModelConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, moe=moe, **settings)
    model = Transformer(config)
    model.init_weights(seed=5)
    return model.eval()


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_causal(moe: MoEConfig | None) -> None:
    model = build(moe)
    tokens = torch.randint(61, (2, 9))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 61
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-3


def test_output_index_selects_positions() -> None:
    model = build(tie_embeddings=False)
    tokens = torch.randint(61, (2, 5))
    with torch.no_grad():
        whole = model(tokens).flatten(0, 1)
        some = model(tokens, output_index=torch.tensor([9, 0, 4]))
    torch.testing.assert_close(some, whole[[9, 0, 4]])


def test_positions_shift_nothing_but_are_obeyed() -> None:
    model = build()
    tokens = torch.randint(61, (1, 6))
    with torch.no_grad():
        base = model(tokens)
        shifted = model(tokens, positions=torch.arange(6)[None] + 40)
        stretched = model(tokens, positions=torch.arange(6)[None] * 5)
    torch.testing.assert_close(base, shifted, atol=1e-5, rtol=1e-4)  # rotary scores see distances only
    assert (base - stretched).abs().max() > 1e-4


def test_routing_is_recorded_for_moe_layers_only() -> None:
    model = build(MoEConfig(num_experts=4, first_dense_layers=1))
    record = RoutingRecord()
    model(torch.randint(61, (2, 8)), routing=record)
    assert list(record.layers) == [1]
    assert record.layers[1].counts_E.sum() == 2 * 8 * 2


def test_start_weights_depend_on_name_and_seed_only() -> None:
    model, again = build(MOE), build(MOE)
    other = Transformer(model.config)
    other.init_weights(seed=6)
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert name.endswith("norm.weight") or not torch.equal(a, c)
        assert torch.equal(a, model.initial_weight(name, a.shape, 5))
    w1, w2 = model.layers[0].feed_forward.experts.w1, model.layers[0].feed_forward.experts.w2
    assert w1.std().item() == pytest.approx(0.02, rel=0.1)
    assert w2.std().item() == pytest.approx(0.02 / 2, rel=0.1)  # residual scale: sqrt(2 * 2 layers)


def test_tied_embeddings_share_one_matrix() -> None:
    """E·h by hand: the third of four tokens wins."""
    model = Transformer(ModelConfig(vocab_size=4, dim=3, num_layers=1, num_heads=1, head_dim=2))
    embeddings = torch.tensor([[1.0, 0.2, -0.5], [-0.3, 0.8, 0.1], [0.4, -0.6, 0.9], [-0.7, 0.5, -0.2]])
    model.tok_embeddings.weight.data.copy_(embeddings)
    hidden = torch.tensor([0.5, -0.1, 0.6])
    model.norm.forward = lambda x: hidden.expand_as(x)  # type: ignore[method-assign]
    logits = model(torch.tensor([[0]]))[0, 0]
    torch.testing.assert_close(logits, torch.tensor([0.18, -0.17, 0.80, -0.52]))
    assert logits.argmax() == 2


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "deepnorm"])
def test_norms_stand_where_the_placement_says(placement: str) -> None:
    config = ModelConfig(
        dim=12, num_layers=8, num_heads=2, hidden_dim=20, norm="layernorm", norm_placement=placement, position="none"
    )
    block = TransformerBlock(config, 0).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.uniform_(-0.5, 0.8)
    context = LayerContext(CausalAttend(), None, None)

    def norm(name: str, x: Tensor) -> Tensor:
        layer = getattr(block, name)
        deviation = (x.var(-1, unbiased=False, keepdim=True) + config.norm_eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / deviation * layer.weight + layer.bias

    def attention(x: Tensor) -> Tensor:
        return block.attention(x, context)

    alpha = (2 * 8) ** 0.25  # arXiv:2203.00555, decoder-only with 8 layers
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    match placement:
        case "pre":
            h = x + attention(norm("attention_norm", x))
            expected = h + block.feed_forward(norm("ffn_norm", h))
        case "post":
            h = norm("attention_norm", x + attention(x))
            expected = norm("ffn_norm", h + block.feed_forward(h))
        case "sandwich":
            h = x + norm("attention_post_norm", attention(norm("attention_norm", x)))
            expected = h + norm("ffn_post_norm", block.feed_forward(norm("ffn_norm", h)))
        case _:
            h = norm("attention_norm", alpha * x + attention(x))
            expected = norm("ffn_norm", alpha * h + block.feed_forward(h))
    torch.testing.assert_close(block(x, context, None), expected)


def test_norms_after_the_sum_leave_none_at_the_end() -> None:
    for placement, last in (("pre", True), ("sandwich", True), ("post", False), ("deepnorm", False)):
        assert (build(norm_placement=placement).norm is not None) == last


def test_labels_give_the_loss_of_the_logits() -> None:
    model = build(MOE, tie_embeddings=False)
    tokens, labels = torch.randint(61, (2, 7)), torch.randint(61, (2, 7))
    labels[0, :3] = IGNORE_INDEX
    logits = model(tokens).double().log_softmax(-1)
    expected = -sum(logits[b, i, labels[b, i]] for b in range(2) for i in range(7) if labels[b, i] != IGNORE_INDEX)
    torch.testing.assert_close(model(tokens, labels=labels).double(), expected, atol=1e-4, rtol=1e-6)
    each = -logits.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    each = each.masked_fill(labels == IGNORE_INDEX, 0)
    torch.testing.assert_close(model.label_losses(tokens, labels).double(), each, atol=1e-5, rtol=1e-5)


def test_residual_dropout_acts_in_training_only() -> None:
    model = build(residual_dropout=0.3)
    tokens = torch.randint(61, (1, 6))
    torch.testing.assert_close(model(tokens), model(tokens), rtol=0, atol=0)
    model.train()
    assert (model(tokens) - model(tokens)).abs().max() > 1e-3


POSITIONS: list[dict] = [
    {},
    {"rope_layout": "interleaved"},
    {"position": "alibi"},
    {"position": "sinusoidal"},
    {"position": "learned"},
    {"position": "t5", "t5_buckets": 8, "t5_max_distance": 12},
    {"position": "none"},
    {"sliding_window": 3, "attention_softcap": 2.0},
]


@pytest.mark.parametrize("settings", POSITIONS, ids=str)
def test_packed_documents_do_not_see_each_other(settings: dict) -> None:
    model = build(**settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    first, second = torch.randint(61, (1, 9)), torch.randint(61, (1, 5))
    documents = torch.tensor([[4] * 9 + [2] * 5])
    with torch.no_grad():
        packed = model(
            torch.cat((first, second), dim=1), positions=document_positions(documents), attend=CausalAttend(documents)
        )
        apart = torch.cat((model(first), model(second)), dim=1)
        torch.testing.assert_close(packed, apart)
        if settings.get("position") != "none":
            swapped = model(second.flip(1)).flip(1)
            assert (swapped - model(second)).abs().max() > 1e-3  # order matters


def test_learned_positions_end_where_the_table_does() -> None:
    model = build(position="learned", max_seq_len=6)
    with pytest.raises(ValueError, match=r"7 tokens, and model\.max_seq_len=6"):
        model(torch.zeros(1, 7, dtype=torch.long))


def std(config: ModelConfig, name: str) -> float:
    model = Transformer(config)
    model.init_weights(seed=0)
    return dict(model.named_parameters())[name].std().item()


def test_start_values_by_name() -> None:
    config = ModelConfig(vocab_size=500, dim=96, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=200)
    article = replace(config, init="article")
    for name, residual, other in (("attention.wo", 0.01, 0.01), ("feed_forward.w2", 0.01, 0.02)):
        assert std(config, f"layers.1.{name}.weight") == pytest.approx(residual, rel=0.05)
        assert std(article, f"layers.1.{name}.weight") == pytest.approx(other, rel=0.05)
    assert std(config, "layers.0.feed_forward.w3.weight") == pytest.approx(0.02, rel=0.05)
    assert std(article, "layers.0.feed_forward.w3.weight") == pytest.approx(0.01, rel=0.05)
    assert std(article, "tok_embeddings.weight") == pytest.approx(0.02, rel=0.05)


def test_deepnorm_starts_as_its_paper_says() -> None:
    """Xavier, times β for the feed-forward, value and output projections (arXiv:2203.00555, figure 2)."""
    config = ModelConfig(
        vocab_size=500, dim=96, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=200, norm_placement="deepnorm"
    )
    beta = (8 * 2) ** -0.25
    for name, gain, fans in (
        ("attention.wq", 1, 96 + 96),
        ("attention.wk", 1, 96 + 48),
        ("attention.wv", beta, 96 + 48),
        ("attention.wo", beta, 96 + 96),
        ("feed_forward.w1", beta, 96 + 200),
        ("feed_forward.w2", beta, 96 + 200),
    ):
        expected = gain * math.sqrt(2 / fans)
        assert std(config, f"layers.1.{name}.weight") == pytest.approx(expected, rel=0.05), name


def test_biases_start_at_zero_betas_and_routers_as_configured() -> None:
    config = ModelConfig(
        vocab_size=61,
        dim=64,
        num_layers=2,
        num_heads=4,
        norm="layernorm",
        attention_bias="qkvo",
        activation="swish_learned",
        swish_beta=1.5,
        moe=MoEConfig(num_experts=64, first_dense_layers=1, gate_init="kaiming_uniform"),
    )
    model = Transformer(config)
    model.init_weights(seed=0)
    parameters = dict(model.named_parameters())
    assert not any(p.any() for name, p in parameters.items() if name.endswith(".bias"))
    assert {p.item() for name, p in parameters.items() if name.endswith("activation.beta")} == {1.5}
    router = parameters["layers.1.feed_forward.router.weight"]
    assert 0.99 * 64**-0.5 < router.abs().max().item() <= 64**-0.5
    assert router.std().item() == pytest.approx(64**-0.5 / math.sqrt(3), rel=0.03)


def test_generates_and_streams() -> None:
    model = build()
    tokens = model.generate([1, 2, 3], max_new_tokens=4, temperature=0)
    assert tokens == list(model.stream([1, 2, 3], max_new_tokens=4, temperature=0)) and len(tokens) == 4
