"""Sinusoidal positions, ALiBi and the relative bias against their papers and their authors' functions."""

import math

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from llama.position import ALiBi, RelativeBias, alibi_slopes, relative_bucket, sinusoidal


def test_sinusoidal() -> None:
    positions = torch.tensor([[0, 1, 7], [100, 4095, 1_000_000]])
    actual = sinusoidal(positions, 6)
    assert actual.dtype == torch.float32 and actual.shape == (2, 3, 6)
    for row in range(2):
        for column in range(3):
            position = positions[row, column].item()
            angles = [position / 10000 ** (2 * i / 6) for i in range(3)]
            expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
            assert actual[row, column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [
        (1, [8]),
        (4, [2, 4, 6, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (16, [k / 2 for k in range(1, 17)]),
        # No powers of two: the smaller power's, then every other one of the greater power's.
        (3, [4, 8, 2]),
        (6, [2, 4, 6, 8, 1, 3]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_alibi_slopes(num_heads: int, exponents: list[float]) -> None:
    assert alibi_slopes(num_heads).tolist() == pytest.approx([2**-exponent for exponent in exponents], rel=1e-7)


def test_alibi_bias() -> None:
    query_positions, key_positions = torch.tensor([[5, 6], [0, 3]]), torch.tensor([[0, 1, 5], [0, 2, 3]])
    actual = ALiBi(2)(query_positions, key_positions)
    assert actual.shape == (2, 2, 2, 3) and actual.dtype == torch.float32
    for batch in range(2):
        for head, slope in enumerate((1 / 16, 1 / 256)):
            for i, query in enumerate(query_positions[batch].tolist()):
                for j, key in enumerate(key_positions[batch].tolist()):
                    assert actual[batch, head, i, j].item() == -slope * (query - key)
    assert torch.equal(ALiBi(2)(query_positions[1], key_positions[1]), actual[1])


def bucket_by_whole_numbers(distance: int, buckets: int, max_distance: int) -> int:
    """e + the greatest k with e·(max/e)^(k/n) <= distance, the n-th powers compared as integers; e = buckets // 2."""
    exact = buckets // 2
    if distance < exact:
        return max(distance, 0)
    shared = buckets - exact
    bounds = (max_distance**k * exact ** (shared - k) for k in range(1, shared))
    return exact + sum(distance**shared >= bound for bound in bounds)


SIZES = [(32, 128), (16, 64), (8, 32), (4, 8), (5, 9), (64, 512)]


@pytest.mark.parametrize(("buckets", "max_distance"), SIZES)
def test_unidirectional_buckets(buckets: int, max_distance: int) -> None:
    distances = torch.arange(-20, 3 * max_distance)
    actual = relative_bucket(distances, buckets, max_distance)
    expected = T5Attention._relative_position_bucket(-distances, False, buckets, max_distance)
    assert torch.equal(actual, expected)
    assert actual.tolist() == [bucket_by_whole_numbers(d, buckets, max_distance) for d in distances.tolist()]
    assert actual[distances >= max_distance].unique().tolist() == [buckets - 1]


@pytest.mark.parametrize(("buckets", "max_distance"), SIZES)
def test_bidirectional_buckets(buckets: int, max_distance: int) -> None:
    distances = torch.arange(-3 * max_distance, 3 * max_distance)
    actual = relative_bucket(distances, buckets, max_distance, bidirectional=True)
    assert torch.equal(actual, T5Attention._relative_position_bucket(-distances, True, buckets, max_distance))
    half = buckets // 2
    expected = [bucket_by_whole_numbers(abs(d), half, max_distance) + half * (d < 0) for d in distances.tolist()]
    assert actual.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_relative_bias(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 3).to(dtype)
    query_positions, key_positions = torch.tensor([[40, 9], [0, 3]]), torch.tensor([[0, 30, 39], [0, 2, 3]])
    actual = RelativeBias(weight, 32)(query_positions, key_positions)
    assert actual.shape == (2, 3, 2, 3)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for batch in range(2):
        for head in range(3):
            for i, query in enumerate(query_positions[batch].tolist()):
                for j, key in enumerate(key_positions[batch].tolist()):
                    bucket = bucket_by_whole_numbers(query - key, 8, 32)
                    assert actual[batch, head, i, j].item() == weight[bucket, head].item()
    assert torch.equal(RelativeBias(weight, 32)(query_positions[1], key_positions[1]), actual[1])


def test_relative_bias_gradient() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(12)
    assert torch.autograd.gradcheck(lambda weight: RelativeBias(weight, 10)(positions[4:], positions), weight)


def test_relative_bias_sees_its_parameter_change() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 2))
    bias = RelativeBias(weight, 32)
    positions = torch.arange(3)
    before = bias(positions, positions)
    weight.data.fill_(2.0)
    assert before.eq(0).all() and bias(positions, positions).eq(2).all()
