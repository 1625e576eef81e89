import pytest
import torch

from llama import losses
from llama.losses import linear_cross_entropies, linear_cross_entropy_sum


def by_hand(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log softmax(W·h)[label], position by position, in the inputs' type."""
    total = hidden.new_zeros(())
    for h, label in zip(hidden.flatten(0, -2), labels.flatten().tolist(), strict=True):
        if label != -100:
            logits = weight @ h
            total = total + logits.exp().sum().log() - logits[label]
    return total


def problem(dtype: torch.dtype, vocab: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (2, 5), generator=generator)
    labels[0, 3] = labels[1, 0] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_equals_the_sum_over_labelled_positions_with_its_gradients(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk_rows * 11)
    hidden, weight, labels = problem(torch.float64)
    expected = by_hand(hidden, weight, labels)
    wanted = torch.autograd.grad(expected * 0.7, (hidden, weight))
    found = linear_cross_entropy_sum(hidden, weight, labels)
    torch.testing.assert_close(found, expected)
    for gradient, reference in zip(torch.autograd.grad(found * 0.7, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(gradient, reference)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy_sum(h, w, labels), (hidden, weight))


@pytest.mark.parametrize("vocab", [11, losses._CHUNK_ELEMENTS // 128])
def test_each_label_by_itself_with_few_logits_at_a_time(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ROWS", 3)
    hidden, weight, labels = problem(torch.float64, vocab)
    rows = []
    monkeypatch.setattr(losses, "linear", lambda h, w: rows.append(len(h)) or h @ w.T)
    found = linear_cross_entropies(hidden, weight, labels)
    for place, loss in enumerate(found.flatten()):
        b, i = divmod(place, 5)
        torch.testing.assert_close(loss, by_hand(hidden[b, i : i + 1], weight, labels[b, i : i + 1]).detach())
    assert not found.requires_grad and sum(rows) == 10
    many = linear_cross_entropies(hidden.repeat(40, 1, 1), weight, labels.repeat(40, 1))
    assert torch.equal(many.view(40, 2, 5)[7], many.view(40, 2, 5)[0])
    assert max(rows) * vocab <= losses._CHUNK_ELEMENTS


def test_no_labels_cost_nothing() -> None:
    hidden, weight, labels = problem(torch.float32)
    total = linear_cross_entropy_sum(hidden, weight, labels.fill_(-100))
    total.backward()
    assert total.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_half_precision_is_summed_in_fp32() -> None:
    hidden = torch.zeros(4096, 8, dtype=torch.bfloat16)
    total = linear_cross_entropy_sum(hidden, torch.zeros(16, 8, dtype=torch.bfloat16), torch.zeros(4096).long())
    assert total.dtype == torch.float32
    assert abs(total.item() - 4096 * torch.tensor(16.0).log().item()) < 0.05


def test_autocast_computes_the_products_in_its_type_and_gives_fp32_gradients() -> None:
    hidden, weight, labels = problem(torch.float32)
    exact = by_hand(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        total = linear_cross_entropy_sum(hidden, weight, labels)
    assert total.dtype == torch.float32 and total.item() != exact.item()
    torch.testing.assert_close(total, exact, rtol=0.02, atol=0.0)
    found, wanted = torch.autograd.grad(total, weight)[0], torch.autograd.grad(exact, weight)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.03)


def test_without_gradients_none_are_computed() -> None:
    hidden, weight, labels = problem(torch.float64)
    with torch.no_grad():
        total = linear_cross_entropy_sum(hidden, weight, labels)
    assert not total.requires_grad
    torch.testing.assert_close(total, by_hand(hidden, weight, labels).detach())


def test_labels_that_do_not_fit_are_named() -> None:
    hidden, weight, labels = problem(torch.float32)
    with pytest.raises(ValueError, match=r"labels of shape \[2, 4\] do not fit the tokens' \[2, 5\]"):
        linear_cross_entropy_sum(hidden, weight, labels[:, :4])


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    hidden, weight, labels = problem(torch.float64)
    total = linear_cross_entropy_sum(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="LinearCrossEntropy has no second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)
