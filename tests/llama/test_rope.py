"""Rotary embedding against complex numbers, its scalings against float64 formulas and against transformers."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama.config import RopeLayout, RopeScaling
from llama.rope import apply_rotary, rotary_cos_sin, rotary_frequencies

LAYOUTS: tuple[RopeLayout, ...] = get_args(RopeLayout)
SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "ntk": RopeScaling("ntk", 4.0),
    "dynamic_ntk": RopeScaling("dynamic_ntk", 4.0, 128),
    "yarn": RopeScaling("yarn", 4.0, 128),
    "yarn of a long context": RopeScaling("yarn", 16.0, 2048),
    "yarn with all its settings": RopeScaling(
        "yarn", 2.5, 4096, beta_fast=20.0, beta_slow=2.0, attention_factor=1.25, truncate=False
    ),
    "llama3": RopeScaling("llama3", 8.0, 256, low_freq_factor=1.5, high_freq_factor=6.0),
}


def frequency_reference(
    head_dim: int, theta: float, scaling: RopeScaling | None, length: int
) -> tuple[list[float], float]:
    """The frequencies pair by pair in Python's float64, from the formulas of the papers."""
    frequencies, s = [], scaling
    original = s.original_max_seq_len or 0 if s else 0
    for pair in range(head_dim // 2):
        power = -2 * pair / head_dim
        plain = theta**power
        if s is None:
            frequencies.append(plain)
        elif s.kind == "linear":
            frequencies.append(plain / s.factor)
        elif s.kind in ("ntk", "dynamic_ntk"):
            stretch = s.factor
            if s.kind == "dynamic_ntk":
                stretch = s.factor * length / original - s.factor + 1
                stretch = stretch if length > original else 1
            frequencies.append((theta * stretch ** (head_dim / (head_dim - 2))) ** power)
        else:
            turns = original * plain / (2 * math.pi)
            if s.kind == "llama3":
                kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            else:
                bounds = [
                    math.log(original / (2 * math.pi * beta)) / math.log(theta) * head_dim / 2
                    for beta in (s.beta_fast, s.beta_slow)
                ]
                if s.truncate:
                    bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
                low, high = max(bounds[0], 0), min(bounds[1], head_dim - 1)
                kept = 1 - (pair - low) / (high - low)
            kept = min(max(kept, 0), 1)
            frequencies.append(kept * plain + (1 - kept) * plain / s.factor)
    if s is not None and s.kind == "yarn":
        return frequencies, s.attention_factor or 0.1 * math.log(s.factor) + 1
    return frequencies, 1.0


@pytest.mark.parametrize("name", ["none", *SCALINGS])
@pytest.mark.parametrize("head_dim", [8, 34, 64])
@pytest.mark.parametrize("length", [100, 512])
def test_frequencies_equal_the_formulas(name: str, head_dim: int, length: int) -> None:
    scaling = SCALINGS.get(name)
    actual, factor = rotary_frequencies(head_dim, 10000.0, scaling, length)
    expected, expected_factor = frequency_reference(head_dim, 10000.0, scaling, length)
    assert actual.dtype == torch.float32
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "ntk"])
@pytest.mark.parametrize("length", [None, 100, 512])
@pytest.mark.parametrize("theta", [5000.0, 16.0])
def test_frequencies_equal_those_of_transformers(name: str, length: int | None, theta: float) -> None:
    scaling = SCALINGS[name]
    kind = {"dynamic_ntk": "dynamic"}.get(scaling.kind, scaling.kind)
    parameters: dict[str, Any] = {"rope_type": kind, "factor": scaling.factor, "rope_theta": theta}
    if scaling.kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        parameters |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        parameters["attention_factor"] = scaling.attention_factor
    config = LlamaConfig(
        hidden_size=96,
        num_attention_heads=2,
        head_dim=48,
        max_position_embeddings=scaling.original_max_seq_len or 128,
        rope_parameters=parameters,
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), length)
    actual, factor = rotary_frequencies(48, theta, scaling, length)
    torch.testing.assert_close(actual, expected, rtol=2e-7, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_unscaled_frequencies_equal_those_of_transformers_bit_for_bit() -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=2, rope_parameters={"rope_theta": 5e5})
    assert torch.equal(rotary_frequencies(48, 5e5)[0], LlamaRotaryEmbedding(config).inv_freq)


def test_yarn_ramp_of_no_width_is_finite() -> None:
    # Both bounds of the ramp fall on pair 0.
    frequencies, _ = rotary_frequencies(8, 10000.0, RopeScaling("yarn", 2.0, 4))
    plain, _ = rotary_frequencies(8, 10000.0)
    torch.testing.assert_close(frequencies, torch.cat((plain[:1], plain[1:] / 2)))


def turn_by_complex_numbers(x: Tensor, positions: Tensor, frequencies: list[float], layout: RopeLayout) -> Tensor:
    """x·e^{i·position·frequency} in complex128, each pair a complex number (arXiv:2104.09864, eq. 12)."""
    pairs = x.shape[-1] // 2
    first = [2 * p if layout == "interleaved" else p for p in range(pairs)]
    second = [2 * p + 1 if layout == "interleaved" else p + pairs for p in range(pairs)]
    out = torch.empty_like(x, dtype=torch.float64)
    for p, frequency in enumerate(frequencies):
        numbers = torch.complex(x[..., first[p]].double(), x[..., second[p]].double())
        turned = numbers * torch.exp(1j * positions.double() * frequency)[..., None]
        out[..., first[p]], out[..., second[p]] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)],
)
def test_rotation_equals_the_complex_product(layout: RopeLayout, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 10).to(dtype)
    positions = torch.tensor([[0, 3, 1, 9], [5, 6, 7, 8]])
    frequencies = [100.0 ** (-2 * pair / 10) for pair in range(5)]
    cos, sin = rotary_cos_sin(positions, torch.tensor(frequencies, dtype=torch.float64))
    assert cos.shape == sin.shape == (2, 4, 5) and cos.dtype == torch.float64
    actual = apply_rotary(x, cos, sin, layout)
    assert actual.dtype == dtype and actual.shape == x.shape
    expected = turn_by_complex_numbers(x, positions, frequencies, layout)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_types_are_rounded_once(layout: RopeLayout) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64, 4, 32).bfloat16()
    tables = rotary_cos_sin(torch.arange(64)[None], rotary_frequencies(32, 10000.0)[0])
    assert torch.equal(apply_rotary(x, *tables, layout), apply_rotary(x.float(), *tables, layout).bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout: RopeLayout) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary_cos_sin(torch.tensor([[0, 4, 2]]), rotary_frequencies(6, 100.0)[0].double(), 1.3)

    def turn(x: Tensor) -> Tensor:
        return apply_rotary(x, cos, sin, layout)

    assert torch.autograd.gradcheck(turn, x)
    assert torch.autograd.gradgradcheck(turn, x)


def test_tables_are_fp32_and_carry_the_factor() -> None:
    frequencies, _ = rotary_frequencies(8, 10000.0)
    positions = torch.tensor([[7, 100]])
    cos, sin = rotary_cos_sin(positions, frequencies, 1.5)
    assert cos.dtype == sin.dtype == torch.float32
    angles = positions[..., None].double() * frequencies.double()
    torch.testing.assert_close(cos.double(), 1.5 * angles.cos(), atol=2e-5, rtol=0)
    torch.testing.assert_close(sin.double(), 1.5 * angles.sin(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_the_distance_only(layout: RopeLayout) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    frequencies, _ = rotary_frequencies(8, 10000.0)

    def score(i: int, j: int) -> float:
        tables = [rotary_cos_sin(torch.tensor([[p]]), frequencies) for p in (i, j)]
        return (apply_rotary(q, *tables[0], layout) * apply_rotary(k, *tables[1], layout)).sum().item()

    assert abs(score(7, 3) - score(104, 100)) < 1e-5
    assert abs(score(7, 3) - score(8, 3)) > 1e-4
