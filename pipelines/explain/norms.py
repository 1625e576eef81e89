"""What each norm makes of the same activations.

Legend: B sequences, L tokens of one, M dimensions; N = B·L tokens in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from llama.config import Norm
from llama.norm import build_norm
from pipelines.explain.registry import Explanation, Options
from pipelines.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INPUT = "input"
_SHAPE = (4, 6, 24)
_EPS = 1e-5
_PER = {"token": 1, "dimension": 0}
"""The axis over which mean and deviation are taken, by what has one of each."""


@dataclass(frozen=True)
class Norms:
    """The input and what each norm makes of it, by the norm's name: `[N, M]`."""

    outputs_NM: dict[str, np.ndarray]
    means: dict[str, dict[str, np.ndarray]]
    """By output and then by `token`, `[N]`, or `dimension`, `[M]`."""
    deviations: dict[str, dict[str, np.ndarray]]
    """The same of population standard deviations."""


def example(seed: int = 0) -> torch.Tensor:
    """Activations `[B, L, M]` fp32 of what norms are there for: tokens of unequal size, and dimensions with an offset
    of their own, one of them large."""
    generator = torch.Generator().manual_seed(seed)
    batch, seq, dim = _SHAPE
    offsets_M = torch.randn(dim, generator=generator) + 1
    offsets_M[7] = 6.0
    sizes_BL1 = torch.logspace(-1, 1, batch * seq, base=3.0).view(batch, seq, 1)
    return (torch.randn(_SHAPE, generator=generator) + offsets_M) * sizes_BL1


def normalise(x_BLM: torch.Tensor) -> Norms:
    """Every norm of `llama.config.Norm` as it starts, in training mode: weight 1, bias 0, statistics of this batch."""
    outputs = {INPUT: x_BLM}
    for kind in get_args(Norm):
        norm = build_norm(kind, x_BLM.shape[-1], _EPS)
        norm.train()
        with torch.no_grad():
            outputs[kind] = norm(x_BLM)
    arrays = {name: output.flatten(0, 1).double().numpy() for name, output in outputs.items()}
    return Norms(
        arrays,
        {name: {per: x.mean(axis) for per, axis in _PER.items()} for name, x in arrays.items()},
        {name: {per: x.std(axis) for per, axis in _PER.items()} for name, x in arrays.items()},
    )


def draw(norms: Norms) -> Figure:
    """A column for the input and for each norm: the heat map, and below it mean and deviation of tokens and dims."""
    names = list(norms.outputs_NM)
    figure = new_figure(10, 8.5)
    rows = figure.subplots(3, len(names), height_ratios=(1.8, 1, 1), squeeze=False)
    limit = max(np.abs(norms.outputs_NM[name]).max() for name in names[1:])
    for column, name in enumerate(names):
        x_NM = norms.outputs_NM[name]
        own = np.abs(x_NM).max() if name == INPUT else limit
        image = rows[0, column].imshow(x_NM, cmap="coolwarm", vmin=-own, vmax=own, aspect="auto")
        rows[0, column].set_title(name, fontsize=10)
        rows[0, column].set_xlabel("dimension", fontsize=9)
        last = column == len(names) - 1
        if column == 0 or last:
            bar = figure.colorbar(image, ax=rows[0, column], location="left" if column == 0 else "right")
            bar.ax.tick_params(labelsize=8)
            bar.set_label("value of the input" if column == 0 else "value after each norm", fontsize=9)
        _draw_statistics(rows[1, column], norms, name, "token")
        _draw_statistics(rows[2, column], norms, name, "dimension")
    rows[0, 0].set_ylabel("token", fontsize=9)
    for row in (1, 2):
        rows[row, 0].set_ylabel("value", fontsize=9)
        low, high = zip(*(axes.get_ylim() for axes in rows[row, 1:]), strict=True)
        for column, axes in enumerate(rows[row, 1:]):
            axes.set_ylim(min(low), max(high))
            axes.tick_params(labelleft=column == 0)
    for axes in rows.flat:
        axes.tick_params(labelsize=8)
    for axes in rows[0, 1:]:
        axes.tick_params(labelleft=False)
    figure.legend(*rows[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=10)
    figure.suptitle("Norms: the same tokens before and after")
    return figure


def _draw_statistics(axes: Axes, norms: Norms, name: str, per: str) -> None:
    axes.plot(norms.means[name][per], color="tab:blue", label="mean")
    axes.plot(norms.deviations[name][per], color="tab:orange", linestyle="--", label="standard deviation")
    axes.set_xlabel(per, fontsize=9)
    axes.set_title(f"over each {per}", fontsize=9)
    axes.grid(alpha=0.3)


def explain(options: Options) -> Explanation:
    norms = normalise(example())
    spread = {name: by["token"].max() / by["token"].min() for name, by in norms.deviations.items()}
    lines = [
        f"{spread[INPUT]:.0f} times: how much larger the largest token is than the smallest before a norm.",
        "rmsnorm brings every token to one size and leaves its mean where it was in proportion.",
        "layernorm also takes the token's mean away; layernorm_bessel differs by its n−1 deviation, "
        f"{np.sqrt(1 - 1 / _SHAPE[-1]):.3f} times the size at {_SHAPE[-1]} dimensions.",
    ]
    if "batchnorm" in norms.outputs_NM:
        lines.append(
            "batchnorm works down the columns: every dimension gets mean 0 and deviation 1 over the batch, so the "
            "large one vanishes, while small tokens stay small."
        )
    return Explanation(norms, tuple(lines), {"norms": lambda: draw(norms)})
