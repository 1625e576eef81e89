"""Tables of positions: the sinusoidal one that is added to embeddings, and rotary cosines and sines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from llama.position import sinusoidal
from llama.rope import rotary_cos_sin, rotary_frequencies
from pipelines.explain.registry import Explanation, Options
from pipelines.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LENGTH, _DIM = 128, 64
_THETA = 10000.0
_SHOWN_PAIRS = (0, 4, 8, 12)


@dataclass(frozen=True)
class Positions:
    """Legend: L positions from 0, D dimensions, P = D/2 pairs."""

    sinusoidal_LD: np.ndarray
    cos_LP: np.ndarray
    sin_LP: np.ndarray
    wavelengths_P: np.ndarray
    """Positions until a pair of either table repeats."""


def compute(length: int = _LENGTH, dim: int = _DIM) -> Positions:
    positions = torch.arange(length)
    frequencies, factor = rotary_frequencies(dim, _THETA)
    cos, sin = rotary_cos_sin(positions, frequencies, factor)
    return Positions(
        sinusoidal(positions, dim).double().numpy(),
        cos.double().numpy(),
        sin.double().numpy(),
        2 * math.pi / frequencies.double().numpy(),
    )


def draw(found: Positions) -> Figure:
    length, dim = found.sinusoidal_LD.shape
    figure = new_figure(10, 8.5)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1), squeeze=False).flat
    tables = upper.subplots(1, 3, width_ratios=(2, 1, 1))
    for axes, table, title, across in (
        (tables[0], found.sinusoidal_LD, "sinusoidal, added to the embedding", "dimension"),
        (tables[1], found.cos_LP, "rotary: cosine", "pair of dimensions"),
        (tables[2], found.sin_LP, "rotary: sine", "pair of dimensions"),
    ):
        image = axes.imshow(table, cmap="coolwarm", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=11)
        axes.set(xlabel=across, ylabel="position (tokens)")
    upper.colorbar(image, ax=tables, label="value")
    waves, wavelengths = lower.subplots(1, 2)
    for pair in _SHOWN_PAIRS:
        waves.plot(found.sin_LP[:, pair], label=f"pair {pair}: {found.wavelengths_P[pair]:.3g} tokens")
    waves.set(xlabel="position (tokens)", ylabel="sine", xlim=(0, length - 1), ylim=(-1.1, 1.75), yticks=(-1, 0, 1))
    waves.set_title("sine of four pairs, and their wavelengths", fontsize=11)
    waves.legend(fontsize=9, loc="upper center", ncols=2)
    wavelengths.semilogy(found.wavelengths_P, marker="o", markersize=3)
    wavelengths.axhline(length, color="tab:gray", linestyle="--", label=f"the {length} positions drawn")
    wavelengths.set(xlabel="pair of dimensions", ylabel="wavelength (tokens)")
    wavelengths.set_title("wavelength of each pair, 2π·θ^(2i/D)", fontsize=11)
    wavelengths.legend(fontsize=9, loc="upper left")
    for axes in (waves, wavelengths):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Positions as waves: {dim} dimensions, θ = {_THETA:,.0f}")
    return figure


def explain(options: Options) -> Explanation:
    found = compute()
    turned = int((found.wavelengths_P <= _LENGTH).sum())
    lines = (
        "Both tables hold the same waves: sinusoidal positions are added to the embedding once, as sine and cosine in "
        "turn; rotary ones turn each pair of a query and a key by the angle.",
        f"Pair 0 repeats after {found.wavelengths_P[0]:.1f} tokens, the last after {found.wavelengths_P[-1]:,.0f}.",
        f"{turned} of {_DIM // 2} pairs go round at least once in {_LENGTH} tokens: the fast ones tell neighbours "
        "apart, the slow ones far places.",
    )
    return Explanation(found, lines, {"positions": lambda: draw(found)})
