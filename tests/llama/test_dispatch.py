"""Sorting, gathering and combining against loops over (token, choice) pairs."""

import pytest
import torch

from llama.dispatch import LocalDispatch, combine_rows, count_by_expert, gather_rows, sort_by_expert

IDS = torch.tensor([[2, 0], [2, 1], [0, 2], [2, 0], [1, 2]])
EXPERTS = 4


def pairs_by_expert(capacity):
    """For each expert the (token, choice) pairs that it computes, in the order of the tokens."""
    pairs = [[] for _ in range(EXPERTS)]
    for token, ids in enumerate(IDS.tolist()):
        for choice, expert in enumerate(ids):
            if capacity is None or len(pairs[expert]) < capacity:
                pairs[expert].append((token, choice))
    return pairs


@pytest.mark.parametrize("capacity", [None, 1, 2, 4, 5])
def test_rows_are_sorted_by_expert_and_then_by_token(capacity):
    rows = sort_by_expert(IDS, EXPERTS, capacity)
    pairs = pairs_by_expert(capacity)
    assert rows.counts_E.tolist() == [len(of_expert) for of_expert in pairs]
    flat = [pair for of_expert in pairs for pair in of_expert]
    assert [(pair // 2, pair % 2) for pair in rows.pair_R.tolist()] == flat
    for row, (token, choice) in enumerate(flat):
        assert rows.row_TK[token, choice] == row
    if capacity is None:
        assert rows.kept_TK is None
    else:
        kept = [(token, choice) for token, choice in rows.kept_TK.nonzero().tolist()]
        assert kept == sorted(flat)
    assert count_by_expert(IDS, EXPERTS).tolist() == [3, 2, 5, 0]


@pytest.mark.parametrize("capacity", [None, 2])
def test_gradients_are_those_of_finite_differences(capacity):
    rows = sort_by_expert(IDS, EXPERTS, capacity)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randn(len(rows.pair_R), 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, rows), x)
    assert torch.autograd.gradcheck(lambda y, weights: combine_rows(y, rows, weights), (y, weights))


@pytest.mark.parametrize("capacity", [None, 2])
def test_dispatch_sums_each_tokens_answers_by_weight(capacity):
    x = torch.randn(5, 3, dtype=torch.float64)
    weights = torch.rand(5, 2, dtype=torch.float64)

    def experts(x_RM, counts_E):
        return x_RM * (1.0 + torch.arange(EXPERTS).repeat_interleave(counts_E))[:, None]

    out = LocalDispatch(EXPERTS)(experts, x, IDS, weights, capacity)
    expected = torch.zeros_like(x)
    for expert, pairs in enumerate(pairs_by_expert(capacity)):
        for token, choice in pairs:
            expected[token] += weights[token, choice] * (1.0 + expert) * x[token]
    torch.testing.assert_close(out, expected)


def test_a_half_precision_sum_is_rounded_once():
    ids = torch.arange(8).view(1, 8)
    rows = sort_by_expert(ids, 8)
    y = torch.cat((torch.full((1, 4), 256.0), torch.full((7, 4), 1.0))).bfloat16()
    out = combine_rows(y, rows, torch.ones(1, 8))
    assert out.dtype == torch.bfloat16
    # 256 + 1 is 256 in bf16, seven times over; 263 rounds to 264.
    assert (out == 264).all()
