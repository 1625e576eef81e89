"""Norm, rotary embedding, feed-forward and attention against float64 formulas written from their papers."""

import torch

from llama.attention import Attention, CausalAttend
from llama.config import ModelConfig
from llama.feed_forward import FeedForward
from llama.norm import RMSNorm
from llama.rope import apply_rotary, rotary_cos_sin, rotary_frequencies


def test_rms_norm() -> None:
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    norm = RMSNorm(16, eps=1e-3)
    norm.weight.data.uniform_(0.5, 2)
    expected = x / ((x * x).sum(-1, keepdim=True) / 16 + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x.float()).double(), expected, atol=1e-6, rtol=1e-5)


def test_rotary_turns_pairs_by_position_times_frequency() -> None:
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64)
    positions = torch.tensor([[0, 3, 1, 1000]])
    cos, sin = rotary_cos_sin(positions, rotary_frequencies(6, 100.0))
    actual = apply_rotary(x.float(), cos, sin).double()
    for token, position in enumerate(positions[0].tolist()):
        for pair in range(3):
            angle = torch.tensor(position * 100.0 ** (-2 * pair / 6), dtype=torch.float64)
            a, b = x[0, token, :, pair], x[0, token, :, pair + 3]
            expected = torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))
            torch.testing.assert_close(actual[0, token, :, [pair, pair + 3]].T, expected, atol=2e-4, rtol=0)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8)
    frequencies = rotary_frequencies(8, 10000.0)

    def score(i: int, j: int) -> float:
        turned = [apply_rotary(x, *rotary_cos_sin(torch.tensor([[p]]), frequencies)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert abs(score(7, 3) - score(104, 100)) < 1e-5
    assert abs(score(7, 3) - score(8, 3)) > 1e-4


def test_swiglu() -> None:
    layer = FeedForward(6, 10).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    gate = x @ layer.w1.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_grouped_query_attention_equals_a_loop_over_heads_and_positions() -> None:
    config = ModelConfig(dim=24, num_heads=6, num_kv_heads=2, head_dim=8)
    layer = Attention(config, 0).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    # Position 0 everywhere: no rotation, so that this reference needs none.
    cos, sin = (t.double() for t in rotary_cos_sin(torch.zeros(2, 5, dtype=torch.long), rotary_frequencies(8, 1e4)))
    actual = layer(x, cos, sin, CausalAttend())
    q, k, v = ((x @ w.weight.T).view(2, 5, -1, 8) for w in (layer.wq, layer.wk, layer.wv))
    heads = torch.zeros(2, 5, 6, 8, dtype=torch.float64)
    for batch in range(2):
        for head in range(6):
            for i in range(5):
                scores = torch.stack([q[batch, i, head] @ k[batch, j, head // 3] / 8**0.5 for j in range(i + 1)])
                weights = scores.exp() / scores.exp().sum()
                heads[batch, i, head] = sum(weights[j] * v[batch, j, head // 3] for j in range(i + 1))
    # apply_rotary computes in fp32, so fp32 accuracy is what there is.
    torch.testing.assert_close(actual, heads.view(2, 5, 48) @ layer.wo.weight.T, atol=1e-6, rtol=1e-5)
