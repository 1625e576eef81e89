import torch

from llama.losses import cross_entropy_sum


def test_cross_entropy_sums_over_counted_labels_only() -> None:
    logits = torch.randn(2, 3, 7)
    labels = torch.tensor([[1, -100, 6], [0, 2, -100]])
    total, count = cross_entropy_sum(logits, labels)
    expected = 0.0
    for row in range(2):
        for column in range(3):
            if labels[row, column] != -100:
                z = logits[row, column].double()
                expected += (z.exp().sum().log() - z[labels[row, column]]).item()
    assert count.item() == 4
    assert abs(total.item() - expected) < 1e-5


def test_half_precision_logits_are_summed_in_fp32() -> None:
    total, _ = cross_entropy_sum(torch.zeros(4096, 16, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.long))
    assert total.dtype == torch.float32
    assert abs(total.item() - 4096 * torch.tensor(16.0).log().item()) < 0.05
