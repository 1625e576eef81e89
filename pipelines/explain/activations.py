"""Activations and their gradients, by the library's own modules and autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from llama.activation import build_activation, gated_product
from llama.config import GATED, Activation
from pipelines.explain.registry import Explanation, Options
from pipelines.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BETAS = (0.5, 1.0, 2.0, 8.0)
_REACH = 5.0
_GATED_SHOWN: Activation = "swiglu"
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Curve:
    """A function and its derivative at the points of `Activations.x`."""

    value: np.ndarray
    gradient: np.ndarray


@dataclass(frozen=True)
class Activations:
    """Curves over `x` `[points]`."""

    x: np.ndarray
    curves: dict[str, Curve]
    """By `ModelConfig.activation`; of a gated kind the gate's."""
    swish: dict[float, Curve]
    """By β."""
    gated: np.ndarray
    """swiglu's σ(gate) ⊙ up: `[up, gate]`, both over `x`."""


def curve(kind: Activation, x: torch.Tensor, beta: float = 1.0) -> Curve:
    points = x.clone().requires_grad_()
    value = build_activation(kind, beta)(points)
    (gradient,) = torch.autograd.grad(value.sum(), points)
    return Curve(value.detach().numpy(), gradient.numpy())


def compute(points: int = 401) -> Activations:
    """Every activation of `llama.config.Activation`, float64."""
    x = torch.linspace(-_REACH, _REACH, points, dtype=torch.float64)
    up, gate = torch.meshgrid(x, x, indexing="ij")
    return Activations(
        x.numpy(),
        {kind: curve(kind, x) for kind in get_args(Activation)},
        {beta: curve("swish", x, beta) for beta in BETAS},
        gated_product(build_activation(_GATED_SHOWN), gate, up).numpy(),
    )


def same_curves(curves: dict[str, Curve]) -> list[list[str]]:
    """The names, those of equal curves, but for rounding, together."""
    groups: list[list[str]] = []
    for name, each in curves.items():
        for group in groups:
            if np.allclose(curves[group[0]].value, each.value, rtol=0, atol=1e-9):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def draw(found: Activations) -> Figure:
    figure = new_figure(10, 8.5)
    (values, gradients), (swish, gated) = figure.subplots(2, 2)
    for dash, group in zip(_DASHES, same_curves(found.curves), strict=False):
        label = ", ".join(f"{name} (gate)" if name in GATED else name for name in group)
        values.plot(found.x, found.curves[group[0]].value, linestyle=dash, linewidth=1.8, label=label)
        gradients.plot(found.x, found.curves[group[0]].gradient, linestyle=dash, linewidth=1.8)
    for dash, (beta, each) in zip(_DASHES, found.swish.items(), strict=False):
        swish.plot(found.x, each.value, linestyle=dash, linewidth=1.8, label=f"β = {beta:g}")
    _label(values, "Activations (gelu_tanh lies on gelu)", "σ(x)", (-1.2, 3.6))
    _label(gradients, "Their gradients, by autograd", "dσ/dx", (-0.2, 1.2))
    _label(swish, "swish: x·sigmoid(βx)", "σ(x)", (-1.2, 3.6))
    values.legend(fontsize=8, loc="upper left")
    swish.legend(fontsize=9, loc="upper left")
    limit = float(np.abs(found.gated).max())
    edges = (-_REACH, _REACH, -_REACH, _REACH)
    image = gated.imshow(
        found.gated, origin="lower", extent=edges, cmap="coolwarm", vmin=-limit, vmax=limit, aspect="auto"
    )
    gated.set(xlabel="gate, w1·x", ylabel="up, w3·x")
    gated.set_title(f"{_GATED_SHOWN}: σ(w1·x) ⊙ w3·x", fontsize=11)
    figure.colorbar(image, ax=gated, label="product")
    figure.suptitle("Activations of the feed-forward")
    return figure


def _label(axes: Axes, title: str, ylabel: str, ylim: tuple[float, float]) -> None:
    axes.set(xlabel="x", ylabel=ylabel, xlim=(-_REACH, _REACH), ylim=ylim)
    axes.set_title(title, fontsize=11)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.grid(alpha=0.3)


def explain(options: Options) -> Explanation:
    found = compute()
    apart = float(np.abs(found.curves["gelu"].value - found.curves["gelu_tanh"].value).max())
    lowest = int(found.curves["swiglu"].value.argmin())
    lines = (
        f"{len(found.curves)} names, {len(same_curves(found.curves))} curves: a gated kind puts its curve on the gate "
        "and multiplies by a second projection.",
        "relu's gradient is 0 for every negative x: such a unit learns nothing. gelu and swish keep one there.",
        f"gelu_tanh is within {apart:.1e} of gelu.",
        f"swish dips to {found.curves['swiglu'].value[lowest]:.2f} at x = {found.x[lowest]:.2f}; with growing β it "
        "nears relu.",
    )
    return Explanation(found, lines, {"activations": lambda: draw(found)})
