"""The norms that are drawn, against float64 formulas."""

from typing import get_args

import numpy as np

from llama.config import Norm
from pipelines.explain.norms import INPUT, example, normalise

EPS = 1e-5


def expected(kind: str, x: np.ndarray) -> np.ndarray:
    """`[N, M]`, at weight 1 and bias 0."""
    if kind == "rmsnorm":
        return x / np.sqrt((x**2).mean(1, keepdims=True) + EPS)
    if kind == "batchnorm":
        return (x - x.mean(0)) / np.sqrt(x.var(0) + EPS)
    centred = x - x.mean(1, keepdims=True)
    if kind == "layernorm":
        return centred / np.sqrt(x.var(1, keepdims=True) + EPS)
    assert kind == "layernorm_bessel"
    return centred / (x.std(1, ddof=1, keepdims=True) + EPS)


def test_every_norm_is_the_formula() -> None:
    found = normalise(example())
    x = example().double().flatten(0, 1).numpy()
    assert list(found.outputs_NM) == [INPUT, *get_args(Norm)]
    np.testing.assert_array_equal(found.outputs_NM[INPUT], x)
    for kind in get_args(Norm):
        np.testing.assert_allclose(found.outputs_NM[kind], expected(kind, x), atol=2e-5)


def test_the_statistics_are_by_token_and_by_dimension() -> None:
    found = normalise(example())
    x = example().double().numpy()
    tokens = x.reshape(-1, x.shape[-1])
    for place, token in enumerate(tokens):
        assert np.isclose(found.means[INPUT]["token"][place], sum(token) / len(token))
    assert found.means[INPUT]["dimension"].shape == (x.shape[-1],)
    assert np.isclose(
        found.deviations[INPUT]["dimension"][7], np.sqrt(np.mean((tokens[:, 7] - tokens[:, 7].mean()) ** 2))
    )
    np.testing.assert_allclose(found.deviations["layernorm"]["token"], 1, atol=1e-4)
    np.testing.assert_allclose(found.means["layernorm"]["token"], 0, atol=1e-5)


def test_the_example_shows_what_the_picture_is_about() -> None:
    tokens = example().flatten(0, 1).double().numpy()
    sizes = np.sqrt((tokens**2).mean(1))
    assert sizes[-1] > 5 * sizes[0]
    assert np.abs(tokens).mean(0).argmax() == 7
