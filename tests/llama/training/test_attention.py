import pytest
import torch

import llama.attention
from llama.attention import CausalAttend, Scoring
from llama.training import attention
from llama.training.attention import BlockCausalAttend

PLAIN = Scoring(scale=16**-0.5)


def problem(length, heads, groups, dtype):
    generator = torch.Generator().manual_seed(length + heads)
    shapes = [(2, length, heads, 16), (2, length, groups, 16), (2, length, groups, 16), (2, length, heads, 16)]
    q, k, v, goal = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)], goal


def run(attend, length, heads, groups, dtype):
    inputs, goal = problem(length, heads, groups, dtype)
    out = attend(inputs)
    (out * goal.to(dtype)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def formula(inputs, window=None, documents=None):
    """softmax(q·kᵀ/√D)·v with the whole masked square."""
    q, k, v = inputs
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 4
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(-window)
    if documents is not None:
        hidden = (hidden | (documents[:, :, None] != documents[:, None]))[:, None]
    masked = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhlm,bmhd->blhd", masked.softmax(-1), v)


@pytest.mark.parametrize(("length", "heads", "groups"), [(1, 2, 2), (63, 4, 2), (64, 4, 4), (65, 4, 1), (200, 6, 2)])
def test_equals_the_formula_with_its_gradients(length, heads, groups):
    expected = run(formula, length, heads, groups, torch.float64)
    found = run(lambda x: BlockCausalAttend()(0, *x, PLAIN), length, heads, groups, torch.float64)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [1, 40, 64, 100, 199, 500])
def test_a_window_hides_the_keys_before_it(window):
    expected = run(lambda x: formula(x, window), 200, 4, 2, torch.float64)
    scoring = Scoring(scale=0.25, window=window)
    for attend in (BlockCausalAttend(), CausalAttend()):
        found = run(lambda x, attend=attend: attend(0, *x, scoring), 200, 4, 2, torch.float64)
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ends", [([200], [200]), ([64, 128, 200], [128, 200]), ([1, 2, 70, 190, 200], [63, 65, 200])])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [BlockCausalAttend, CausalAttend])
def test_documents_hide_each_other(ends, groups, kind):
    documents = torch.tensor([[sum(end <= place for end in row) for place in range(200)] for row in ends])
    attend = kind(documents)
    for window in (None, 50, 1, 90, None):  # of layers, which share what is computed for the batch
        expected = run(lambda x, window=window: formula(x, window, documents), 200, 4, groups, torch.float64)
        scoring = Scoring(scale=0.25, window=window)
        found = run(lambda x, scoring=scoring: attend(0, *x, scoring), 200, 4, groups, torch.float64)
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


def test_the_mask_of_documents_is_computed_once(monkeypatch):
    attend, inputs = CausalAttend(torch.arange(64)[None].expand(2, -1) // 20), problem(64, 4, 2, torch.float64)[0]
    first = attend(0, *inputs, PLAIN)
    monkeypatch.setattr(llama.attention, "visible_keys", None)
    assert torch.equal(attend(1, *inputs, PLAIN), first)


def test_keys_of_documents_that_have_ended_are_not_touched():
    """NaN would spread to every score that is computed with it."""
    documents = torch.tensor([[0] * 64 + [1] * 128, [5] * 60 + [7] * 132])
    q, k, v = (torch.randn(2, 192, 2, 16) for _ in range(3))
    k[:, :60] = torch.nan
    out = BlockCausalAttend(documents)(0, q, k, v, PLAIN)
    assert out[:, :60].isnan().all() and not out[:, 128:].isnan().any()


def test_long_sequences_keep_no_probabilities(monkeypatch):
    monkeypatch.setattr(attention, "MAX_BYTES", 64 * 8)
    monkeypatch.setattr(attention, "_BlockCausal", None)
    expected = run(formula, 65, 4, 2, torch.float64)
    found = run(lambda x: BlockCausalAttend()(0, *x, PLAIN), 65, 4, 2, torch.float64)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)
    with pytest.raises(AttributeError):
        run(lambda x: BlockCausalAttend()(0, *x, PLAIN), 64, 4, 2, torch.float64)


def test_what_blocks_do_not_do_is_done_all_the_same():
    scoring = Scoring(scale=0.25, softcap=2.0, window=30)
    found = run(lambda x: BlockCausalAttend()(0, *x, scoring), 70, 4, 2, torch.float64)
    general = run(lambda x: CausalAttend()(0, *x, scoring), 70, 4, 2, torch.float64)
    plain = run(lambda x: BlockCausalAttend()(0, *x, Scoring(scale=0.25, window=30)), 70, 4, 2, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(found, general, strict=True))
    assert not torch.allclose(found[0], plain[0])


def test_bf16_is_about_as_exact_as_torchs_own():
    exact = run(formula, 200, 4, 2, torch.float64)
    ours = run(lambda x: BlockCausalAttend()(0, *x, PLAIN), 200, 4, 2, torch.bfloat16)
    torchs = run(lambda x: CausalAttend()(0, *x, PLAIN), 200, 4, 2, torch.bfloat16)
    for value, other, reference in zip(ours, torchs, exact, strict=True):
        errors = [((x.double() - reference).norm() / reference.norm()).item() for x in (value, other)]
        assert errors[0] < max(1.5 * errors[1], 5e-3), errors
