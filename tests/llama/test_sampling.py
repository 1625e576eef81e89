"""Against definitions in plain Python, and against transformers' own processors."""

import math

import numpy as np
import pytest
import torch

from llama.sampling import (
    allow_only,
    apply_temperature,
    draw,
    forbid,
    keep_min_p,
    keep_top,
    penalize_frequency,
    penalize_repetition,
)


def random_logits(rows: int = 7, vocab: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def kept(logits_NV: torch.Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits_NV]


def by_probability(row: torch.Tensor) -> list[tuple[float, int]]:
    weights = [math.exp(value) for value in row.tolist()]
    return sorted(((-weight / sum(weights), token) for token, weight in enumerate(weights)))


@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_top_k_then_top_p_keep_what_they_should(top_k, top_p):
    logits_NV = random_logits()
    filtered_NV = keep_top(logits_NV, top_k=top_k, top_p=top_p)
    for row, found in zip(logits_NV, kept(filtered_NV), strict=True):
        best = by_probability(row)[: top_k or None]
        mass, expected = 0.0, set()
        for probability, token in best:
            if mass >= top_p and top_p < 1:
                break
            expected.add(token)
            mass += probability / sum(p for p, _ in best)
        assert found == expected
    assert torch.equal(filtered_NV[filtered_NV.isfinite()], logits_NV[filtered_NV.isfinite()])


def test_of_equal_logits_exactly_k_stay():
    assert kept(keep_top(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), top_k=2)) == [{1, 2}]
    assert kept(keep_top(torch.zeros(1, 1000), top_k=7, top_p=0.5)) == [set(range(4))]
    assert kept(keep_top(torch.zeros(1, 1000), top_p=0.5)) == [set(range(500))]


def test_a_large_vocabulary_is_cut_where_a_small_one_is():
    generator = torch.Generator().manual_seed(4)
    scale_N1 = torch.tensor([[0.0], [0.3], [1.0], [2.0], [6.0], [0.1], [3.0], [1.5]])
    # Rounded as bf16 logits are: many are equal.
    logits_NV = (torch.randn(8, 3000, generator=generator) * scale_N1).bfloat16().float()
    logits_NV[4, 5:] = -torch.inf
    top_k = torch.tensor([0, 0, 0, 50, 0, 300, 256, 257])[:, None]
    top_p = torch.tensor([0.9, 0.5, 0.99, 0.7, 0.9, 0.95, 1.0, 1.0])[:, None]
    found = kept(keep_top(logits_NV, top_k=top_k, top_p=top_p))
    for row, tokens, k, p in zip(logits_NV.double(), found, top_k.tolist(), top_p.tolist(), strict=True):
        values, order = row.sort(descending=True, stable=True)
        weights = values.softmax(dim=-1)[: k[0] or None]
        before = weights.cumsum(dim=-1) - weights
        count = int((before < p[0] * weights.sum()).sum())
        assert tokens == set(order[:count].tolist()) & set(row.isfinite().nonzero().flatten().tolist())
    assert max(map(len, found)) > 2000 > 256 > min(map(len, found))


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
def test_min_p_is_a_share_of_the_likeliest(min_p):
    logits_NV = random_logits(seed=1)
    for row, found in zip(logits_NV, kept(keep_min_p(logits_NV, min_p)), strict=True):
        probabilities = {token: -negative for negative, token in by_probability(row)}
        least = min_p * max(probabilities.values())
        assert found == {token for token, probability in probabilities.items() if probability >= least}
    assert kept(keep_min_p(logits_NV, 1.0)) == [{token} for token in logits_NV.argmax(dim=-1).tolist()]


def test_settings_may_differ_by_row():
    logits_NV = random_logits(4)
    top_k, top_p = [0, 3, 0, 9], [1.0, 1.0, 0.6, 0.8]
    column = {"top_k": torch.tensor(top_k)[:, None], "top_p": torch.tensor(top_p, dtype=torch.float64)[:, None]}
    expected = [keep_top(row[None], top_k=k, top_p=p) for row, k, p in zip(logits_NV, top_k, top_p, strict=True)]
    assert torch.equal(keep_top(logits_NV, **column), torch.cat(expected))
    numbers = [0.0, 0.1, 0.5, 1.0]
    expected = [keep_min_p(row[None], number) for row, number in zip(logits_NV, numbers, strict=True)]
    assert torch.equal(keep_min_p(logits_NV, torch.tensor(numbers, dtype=torch.float64)[:, None]), torch.cat(expected))
    numbers = [0.1, 0.7, 1.0, 2.0]
    expected = [apply_temperature(row[None], number) for row, number in zip(logits_NV, numbers, strict=True)]
    column_N1 = torch.tensor(numbers, dtype=torch.float64)[:, None]
    assert torch.equal(apply_temperature(logits_NV, column_N1), torch.cat(expected))


def test_repetition_penalty_makes_what_was_seen_less_likely():
    logits_NV = torch.tensor([[3.0, -3.0, 2.0, -2.0], [3.0, -3.0, 2.0, -2.0]])
    seen_NV = torch.tensor([[True, True, False, False], [False, False, False, True]])
    assert penalize_repetition(logits_NV, seen_NV, 1.5).tolist() == [[2.0, -4.5, 2.0, -2.0], [3.0, -3.0, 2.0, -3.0]]
    assert torch.equal(penalize_repetition(logits_NV, seen_NV, 1.0), logits_NV)


def test_frequency_and_presence_penalties_are_openais():
    logits_NV, counts_NV = random_logits(2, 5, seed=2), torch.tensor([[0.0, 1, 2, 0, 7], [0, 0, 0, 0, 0]])
    found_NV = penalize_frequency(logits_NV, counts_NV, torch.tensor([[0.5], [2.0]]), torch.tensor([[-1.5], [2.0]]))
    for row, (found, counts) in enumerate(zip(found_NV, counts_NV.tolist(), strict=True)):
        presence, frequency = [(0.5, -1.5), (2.0, 2.0)][row]
        expected = [
            logit - count * frequency - float(count > 0) * presence
            for logit, count in zip(logits_NV[row].tolist(), counts, strict=True)
        ]
        assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 70])
def test_a_mask_keeps_the_tokens_of_its_bits(vocab):
    logits_NV = random_logits(4, vocab)
    allowed = [{0}, set(range(vocab)), set(range(0, vocab, 3)), {vocab - 1}]
    bits = [sum(1 << token for token in tokens) | 1 << vocab for tokens in allowed]
    words = [[(row >> 32 * word) & 0xFFFFFFFF for word in range(vocab // 32 + 1)] for row in bits]
    mask_NW = torch.tensor(np.array(words, dtype=np.uint32).view(np.int32))
    found_NV = allow_only(logits_NV, mask_NW)
    assert kept(found_NV) == allowed
    assert torch.equal(found_NV[found_NV.isfinite()], logits_NV[found_NV.isfinite()])


def test_forbidden_tokens_go_unless_nothing_else_is_left():
    logits_NV = torch.tensor([[1.0, 2.0, 3.0], [1.0, -torch.inf, 3.0]])
    forbidden_NV = torch.tensor([[False, False, True], [True, True, True]])
    assert kept(forbid(logits_NV, forbidden_NV)) == [{0, 1}, {0, 2}]


def test_temperature_scales_and_no_temperature_overflows():
    logits_NV = random_logits()
    for temperature in (0.3, 1.0, 2.5):
        expected = (logits_NV / temperature).softmax(dim=-1)
        torch.testing.assert_close(apply_temperature(logits_NV, temperature).softmax(dim=-1), expected)
    cold_NV = apply_temperature(logits_NV.float(), 1e-300)
    assert torch.equal(cold_NV.softmax(dim=-1).argmax(dim=-1), logits_NV.argmax(dim=-1))
    assert not cold_NV.isnan().any()


def test_a_draw_inverts_the_cumulative_distribution():
    logits_NV = random_logits(200, 30, seed=2)
    logits_NV[:, ::3] = -torch.inf
    uniforms = np.random.default_rng(3).random(200)
    uniforms[0], uniforms[1] = 0.0, math.nextafter(1.0, 0.0)
    tokens = draw(logits_NV, torch.from_numpy(uniforms)).tolist()
    for row, uniform, token in zip(logits_NV, uniforms, tokens, strict=True):
        cumulative = np.cumsum(np.exp(row.numpy()))
        assert token == next(t for t, mass in enumerate(cumulative) if mass > uniform * cumulative[-1])
        assert token % 3


def test_draws_follow_the_distribution():
    logits_V, count = random_logits(1, 12, seed=4)[0] / 2, 20_000
    uniforms_N = torch.rand(count, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    observed = np.bincount(draw(logits_V.expand(count, -1), uniforms_N), minlength=12)
    expected = logits_V.softmax(dim=-1).numpy() * count
    chi_squared = ((observed - expected) ** 2 / expected).sum()
    assert chi_squared < 11 + 5 * math.sqrt(22)  # five standard deviations above the mean


def test_a_row_of_nan_does_not_hurt_the_others():
    logits_NV = torch.tensor([[math.nan, math.nan], [0.0, -torch.inf]])
    assert draw(logits_NV, torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist()[1] == 0


def test_transformers_filters_alike():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits_NV = random_logits(seed=6).float()
    ids_NL = torch.randint(40, (7, 9), generator=torch.Generator().manual_seed(7))
    seen_NV = torch.zeros(7, 40, dtype=torch.bool).scatter_(1, ids_NL, True)
    for theirs, ours_NV in (
        (process.TopKLogitsWarper(6), keep_top(logits_NV, top_k=6)),
        (process.TopPLogitsWarper(0.8), keep_top(logits_NV, top_p=0.8)),
        (process.MinPLogitsWarper(0.07), keep_min_p(logits_NV, 0.07)),
        (process.RepetitionPenaltyLogitsProcessor(1.3), penalize_repetition(logits_NV, seen_NV, 1.3)),
    ):
        assert torch.equal(theirs(ids_NL, logits_NV), ours_NV)
    theirs_NV = logits_NV
    for step in (
        process.RepetitionPenaltyLogitsProcessor(0.8),
        process.TemperatureLogitsWarper(1.7),
        process.TopKLogitsWarper(20),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(0.1),
    ):
        theirs_NV = step(ids_NL, theirs_NV)
    ours_NV = keep_top(apply_temperature(penalize_repetition(logits_NV, seen_NV, 0.8), 1.7), top_k=20, top_p=0.9)
    ours_NV = keep_min_p(ours_NV, 0.1)
    torch.testing.assert_close(ours_NV.softmax(dim=-1), theirs_NV.softmax(dim=-1))
    assert torch.equal(ours_NV.isfinite(), theirs_NV.isfinite())
