"""The turn against products of complex numbers, and the scalings against what they are known to keep and to stretch."""

import numpy as np
import pytest

from llama.presets import preset
from pipelines.explain.rope import UNSCALED, compute


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3.1-8b", "qwen3-0.6b"])
def test_the_vector_is_turned_as_by_complex_numbers(name: str) -> None:
    config = preset(name)
    rope = compute(name, config)
    half = len(rope.before_D) // 2
    kind = config.rope_scaling.kind if config.rope_scaling else UNSCALED
    numbers = rope.before_D[:half] + 1j * rope.before_D[half:]
    for position in (0, 1, 64, 127):
        after = numbers * np.exp(1j * position * rope.frequencies_P[kind])
        np.testing.assert_allclose(rope.after_LD[position], np.concatenate((after.real, after.imag)), atol=2e-5)


def test_neighbours_turn_together_in_the_interleaved_layout() -> None:
    config = preset("llama-3-8b", rope_layout="interleaved")
    rope = compute("interleaved", config)
    numbers = rope.before_D[0::2] + 1j * rope.before_D[1::2]
    after = numbers * np.exp(64j * rope.frequencies_P[UNSCALED])
    np.testing.assert_allclose(rope.after_LD[64, 0::2], after.real, atol=2e-5)
    np.testing.assert_allclose(rope.after_LD[64, 1::2], after.imag, atol=2e-5)


def test_what_the_scalings_keep_and_stretch() -> None:
    rope = compute("llama-3.1-8b", preset("llama-3.1-8b"))
    dim = len(rope.before_D)
    plain = 500000.0 ** (-2 * np.arange(dim // 2) / dim)
    found = {kind: frequencies / plain for kind, frequencies in rope.frequencies_P.items()}
    assert (rope.factor, rope.original) == (8.0, 8192)
    np.testing.assert_allclose(found[UNSCALED], 1, rtol=1e-6)
    np.testing.assert_allclose(found["linear"], 1 / 8, rtol=1e-6)
    pairs = np.arange(dim // 2)
    # A base stretched by s^(D/(D−2)) divides pair i by s^(2i/(D−2)).
    np.testing.assert_allclose(found["ntk"], 8.0 ** (-2 * pairs / (dim - 2)), rtol=1e-5)
    np.testing.assert_allclose(found["dynamic_ntk"], (8.0 * 8 - 7) ** (-2 * pairs / (dim - 2)), rtol=1e-5)
    turns = 8192 * plain / (2 * np.pi)
    for kind, kept, stretched in (("yarn", 33, 0.9), ("llama3", 4, 1)):
        np.testing.assert_allclose(found[kind][turns > kept], 1, rtol=1e-5)
        np.testing.assert_allclose(found[kind][turns < stretched * 0.9], 1 / 8, rtol=1e-5)
        assert (np.diff(found[kind]) <= 1e-6).all()
