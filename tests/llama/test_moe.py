"""The mixture of experts against a loop over tokens, forward and backward."""

import pytest
import torch
from torch.nn.functional import silu

from llama.config import ModelConfig, MoEConfig
from llama.losses import balance_loss, z_loss
from llama.moe import MoE, RoutingRecord


def build(expert_hidden_dim: int = 16, **moe_settings) -> MoE:
    moe = MoEConfig(num_experts=4, expert_hidden_dim=expert_hidden_dim, **moe_settings)
    layer = MoE(ModelConfig(dim=16, num_heads=2, moe=moe), layer=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return layer


def reference(layer: MoE, x_TM: torch.Tensor) -> torch.Tensor:
    """Every token on its own, in float64."""
    experts, router = layer.experts, layer.router
    rows = []
    for token in x_TM.double():
        probabilities = (router.weight.double() @ token).softmax(-1)
        order = sorted(range(4), key=lambda e: -(probabilities[e] + router.expert_bias[e]).item())
        chosen = order[: router.top_k]
        weights = probabilities[chosen]
        if router.normalize:
            weights = weights / weights.sum()
        answer = torch.zeros_like(token)
        for weight, e in zip(weights, chosen, strict=True):
            hidden = silu(experts.w1[e].double() @ token) * (experts.w3[e].double() @ token)
            answer = answer + weight * (experts.w2[e].double() @ hidden)
        if layer.shared is not None:
            w1, w3, w2 = (w.weight.double() for w in (layer.shared.w1, layer.shared.w3, layer.shared.w2))
            answer = answer + w2 @ (silu(w1 @ token) * (w3 @ token))
        rows.append(answer)
    return torch.stack(rows)


@pytest.mark.parametrize("expert_hidden_dim", [16, 13], ids=["grouped", "loop"])
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"num_shared_experts": 2}, {"normalize_top_k": False}])
@pytest.mark.parametrize("bias", [None, (0, 0, 0, -9), (9, 0, 0, 0)], ids=["free", "idle expert", "favourite expert"])
def test_equals_a_loop_over_tokens(expert_hidden_dim: int, settings: dict, bias: tuple | None) -> None:
    layer = build(expert_hidden_dim, **settings)
    if bias is not None:
        layer.router.expert_bias.copy_(torch.tensor(bias))
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    record = RoutingRecord()
    out = layer(x, record)
    counts = record.layers[1].counts_E.tolist()
    assert sum(counts) == 18 * layer.router.top_k
    if bias == (0, 0, 0, -9):
        assert counts[3] == 0
    if bias == (9, 0, 0, 0):
        assert counts[0] == 18
    expected = reference(layer, x.flatten(0, 1)).view(2, 9, 16)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)

    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    inputs = [x, *layer.parameters()]
    actual_grads = torch.autograd.grad(out, inputs, cotangent)
    expected_grads = torch.autograd.grad(expected, inputs, cotangent.double())
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=1e-4)


def test_router_is_fp32_under_autocast() -> None:
    layer = build()
    x = torch.randn(32, 16)
    plain = layer.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer.router(x)
        answer = layer(x[None])
    for a, b in zip(plain, under_autocast, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(answer.float(), layer(x[None]), atol=0.05, rtol=0.05)


def test_a_model_that_is_not_asked_keeps_no_statistics() -> None:
    layer = build()
    layer(torch.randn(1, 3, 16))
    assert not [name for name in vars(layer) if "record" in name or "count" in name]


def skew(layer: MoE, x: torch.Tensor) -> float:
    record = RoutingRecord()
    layer(x, record)
    return balance_loss(record.layers[1]).item()


def test_balance_loss_is_one_when_uniform_and_its_gradient_lowers_the_skew() -> None:
    layer = build()
    x = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(3)) + 1
    record = RoutingRecord()
    layer(x, record)
    routing = record.layers[1]
    share = routing.counts_E.double() / routing.counts_E.sum()
    expected = 4 * sum(share[e] * routing.probabilities_TE.double()[:, e].mean() for e in range(4))
    torch.testing.assert_close(balance_loss(routing).double(), expected)
    before = skew(layer, x)
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.5)
    balance_loss(routing).backward()
    optimizer.step()
    assert skew(layer, x) < before

    with torch.no_grad():
        layer.router.weight.zero_()
        layer(x, record)
    record.layers[1].counts_E.fill_(7)
    assert balance_loss(record.layers[1]).item() == pytest.approx(1.0)


def test_z_loss() -> None:
    layer = build()
    record = RoutingRecord()
    layer(torch.randn(1, 6, 16), record)
    logits = record.layers[1].logits_TE.double()
    expected = (logits.exp().sum(-1).log() ** 2).mean()
    torch.testing.assert_close(z_loss(record.layers[1]).double(), expected, atol=1e-6, rtol=1e-5)
