import pytest
import torch

from llama import ModelConfig, MoEConfig, Transformer
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
