"""Rotary positions: what the turn does to a vector, and the frequencies under every scaling.

Legend: L positions, D dimensions of a head, P = D/2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from llama.config import ModelConfig, RopeLayout, RopeScaling, RopeScalingKind
from llama.rope import apply_rotary, rotary_cos_sin, rotary_frequencies
from pipelines.explain.presets import chosen_preset
from pipelines.explain.registry import Explanation, Options
from pipelines.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PRESET = "llama-3.1-8b"
_FACTOR = 8.0
_LENGTH, _POSITION = 128, 64
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)))
UNSCALED = "none"


@dataclass(frozen=True)
class Rope:
    """One head's vector at every position from 0, and the frequencies."""

    preset: str
    layout: RopeLayout
    theta: float
    before_D: np.ndarray
    after_LD: np.ndarray
    factor: float
    """How many times longer than `original` the scalings make a sequence."""
    original: int
    """Tokens trained on."""
    frequencies_P: dict[str, np.ndarray]
    """Radians per position, by the scaling's kind, `none` first."""


def turned(vector_D: torch.Tensor, length: int, config: ModelConfig) -> torch.Tensor:
    """The same vector at positions 0 to length − 1, turned as the model turns it: `[L, D]`."""
    frequencies, factor = rotary_frequencies(vector_D.shape[0], config.rope_theta, config.rope_scaling)
    cos_LP, sin_LP = rotary_cos_sin(torch.arange(length), frequencies, factor)
    x_BLHD = vector_D.expand(1, length, 1, -1).contiguous()
    return apply_rotary(x_BLHD, cos_LP[None], sin_LP[None], config.rope_layout)[0, :, 0]


def scaling_of(kind: RopeScalingKind, factor: float, original: int) -> RopeScaling:
    return RopeScaling(kind, factor, original if kind in ("dynamic_ntk", "yarn", "llama3") else None)


def compute(name: str, config: ModelConfig, seed: int = 0) -> Rope:
    """On the preset's head, θ and layout; factor and original length are those of its scaling, else 8 and its own."""
    dim, own = config.resolved_head_dim, config.rope_scaling
    factor, original = (own.factor, own.original_max_seq_len) if own else (_FACTOR, None)
    original = original or config.max_seq_len
    vector_D = torch.randn(dim, generator=torch.Generator().manual_seed(seed))
    frequencies = {UNSCALED: rotary_frequencies(dim, config.rope_theta)[0]}
    for kind in get_args(RopeScalingKind):
        scaling = own if own and own.kind == kind else scaling_of(kind, factor, original)
        frequencies[kind], _ = rotary_frequencies(dim, config.rope_theta, scaling, length=round(factor * original))
    return Rope(
        name,
        config.rope_layout,
        config.rope_theta,
        vector_D.double().numpy(),
        turned(vector_D, _LENGTH, config).double().numpy(),
        factor,
        original,
        {kind: each.double().numpy() for kind, each in frequencies.items()},
    )


def draw_turn(rope: Rope) -> Figure:
    """A bar for each dimension before, after and the difference, at one position; the turned vector at all of them."""
    figure = new_figure(10, 8)
    bars, maps = figure.subfigures(1, 2, width_ratios=(1, 1.05), squeeze=False).flat
    after_D = rope.after_LD[_POSITION]
    rows = (
        ("before the turn", rope.before_D, "tab:blue"),
        (f"after the turn, at position {_POSITION}", after_D, "tab:orange"),
        ("difference, after − before", after_D - rope.before_D, "tab:purple"),
    )
    limit = 1.1 * max(np.abs(row).max() for _, row, _ in rows)
    for axes, (title, row, color) in zip(bars.subplots(3, 1, sharex=True), rows, strict=True):
        axes.bar(np.arange(len(row)), row, color=color, width=0.9)
        axes.set_title(title, fontsize=11)
        axes.set(ylabel="value", ylim=(-limit, limit), xlim=(-1, len(row)))
        axes.axhline(0, color="black", linewidth=0.6)
        axes.grid(alpha=0.3, axis="y")
    axes.set_xlabel("dimension of the head")
    upper, lower = maps.subplots(2, 1, sharex=True)
    for axes, table, title in (
        (upper, rope.after_LD, "after the turn, at every position"),
        (lower, rope.after_LD - rope.before_D, "difference, after − before"),
    ):
        reach = float(np.abs(table).max())
        image = axes.imshow(table, cmap="coolwarm", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=11)
        axes.set_ylabel("position (tokens)")
        maps.colorbar(image, ax=axes, label="value")
    lower.set_xlabel("dimension of the head")
    pairs = "i and i + D/2" if rope.layout == "half" else "2i and 2i + 1"
    figure.suptitle(
        f"RoPE of {rope.preset}: one vector of a head; dimensions {pairs} turn together, θ = {rope.theta:,.0f}"
    )
    return figure


def draw_frequencies(rope: Rope) -> Figure:
    from matplotlib.ticker import NullLocator

    figure = new_figure(10, 5.5)
    left, right = figure.subplots(1, 2)
    plain = rope.frequencies_P[UNSCALED]
    for dash, (kind, frequencies) in zip(_DASHES, rope.frequencies_P.items(), strict=True):
        label = f"{kind}, at {rope.factor * rope.original:,.0f} tokens" if kind == "dynamic_ntk" else kind
        left.semilogy(frequencies, linestyle=dash, linewidth=1.8, label=label)
        right.semilogy(frequencies / plain, linestyle=dash, linewidth=1.8, label=label)
    whole_turn = 2 * np.pi / rope.original
    left.axhline(whole_turn, color="tab:gray", linewidth=1, label=f"one turn in {rope.original:,} tokens")
    left.set(xlabel="pair of dimensions", ylabel="frequency (radians per token)")
    left.set_title("frequency of each pair", fontsize=11)
    right.set(xlabel="pair of dimensions", ylabel="share of the unscaled frequency")
    right.set_title("what each scaling leaves of it", fontsize=11)
    right.yaxis.set_minor_locator(NullLocator())
    lowest = min(float((frequencies / plain).min()) for frequencies in rope.frequencies_P.values())
    halvings = range(0, int(np.ceil(-np.log2(lowest))) + 1)
    right.set_yticks([2.0**-n for n in halvings], [f"1/{2**n}" if n else "1" for n in halvings])
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(
        f"RoPE frequencies of {rope.preset}, θ = {rope.theta:,.0f}, "
        f"stretched {rope.factor:g}× from {rope.original:,} tokens"
    )
    return figure


def explain(options: Options) -> Explanation:
    rope = compute(*chosen_preset(options.preset, _PRESET))
    turns = rope.frequencies_P[UNSCALED] * rope.original / (2 * np.pi)
    lines = (
        f"Each pair of the {len(rope.before_D)} dimensions turns by position · frequency; the length of the vector "
        "stays, so a score depends on the distance alone.",
        f"Pair 0 turns by {rope.frequencies_P[UNSCALED][0]:g} radian a token, the last by "
        f"{rope.frequencies_P[UNSCALED][-1]:.2g}; {int((turns < 1).sum())} of {len(turns)} pairs make less than one "
        f"turn in {rope.original:,} tokens.",
        "linear slows every pair alike, ntk mostly the slow ones; yarn and llama3 keep the fast, divide the slow by "
        f"{rope.factor:g} and blend between.",
    )
    return Explanation(
        rope, lines, {"rope": lambda: draw_turn(rope), "rope_frequencies": lambda: draw_frequencies(rope)}
    )
