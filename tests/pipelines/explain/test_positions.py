"""The tables that are drawn, against the papers' formulas in float64."""

import numpy as np

from pipelines.explain.positions import compute


def test_tables_and_wavelengths() -> None:
    length, dim = 50, 12
    found = compute(length, dim)
    for position in range(length):
        for pair in range(dim // 2):
            angle = position / 10000 ** (2 * pair / dim)
            np.testing.assert_allclose(found.sinusoidal_LD[position, 2 * pair], np.sin(angle), atol=1e-6)
            np.testing.assert_allclose(found.sinusoidal_LD[position, 2 * pair + 1], np.cos(angle), atol=1e-6)
            np.testing.assert_allclose(found.cos_LP[position, pair], np.cos(angle), atol=1e-5)
            np.testing.assert_allclose(found.sin_LP[position, pair], np.sin(angle), atol=1e-5)
    np.testing.assert_allclose(found.wavelengths_P, 2 * np.pi * 10000 ** (np.arange(dim // 2) * 2 / dim), rtol=1e-6)
