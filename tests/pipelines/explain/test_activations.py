"""Activations and gradients that are drawn, against formulas in float64 and finite differences."""

import math
from typing import get_args

import numpy as np
import pytest

from llama.config import Activation
from pipelines.explain.activations import BETAS, compute, same_curves

FOUND = compute(points=81)
ERF = np.vectorize(math.erf)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + ERF(x / math.sqrt(2))) / 2


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def swish(x: np.ndarray, beta: float = 1.0) -> np.ndarray:
    return x * sigmoid(beta * x)


FORMULAS = {
    "relu": relu,
    "reglu": relu,
    "gelu": gelu,
    "geglu": gelu,
    "gelu_tanh": gelu_tanh,
    "swish": swish,
    "swish_learned": swish,
    "swiglu": swish,
    "glu": sigmoid,
}


@pytest.mark.parametrize("kind", get_args(Activation))
def test_curve_and_gradient(kind: str) -> None:
    formula, x, step = FORMULAS[kind], FOUND.x, 1e-5
    np.testing.assert_allclose(FOUND.curves[kind].value, formula(x), atol=1e-12)
    smooth = np.abs(x) > 2 * step if formula is relu else np.full(x.shape, True)
    slope = (formula(x + step) - formula(x - step)) / (2 * step)
    np.testing.assert_allclose(FOUND.curves[kind].gradient[smooth], slope[smooth], atol=1e-8)


def test_swish_by_its_beta() -> None:
    for beta in BETAS:
        s = sigmoid(beta * FOUND.x)
        np.testing.assert_allclose(FOUND.swish[beta].value, FOUND.x * s, atol=1e-12)
        np.testing.assert_allclose(FOUND.swish[beta].gradient, s + beta * FOUND.x * s * (1 - s), atol=1e-12)


def test_the_gated_product_has_the_gate_across() -> None:
    np.testing.assert_allclose(FOUND.gated, np.outer(FOUND.x, swish(FOUND.x)), atol=1e-12)


def test_a_gate_has_the_curve_of_the_ungated_kind() -> None:
    assert same_curves(FOUND.curves) == [
        ["relu", "reglu"],
        ["gelu", "geglu"],
        ["gelu_tanh"],
        ["swish", "swish_learned", "swiglu"],
        ["glu"],
    ]
