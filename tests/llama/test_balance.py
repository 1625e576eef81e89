"""Balance losses against their formulas in float64, and what they do to a skewed router."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from llama.balance import (
    RoutingStatistics,
    balance_loss,
    balanced_bias,
    expert_load,
    frequency_entropy,
    importance_entropy,
    kl_uniform,
    routing_sums,
    sequence_losses,
    switch_loss,
    with_total,
    z_losses,
)
from llama.config import BalanceLoss, ModelConfig, MoEConfig
from llama.dispatch import count_by_expert
from llama.moe import LayerRouting, MoE, RoutingRecord

KINDS = get_args(BalanceLoss)
EXPERTS, TOP_K, BATCH, LENGTH = 4, 2, 3, 10
UNIFORM = {
    "switch": 1.0,
    "switch_sequence": 1.0,
    "importance_entropy": -math.log(EXPERTS),
    "frequency_entropy": -math.log(EXPERTS),
    "kl_uniform": 0.0,
    "expert_load": 0.0,
}


def routing(seed=0, score="softmax", batch=BATCH, bias=(0.0, 0.0, 0.0, 0.0), skew=1.0) -> LayerRouting:
    """Random logits that prefer the last experts, and the choice that follows from them."""
    logits = torch.randn(batch * LENGTH, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logits = (logits + skew * torch.arange(EXPERTS)).requires_grad_()
    affinities = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    ids = (affinities + torch.tensor(bias)).topk(TOP_K).indices
    counts = torch.tensor([(ids == e).sum() for e in range(EXPERTS)])
    return LayerRouting(logits, affinities / affinities.sum(-1, keepdim=True), counts, TOP_K, batch)


def loss_of(kind, *layers):
    return balance_loss(kind, RoutingStatistics(routing_sums(layers, kind)))


def formula(kind, layer, rows=slice(None)):
    """The loss of one layer from its definition, with numbers and loops."""
    probabilities = layer.probabilities_TE.detach()[rows].tolist()
    tokens, experts = len(probabilities), range(EXPERTS)
    if kind == "switch_sequence":
        total = 0.0
        for start in range(0, tokens, LENGTH):
            sequence = probabilities[start : start + LENGTH]
            for i in experts:
                chosen = sum(sorted(token, reverse=True).index(token[i]) < TOP_K for token in sequence)
                total += EXPERTS / (TOP_K * LENGTH) * chosen * sum(token[i] for token in sequence) / LENGTH
        return total / (tokens / LENGTH)
    mean = [math.fsum(token[i] for token in probabilities) / tokens for i in experts]
    counts = layer.counts_E.tolist()
    load = [count / sum(counts) for count in counts]
    average = sum(counts) / EXPERTS
    return {
        "switch": EXPERTS * sum(f * p for f, p in zip(load, mean, strict=True)),
        "importance_entropy": sum(p * math.log(p) for p in mean),
        "frequency_entropy": sum(f * math.log(f) for f in load if f > 0),
        "kl_uniform": sum(p * math.log(p / (1 / EXPERTS)) for p in mean),
        "expert_load": sum((count - average) ** 2 for count in counts) / EXPERTS / average**2,
    }[kind]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_formula(kind, score):
    layers = [routing(seed, score) for seed in range(3)]
    losses = loss_of(kind, *layers)
    assert losses.shape == (3,)
    for loss, layer in zip(losses, layers, strict=True):
        assert loss.item() == pytest.approx(formula(kind, layer), rel=1e-12)


def test_a_sequences_loss_counts_the_choice_without_the_bias():
    free, steered = (routing(bias=bias) for bias in ((0.0,) * 4, (9.0, 9.0, 0.0, 0.0)))
    assert not torch.equal(free.counts_E, steered.counts_E)
    assert loss_of("switch_sequence", steered) == loss_of("switch_sequence", free)
    assert loss_of("switch", steered) != loss_of("switch", free)


def test_z_loss_equals_its_formula():
    layer = routing()
    expected = [math.log(sum(math.exp(z) for z in token)) ** 2 for token in layer.logits_TE.tolist()]
    statistics = RoutingStatistics(routing_sums([layer], "switch"))
    assert statistics.z_loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_the_entropy_is_that_of_the_tokens_and_not_of_their_mean():
    layer = routing()
    expected = [-sum(p * math.log(p) for p in token) for token in layer.probabilities_TE.tolist()]
    statistics = RoutingStatistics(routing_sums([layer], "switch"))
    assert statistics.entropy.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert not statistics.entropy.requires_grad
    sure = LayerRouting(layer.logits_TE, torch.eye(EXPERTS).repeat(5, 1), layer.counts_E, TOP_K, 1)
    assert RoutingStatistics(routing_sums([sure], "switch")).entropy.item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_in_no_sum(kind):
    """Sequences of 10, 4 and 0 tokens in rows of 10 have the sums of the two that are there."""
    lengths, whole = (10, 4, 0), routing()
    counted = torch.cat([torch.arange(LENGTH) < length for length in lengths])
    ids = whole.probabilities_TE.topk(TOP_K).indices
    counts = count_by_expert(ids, EXPERTS, counted)
    assert torch.equal(counts, count_by_expert(ids[counted], EXPERTS))
    padded = replace(whole, counts_E=counts, counted_T=counted)
    parts = []
    for row, length in enumerate(lengths[:2]):
        rows = slice(row * LENGTH, row * LENGTH + length)
        own = (whole.logits_TE[rows], whole.probabilities_TE[rows], count_by_expert(ids[rows], EXPERTS))
        parts.append(LayerRouting(*own, TOP_K, 1))
    expected = routing_sums(parts, kind).sum(dim=0)
    sums = routing_sums([padded], kind)[0]
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    statistics = RoutingStatistics(sums)
    (gradient,) = torch.autograd.grad(balance_loss(kind, statistics) + statistics.z_loss, whole.logits_TE)
    assert not gradient[~counted].any() and gradient[counted].any()


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_routing_is_the_minimum(kind):
    """Load and importance go together: from uniform to one expert that has all."""
    values = []
    for share in (0.0, 0.1, 0.3, 0.6, 0.9):
        row = torch.full((EXPERTS,), (1 - share) / EXPERTS, dtype=torch.float64)
        row[0] += share
        if kind == "switch_sequence":
            # Tokens that favour each expert in turn, then ever more of them the first.
            favourite = torch.arange(20) % EXPERTS
            favourite[: round(20 * share)] = 0
            probabilities = torch.full((1, 20, EXPERTS), 0.1, dtype=torch.float64)
            probabilities[0, torch.arange(20), favourite] = 0.7
            values.append(sequence_losses(probabilities, top_k=1).item())
        else:
            sums = torch.cat((row * 4000, row * 2000, torch.tensor([0.0, 0.0, 0.0, 1.0, 2000.0])))
            values.append(balance_loss(kind, RoutingStatistics(sums)).item())
    assert values[0] == pytest.approx(UNIFORM[kind], abs=1e-9)
    assert values == sorted(values) and values[-1] > values[0] + 0.5


LOAD = torch.tensor([0.05, 0.15, 0.3, 0.5], dtype=torch.float64)
OF_IMPORTANCE = {
    "switch": lambda importance: switch_loss(LOAD, importance),
    "entropy": importance_entropy,
    "kl": kl_uniform,
}


@pytest.mark.parametrize("name", OF_IMPORTANCE)
def test_losses_of_the_importance_pass_gradcheck(name):
    logits = torch.randn(6, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda z: OF_IMPORTANCE[name](z.softmax(-1).mean(0)), logits.requires_grad_())


def test_sequence_and_z_losses_pass_gradcheck():
    logits = torch.randn(2, 5, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda z: sequence_losses(z.softmax(-1), TOP_K), logits.requires_grad_())
    assert torch.autograd.gradcheck(z_losses, logits)


@pytest.mark.parametrize("loss", [frequency_entropy, expert_load])
def test_a_loss_of_the_load_passes_its_gradient_to_the_importance(loss):
    importance = torch.full((EXPERTS,), 0.25, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(loss(LOAD, importance), importance)
    step = 1e-6 * torch.eye(EXPERTS, dtype=torch.float64)
    slopes = [(loss(LOAD + e, importance) - loss(LOAD - e, importance)).item() / 2e-6 for e in step]
    # Up to a constant, which moves no probability: they sum to 1.
    slopes = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(actual - actual.mean(), slopes - slopes.mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_idle_experts_leave_loss_and_gradient_finite(kind):
    layer = routing(skew=200.0)
    assert layer.counts_E.tolist()[:2] == [0, 0]
    loss = loss_of(kind, layer)
    (gradient,) = torch.autograd.grad(loss.sum(), layer.logits_TE)
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_give_the_loss_and_the_gradient_of_all_tokens(kind):
    whole = routing(seed=1, batch=4)
    together = loss_of(kind, whole).sum()
    (expected,) = torch.autograd.grad(together, whole.logits_TE)

    parts, sums = [], []
    for rows in (slice(0, LENGTH), slice(LENGTH, None)):  # one sequence here, three there
        logits = whole.logits_TE.detach()[rows].requires_grad_()
        probabilities = logits.softmax(-1)
        counts = torch.bincount(probabilities.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
        parts.append(LayerRouting(logits, probabilities, counts, TOP_K, len(logits) // LENGTH))
        sums.append(routing_sums([parts[-1]], kind))
    total = sum(sums).detach()
    losses = [balance_loss(kind, RoutingStatistics(with_total(own, total))).sum() for own in sums]
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0], together)
    gradients = [torch.autograd.grad(loss, part.logits_TE)[0] for loss, part in zip(losses, parts, strict=True)]
    torch.testing.assert_close(torch.cat(gradients), expected)


def skewed_layer(**settings):
    """A router that prefers its first experts, and tokens to show it."""
    moe = MoEConfig(num_experts=EXPERTS, expert_hidden_dim=8, **settings)
    layer = MoE(ModelConfig(dim=8, num_heads=2, moe=moe), layer=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.1, generator=generator)
        layer.router.weight[:, 0] += torch.tensor([0.3, 0.2, 0.0, -0.3])
    x = torch.randn(4, 64, 8, generator=generator)
    x[..., 0] += 1
    return layer, x


def route(layer, x):
    record = RoutingRecord()
    layer(x, record)
    return record.layers[0]


def variation(counts):
    return (counts.double().std() / counts.double().mean()).item()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_optimiser_step_lowers_the_skew(kind, score):
    layer, x = skewed_layer(balance_loss=kind, score=score)
    before = route(layer, x)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    loss = loss_of(kind, before).sum()
    loss.backward()
    optimizer.step()
    after = route(layer, x)
    assert variation(after.counts_E) < 0.9 * variation(before.counts_E)
    assert loss_of(kind, after).item() < loss.item()


def test_bias_balancing_lowers_the_skew_and_leaves_affinities_alone():
    layer, x = skewed_layer(bias_update_rate=0.05)
    before = route(layer, x)
    layer.router.expert_bias.copy_(balanced_bias(layer.router.expert_bias, before.counts_E.double(), 0.05))
    after = route(layer, x)
    mean = before.counts_E.double().mean()
    expected = [0.05 if count < mean else -0.05 if count > mean else 0.0 for count in before.counts_E.tolist()]
    assert layer.router.expert_bias.tolist() == pytest.approx(expected)
    assert variation(after.counts_E) < 0.9 * variation(before.counts_E)
    assert torch.equal(after.probabilities_TE, before.probabilities_TE)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"model\.moe\.balance_loss='even'"):
        balance_loss("even", RoutingStatistics(torch.ones(13)))
