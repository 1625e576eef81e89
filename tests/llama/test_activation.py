"""Activations against float64 formulas written from their papers."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from llama.activation import build_activation
from llama.config import Activation

KINDS = get_args(Activation)
BETA = 1.7


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


FORMULAS: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "gelu": gelu,
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "swish": lambda x: x * sigmoid(BETA * x),
    "swish_learned": lambda x: x * sigmoid(BETA * x),
    "glu": sigmoid,
    "reglu": lambda x: max(x, 0.0),
    "geglu": gelu,
    "swiglu": lambda x: x * sigmoid(x),
}


def apply(kind: str, x: Tensor) -> Tensor:
    """`kind` in float64, element by element."""
    return torch.tensor([FORMULAS[kind](value) for value in x.flatten().tolist()], dtype=torch.float64).view(x.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_equal_their_formulas(kind: Activation) -> None:
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    activation = build_activation(kind, BETA).double()
    # A β that is trained starts as an fp32 number.
    tolerance = 1e-6 if kind == "swish_learned" else 1e-12
    torch.testing.assert_close(activation(x), apply(kind, x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_half_types_stay_half_beside_fp32_parameters(kind: Activation) -> None:
    x = torch.linspace(-6, 6, 41).bfloat16()
    actual = build_activation(kind, BETA)(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), apply(kind, x), atol=2**-8, rtol=2**-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: Activation) -> None:
    torch.manual_seed(0)
    activation = build_activation(kind, BETA).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in activation.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(activation, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *activation.parameters()))


def test_only_a_learned_swish_has_a_parameter() -> None:
    for kind in KINDS:
        shapes = {name: tuple(p.shape) for name, p in build_activation(kind, BETA).named_parameters()}
        assert shapes == ({"beta": (1,)} if kind == "swish_learned" else {})


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.activation='mish'"):
        build_activation("mish")  # type: ignore[arg-type]
