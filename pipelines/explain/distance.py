"""Attention against distance: what each kind of position makes of the same content.

Legend: B sequences, L queries, S keys, H heads, D head dimension.

Every sequence is one token over and over, and `wk` is `wq`: query and key have the same content everywhere, and what
changes with the distance is the position's doing alone. All weights are the start values of one seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from torch import Tensor

from llama.attention import Scoring, attend_visible, visible_keys
from llama.config import ModelConfig, Position
from llama.model import Transformer
from pipelines.explain.registry import Explanation, Options
from pipelines.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LENGTH, _DIM, _HEADS, _TOKENS = 128, 256, 8, 16
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)))


@dataclass(frozen=True)
class ByDistance:
    """Of one kind of position, by distance in tokens from 0."""

    scores: np.ndarray
    """`[L]`: mean over tokens, heads and every query with a key at that distance."""
    head_scores: np.ndarray
    """`[H, L]`: the same of each head."""
    weights: np.ndarray
    """`[L]`: of the last query, after the softmax; mean over tokens and heads."""


@dataclass(frozen=True)
class Distances:
    tokens: int
    """Sequences that are averaged over."""
    positions: dict[str, ByDistance]
    """By `ModelConfig.position`."""


class _Recorder:
    """An `Attend` that keeps scores and weights."""

    scores_BHLS: Tensor
    weights_BHLS: Tensor

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, scoring: Scoring) -> Tensor:
        q_BHLD, k_BHSD = q_BLHD.transpose(1, 2), k_BLGD.transpose(1, 2)
        places = torch.arange(q_BHLD.shape[2])
        bias = None if scoring.bias is None else scoring.bias(places, places)
        self.scores_BHLS = q_BHLD @ k_BHSD.transpose(-1, -2) * scoring.scale + (0 if bias is None else bias)
        # Each key's value is one dimension of its own, so the weighted sum of the values is the weights.
        identity = torch.eye(len(places)).expand(*k_BHSD.shape[:2], -1, -1)
        visible = visible_keys(places, places, scoring.window)[None, None]
        self.weights_BHLS = attend_visible(q_BHLD, k_BHSD, identity, visible, scoring, bias)
        return torch.zeros_like(q_BLHD)


@torch.no_grad()
def measure(position: Position, seed: int = 0) -> ByDistance:
    config = ModelConfig(
        vocab_size=_TOKENS,
        dim=_DIM,
        num_layers=1,
        num_heads=_HEADS,
        max_seq_len=_LENGTH,
        position=position,
        activation="relu",
        hidden_dim=8,
    )
    model = Transformer(config)
    model.init_weights(seed)
    model.get_parameter("layers.0.attention.wk.weight").copy_(model.get_parameter("layers.0.attention.wq.weight"))
    recorder = _Recorder()
    model(torch.arange(_TOKENS)[:, None].expand(-1, _LENGTH), attend=recorder)
    scores_HLS, weights_HLS = recorder.scores_BHLS.mean(0).double(), recorder.weights_BHLS.mean(0).double()
    head_scores = torch.stack(
        [scores_HLS.diagonal(-distance, dim1=-2, dim2=-1).mean(-1) for distance in range(_LENGTH)], dim=-1
    )
    return ByDistance(head_scores.mean(0).numpy(), head_scores.numpy(), weights_HLS[:, -1].flip(-1).mean(0).numpy())


def compute() -> Distances:
    return Distances(_TOKENS, {position: measure(position) for position in get_args(Position)})


def draw(found: Distances) -> Figure:
    figure = new_figure(10, 9.5)
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 1.35))
    for place, (name, by) in enumerate(found.positions.items()):
        axes = figure.add_subplot(grid[place // 3, place % 3])
        axes.plot(by.head_scores.T, color="tab:gray", linewidth=0.7, alpha=0.6)
        axes.plot(by.scores, color="tab:blue", linewidth=2)
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("distance (tokens)", fontsize=9)
        if place % 3 == 0:
            axes.set_ylabel("score before the softmax", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    from matplotlib.lines import Line2D

    heads = [Line2D([], [], color="tab:gray", linewidth=0.7), Line2D([], [], color="tab:blue", linewidth=2)]
    axes = figure.add_subplot(grid[2, :])
    for dash, (name, by) in zip(_DASHES, found.positions.items(), strict=True):
        axes.semilogy(by.weights, linestyle=dash, linewidth=1.8, label=name)
    axes.set(xlabel="distance (tokens)", ylabel="weight after the softmax", xlim=(0, len(by.weights) - 1))
    axes.set_title("attention weight of the last query, mean over tokens and heads", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, ncols=3, loc="upper right")
    figure.legend(heads, ["one head", "mean over the heads"], loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(
        f"Score and weight against distance, at the start values\n"
        f"query and key of equal content, mean over {found.tokens} tokens and all pairs at a distance",
        fontsize=12,
    )
    return figure


def explain(options: Options) -> Explanation:
    found = compute()
    near = {name: by.weights[:16].sum() for name, by in found.positions.items()}
    lines = (
        f"Share of the last query's attention on the nearest 16 of {_LENGTH} tokens: "
        + ", ".join(f"{name} {share:.1%}" for name, share in near.items())
        + ".",
        "alibi subtracts slope · distance, a slope for each head; rope and sinusoidal positions favour near keys of "
        "equal content, in waves; none sees no order.",
        "learned and t5 start from random numbers: learned ones favour only the very same position, t5's are one step "
        "for each bucket of distances. Both have to learn the rest.",
    )
    return Explanation(found, lines, {"distance": lambda: draw(found)})
