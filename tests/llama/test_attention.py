"""Attention against loops over heads, queries and keys in float64, for every way of scoring."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama.attention import (
    Attention,
    CausalAttend,
    LayerContext,
    Scoring,
    attend_visible,
    document_positions,
    visible_keys,
)
from llama.config import ModelConfig

DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [3, 3, 4, 4, 4, 4, 4, 4, 4]])


class DistanceBias:
    """Some bias that differs by head and by distance."""

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        distance = (query_positions[..., :, None] - key_positions[..., None, :]).double()
        return torch.stack([-0.3 * distance, distance.sin()] * 3, dim=-3)


def by_hand(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
    out = torch.zeros_like(q)
    batch, length, heads, _ = q.shape
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // k.shape[2])
            for i in range(length):
                first = 0 if scoring.window is None else max(0, i - scoring.window + 1)
                keys = [j for j in range(first, i + 1) if documents is None or documents[b, i] == documents[b, j]]
                scores = torch.stack([q[b, i, h] @ k[b, j, group] * scoring.scale for j in keys])
                if scoring.softcap is not None:
                    scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
                if scoring.bias is not None:
                    scores = scores + scoring.bias(torch.tensor([i]), torch.tensor(keys))[h, 0]
                weights = scores.exp() / scores.exp().sum()
                out[b, i, h] = sum(weights[n] * v[b, j, group] for n, j in enumerate(keys))
    return out


def inputs(groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, 9, 6, 4), (2, 9, groups, 4), (2, 9, groups, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


SCORINGS = {
    "plain": Scoring(0.5),
    "window": Scoring(0.5, window=3),
    "softcap": Scoring(0.5, softcap=0.7),
    "bias": Scoring(0.5, bias=DistanceBias()),
    "all": Scoring(0.3, window=4, softcap=0.7, bias=DistanceBias()),
}


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS.keys())
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("groups", [6, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_causal_attention_equals_the_loop(scoring: Scoring, documents: Tensor | None, groups: int) -> None:
    q, k, v = inputs(groups)
    expected = by_hand(q, k, v, scoring, documents)
    found = CausalAttend(documents)(0, q, k, v, scoring)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for gradient, reference in zip(
        torch.autograd.grad(found, (q, k, v), cotangent),
        torch.autograd.grad(expected, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(gradient, reference)


def test_gradcheck() -> None:
    q, k, v = (x[:1, :4].detach().requires_grad_() for x in inputs())
    assert torch.autograd.gradcheck(lambda *x: CausalAttend()(0, *x, SCORINGS["all"]), (q, k, v))


@pytest.mark.parametrize("name", ["softcap", "bias", "all"])
def test_half_precision_scores_are_summed_in_fp32(name: str) -> None:
    q, k, v = inputs()
    exact = by_hand(q, k, v, SCORINGS[name])
    found = CausalAttend()(0, q.bfloat16(), k.bfloat16(), v.bfloat16(), SCORINGS[name])
    assert found.dtype == torch.bfloat16
    plain = CausalAttend()(0, q.bfloat16(), k.bfloat16(), v.bfloat16(), SCORINGS["plain"]).double()
    noise = (plain - by_hand(q, k, v, SCORINGS["plain"])).norm() / plain.norm()
    assert (found.double() - exact).norm() / exact.norm() < 1.5 * noise


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_query_that_sees_no_key_gives_zero_and_no_nan_gradient(softcap: float | None) -> None:
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in inputs())
    visible = visible_keys(torch.arange(9), torch.arange(9), None)
    visible[4] = False
    out = attend_visible(q, k, v, visible, Scoring(0.5, softcap=softcap))
    assert not out[:, :, 4].any() and out[:, :, 5].all()
    out.sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v) if x.grad is not None)


def test_visible_keys_count_the_query_itself() -> None:
    seen = visible_keys(torch.tensor([5, 6]), torch.arange(8), 3)
    assert seen.tolist() == [[j in (3, 4, 5) for j in range(8)], [j in (4, 5, 6) for j in range(8)]]


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    q, k = torch.zeros(2, 1, 400, 1, 4), torch.zeros(1, 400, 1, 4)
    v = torch.ones(1, 400, 1, 4)
    for softcap in (None, 3.0):
        torch.manual_seed(0)
        out = CausalAttend()(0, q[0], k, v, Scoring(0.5, dropout=0.25, softcap=softcap))
        assert out.std() > 0.01 and out[0, 50:].mean().item() == pytest.approx(1.0, abs=0.02)


def test_document_positions_restart() -> None:
    assert document_positions(DOCUMENTS).tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6]]


CONFIG = ModelConfig(dim=24, num_heads=6, num_kv_heads=2, head_dim=8, position="none")


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("bias", ["none", "qkv", "qkvo"])
def test_the_layer_projects_normalises_and_projects_back(qk_norm: str, bias: str) -> None:
    config = replace(CONFIG, qk_norm=qk_norm, attention_bias=bias)
    layer = Attention(config, 0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.6, 0.9)
    x = torch.randn(2, 5, 24, dtype=torch.float64)

    def rms(x: Tensor) -> Tensor:
        return x / ((x * x).mean(-1, keepdim=True) + config.norm_eps).sqrt()

    q, k, v = (x @ w.weight.T + (0 if w.bias is None else w.bias) for w in (layer.wq, layer.wk, layer.wv))
    assert [w.bias is not None for w in (layer.wq, layer.wk, layer.wv, layer.wo)] == [bias != "none"] * 3 + [
        bias == "qkvo"
    ]
    if qk_norm == "full":
        q, k = rms(q) * layer.q_norm.weight, rms(k) * layer.k_norm.weight
    q, k, v = (t.unflatten(-1, (-1, 8)) for t in (q, k, v))
    if qk_norm == "head":
        q, k = rms(q) * layer.q_norm.weight, rms(k) * layer.k_norm.weight
    heads = by_hand(q, k, v, Scoring(8**-0.5))
    expected = heads.flatten(2) @ layer.wo.weight.T + (0 if layer.wo.bias is None else layer.wo.bias)
    found = layer(x, LayerContext(CausalAttend(), None, None))
    torch.testing.assert_close(found, expected)


def test_values_are_not_rotated_and_training_alone_drops() -> None:
    seen = []

    def spy(layer: int, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        seen.append((q, k, v, scoring))
        return q

    layer = Attention(ModelConfig(dim=24, num_heads=6, num_kv_heads=2, attention_dropout=0.5), 0)
    x = torch.randn(1, 3, 24)
    quarter_turn = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    layer.eval()(x, LayerContext(spy, None, None))
    layer.train()(x, LayerContext(spy, quarter_turn, None))
    (q0, k0, v0, evaluating), (q1, k1, v1, training) = seen
    torch.testing.assert_close(v1, v0)
    for plain, turned in ((q0, q1), (k0, k1)):
        first, second = plain.chunk(2, dim=-1)
        torch.testing.assert_close(turned, torch.cat((-second, first), dim=-1))
    assert (evaluating.dropout, training.dropout) == (0.0, 0.5)
