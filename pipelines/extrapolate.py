"""The extrapolate stage: how a model that was trained at one length predicts beyond it.

    extrapolation.json    the loss by position on held-out rows that are several times as long as those of training
    extrapolation.png     the same as a picture

A target's position is how many tokens stand before it in its row, with packed documents in its document: what the model
has as context, and where its positional encoding is. A model with rotary positions is measured as it was trained, and
under each scaling of its frequencies (llama/rope.py) with the same weights:

- linear, ntk, yarn, llama3 stretch by `factor`, the whole row's share, also at positions that need no stretch;
- dynamic_ntk stretches the targets of the k-th multiple of the training length by k: a pass for each multiple, as a
  model would that reads up to there. That is Hugging Face's rule, factor · length / original − (factor − 1), with a
  factor of 1; with theirs above 1 the stretch is more than the length calls for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, get_args

import numpy as np
import torch
from pydantic import Field

from cluster.artifact import Artifact
from cluster.placement import WorkerNeeds, run_on_cluster
from cluster.storage import JSON
from llama.attention import document_positions
from llama.config import ModelConfig, RopeScaling, RopeScalingKind
from llama.losses import IGNORE_INDEX
from llama.training.batch import Batch
from pipelines.figures import new_figure, own_style, png
from pipelines.finetune import Trained
from pipelines.loader import held_out_batches
from pipelines.section import Positive, Section
from pipelines.shard_set import ShardSet
from pipelines.sources import DataError
from pipelines.stage import Stage, StageContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama.model import Transformer

JSON_FILE = "extrapolation.json"
PICTURE_FILE = "extrapolation.png"

_UNDER = "rope under "
"""In the names of curves: before the scaling that a model was put under which was trained without."""
_CACHE_BYTES = 1 << 30
_POINTS = 512
"""Of a curve, at most about."""
_WINDOWS = 32
"""Of the picture: a curve is smoothed over the width of one of them."""


class ExtrapolateConfig(Section):
    factor: Annotated[int, Field(ge=2)] = 8
    """Rows are this many times as long as those of training."""
    rows: Positive = 64
    """Held-out rows at most, evenly spread over the validation split."""
    scalings: tuple[RopeScalingKind, ...] | None = None
    """Of the rotary frequencies, each measured; None is all of them for a model with rotary positions that was trained
    without, none for others."""
    batch_size: Positive = 4
    """Rows in one forward pass; positions that bias the scores (alibi, t5) hold rows · heads · length² of them."""


@dataclass(frozen=True)
class ExtrapolateTask:
    """What the measuring process is sent."""

    trained: Trained
    train_seq_len: int
    config: ExtrapolateConfig
    shards: Artifact
    device: str
    threads: int


def extrapolate_stage(
    model: ModelConfig,
    train_seq_len: int,
    config: ExtrapolateConfig,
    needs: WorkerNeeds,
    wait_for_nodes: float,
    shards: str = "shards",
) -> Stage:
    """The stage `extrapolate`, downstream of `shards` and `pretrain`; one process of these needs.

    Args:
        shards: name of the stage whose rows are of factor · train_seq_len tokens.

    Raises:
        ValueError: the model has no positions that far, or a scaling does not fit it; names field, value and remedy.
    """
    _check_positions(model, train_seq_len, config.factor)
    for scaling in scalings_of(model, train_seq_len, config).values():
        replace(model, rope_scaling=scaling)  # refuses what does not fit
    return Stage(
        "extrapolate",
        1,
        {"model": model, "train_seq_len": train_seq_len, "extrapolate": config},
        partial(_extrapolate, model, train_seq_len, config, needs, wait_for_nodes),
        (shards, "pretrain"),
    )


def _check_positions(model: ModelConfig, train_seq_len: int, factor: int) -> None:
    needed = factor * train_seq_len
    if model.position == "learned" and model.max_seq_len < needed:
        raise ValueError(
            f"model.max_seq_len={model.max_seq_len} positions are learned, and extrapolate.factor={factor} times "
            f"train.seq_len={train_seq_len} are {needed}; set model.max_seq_len={needed}"
        )


def scalings_of(model: ModelConfig, train_seq_len: int, config: ExtrapolateConfig) -> dict[str, RopeScaling]:
    """What the model is measured under besides its own positions, by the name of the curve.

    Raises:
        ValueError: `config.scalings` names some, and the model has no rotary positions, or was trained with a scaling.
    """
    plain = model.position == "rope" and model.rope_scaling is None
    if config.scalings and not plain:
        own = model.position if model.rope_scaling is None else f"rope with rope_scaling.kind={model.rope_scaling.kind}"
        raise ValueError(
            f"extrapolate.scalings={list(config.scalings)} are for a model trained with plain rope, and model.position "
            f"is {own}; leave them out"
        )
    kinds = config.scalings if config.scalings is not None else get_args(RopeScalingKind) if plain else ()
    return {f"{_UNDER}{kind}": _scaling(kind, config.factor, train_seq_len) for kind in kinds}


def _scaling(kind: RopeScalingKind, factor: int, train_seq_len: int) -> RopeScaling:
    if kind == "linear" or kind == "ntk":
        return RopeScaling(kind, float(factor))
    return RopeScaling(kind, 1.0 if kind == "dynamic_ntk" else float(factor), original_max_seq_len=train_seq_len)


def _extrapolate(
    model: ModelConfig,
    train_seq_len: int,
    config: ExtrapolateConfig,
    needs: WorkerNeeds,
    wait_for_nodes: float,
    context: StageContext,
) -> dict[str, JSON]:
    task = ExtrapolateTask(
        Trained.of(model, context.inputs["pretrain"]),
        train_seq_len,
        config,
        context.inputs["shards"],
        device="cuda" if needs.gpus else "cpu",
        threads=max(1, int(needs.cpus)),
    )
    context.emit(f"scoring held-out text at {config.factor} times the length of training")
    result = run_on_cluster(needs, extrapolate_checkpoint, task, wait_seconds=wait_for_nodes)
    return write_extrapolation(context, result)


def write_extrapolation(context: StageContext, result: dict[str, Any]) -> dict[str, JSON]:
    """Writes both files into the attempt and records them; returns the artifact's metadata."""
    with own_style():
        picture = png(draw_extrapolation(result["positions"], result["curves"], result["train_seq_len"]))
    output = context.attempt.store
    context.record(output.write_json(JSON_FILE, result), output.write_bytes(PICTURE_FILE, picture))
    return {name: value for name, value in result.items() if name not in ("positions", "curves")}


def extrapolate_checkpoint(task: ExtrapolateTask) -> dict[str, Any]:
    """What `measure` finds for the checkpoint on the shards' held-out rows. Raises DataError: none, or of another
    length."""
    torch.set_num_threads(task.threads)
    length = task.config.factor * task.train_seq_len
    with tempfile.TemporaryDirectory() as cache:
        shards = ShardSet(task.shards, cache, _CACHE_BYTES)
        if shards.seq_len != length:
            raise DataError(f"the shards have rows of {shards.seq_len} tokens, and {length} are wanted; pack such rows")
        batches = list(held_out_batches(shards, task.config.batch_size, max_rows=task.config.rows))
    if not batches:
        raise DataError(
            f"the validation split has no row of {length} tokens; raise data.validation_fraction or add text"
        )
    return measure(task.trained.load().to(task.device), batches, task.train_seq_len, task.config)


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(
    model: Transformer, batches: Sequence[Batch], train_seq_len: int, config: ExtrapolateConfig
) -> dict[str, Any]:
    """The loss by position, in nats per token: under the model's own positions, and under each scaling.

    Args:
        batches: rows of factor · train_seq_len tokens.

    Returns:
        `train_seq_len`, `factor` and `rows`; `positions`: the last position of each of at most about 512 runs of
        positions, counted from 1, and `curves`: by name, the mean loss over each run's targets; `loss_by_multiple`: by
        name, the mean loss over positions in (0, 1], (1, 2], ... (factor − 1, factor] times train_seq_len; of these
        `within`, the first, and `beyond_twice`, the mean from the third on, by `own` and the kind of scaling. None
        where there was no target.
    """
    length = config.factor * train_seq_len
    step = max(1, length // _POINTS)
    own: str = model.config.position
    if model.config.rope_scaling is not None:
        own += f", {model.config.rope_scaling.kind}"
    models = {own: model} | {
        name: _rescaled(model, scaling) for name, scaling in scalings_of(model.config, train_seq_len, config).items()
    }
    curves, by_multiple = {}, {}
    for name, each in models.items():
        sums, counts = loss_by_position(each, batches, train_seq_len)
        curves[name] = _means(sums, counts, step)
        by_multiple[name] = _means(sums, counts, train_seq_len)
    return {
        "train_seq_len": train_seq_len,
        "factor": config.factor,
        "rows": sum(len(batch.inputs) for batch in batches),
        "positions": [min(begin + step, length) for begin in range(0, length, step)],
        "curves": curves,
        "loss_by_multiple": by_multiple,
        "within": {_key(name): losses[0] for name, losses in by_multiple.items()},
        "beyond_twice": {_key(name): _mean(losses[2:]) for name, losses in by_multiple.items()},
    }


def _key(name: str) -> str:
    """Of a curve: `own`, or the scaling that the trained model was put under."""
    return name.removeprefix(_UNDER) if name.startswith(_UNDER) else "own"


def _mean(losses: Sequence[float | None]) -> float | None:
    found = [loss for loss in losses if loss is not None]
    return sum(found) / len(found) if found else None


def loss_by_position(
    model: Transformer, batches: Sequence[Batch], train_seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed −log p in nats, fp64, and number of targets by position, from 0: both `[seq]`."""
    length = batches[0].inputs.shape[1]
    sums, counts = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.int64)
    for batch in batches:
        for losses, positions in _scored(model, batch.to(model.tok_embeddings.weight.device), train_seq_len):
            sums.index_add_(0, positions.cpu(), losses.double().cpu())
            counts += torch.bincount(positions.cpu(), minlength=length)
    return sums, counts


@torch.inference_mode()
def _scored(model: Transformer, batch: Batch, train_seq_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """−log p of the batch's targets and their positions, `[targets]` each, every target once."""
    from llama.training.step import attention

    batch_size, length = batch.inputs.shape
    packed = batch.documents is not None
    if batch.documents is None:
        positions = torch.arange(length, device=batch.inputs.device).expand(batch_size, -1)
    else:
        positions = document_positions(batch.documents)
    scaling = model.config.rope_scaling
    dynamic = scaling is not None and scaling.kind == "dynamic_ntk"
    for end in range(train_seq_len, length + 1, train_seq_len) if dynamic else (length,):
        begin = end - train_seq_len if dynamic else 0
        read = slice(0, length if packed else end)
        labels = batch.labels[:, read]
        wanted = (positions[:, read] >= begin) & (positions[:, read] < end) & (labels != IGNORE_INDEX)
        losses = model.label_losses(
            batch.inputs[:, read],
            labels,
            positions=positions[:, read],
            attend=attention(labels.device)(batch.documents),
            rope_length=end,
        )
        yield losses[wanted], positions[:, read][wanted]


def _rescaled(model: Transformer, scaling: RopeScaling) -> Transformer:
    """A model of the same weights, in the same memory, under another scaling."""
    with torch.device("meta"):
        other = type(model)(replace(model.config, rope_scaling=scaling))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def _means(sums: torch.Tensor, counts: torch.Tensor, width: int) -> list[float | None]:
    """Over `width` positions at a time."""
    groups = zip(sums.split(width), counts.split(width), strict=True)
    return [float(each.sum() / count.sum()) if count.any() else None for each, count in groups]


# --- drawing --------------------------------------------------------------------------------------------------------


def draw_extrapolation(
    positions: Sequence[int],
    curves: Mapping[str, Sequence[float | None]],
    train_seq_len: int,
    title: str = "Loss by position, beyond the length of training",
) -> Figure:
    """The curves of `measure`, or of several models measured at the same positions, smoothed on either side of the
    length of training, in the legend from worst to best at the longest."""
    from matplotlib import colormaps

    figure = new_figure(10, 5.5)
    axes = figure.add_subplot()
    at = np.array(positions)
    inside = int((at <= train_seq_len).sum())
    width = max(1, len(at) // _WINDOWS)
    axes.set_prop_cycle(color=[colormaps["tab20"](shade) for shade in (*range(0, 20, 2), *range(1, 20, 2))])
    tail = max(1, len(at) // 8)
    ends, lows, highs = {}, [], []
    for name, curve in curves.items():
        values = np.array([np.nan if value is None else value for value in curve], dtype=float)
        known = values[-tail:][np.isfinite(values[-tail:])]
        ends[name] = known.mean() if known.size else -np.inf
        smooth = np.concatenate([smoothed(part, width) for part in (values[:inside], values[inside:])])
        axes.plot(at, smooth, label=name, linewidth=1.4, linestyle="--" if _UNDER in name else "-")
        # The first tokens of a row have nothing before them, and would take up most of the picture.
        shown = smooth[min(width, inside - 1) :]
        if np.isfinite(shown).any():
            lows.append(np.nanmin(shown))
            highs.append(np.nanmax(shown))
    handles = {line.get_label(): line for line in axes.get_lines()}
    ranked = [handles[name] for name in sorted(ends, key=lambda name: -ends[name])]
    boundary = axes.axvline(train_seq_len, color="black", linewidth=1, label=f"length of training ({train_seq_len:,})")
    multiples = range(1, -(-int(at[-1]) // train_seq_len) + 1)
    every = -(-len(multiples) // 16)
    ticks = [multiple for multiple in multiples if multiple == 1 or multiple % every == 0]
    axes.set_xticks([multiple * train_seq_len for multiple in ticks], [f"{n * train_seq_len:,}\n{n}×" for n in ticks])
    if lows:
        room = 0.05 * (max(highs) - min(lows)) + 1e-3
        axes.set_ylim(min(lows) - room, max(highs) + room)
    axes.set(
        xlabel="position (tokens, and multiples of the length of training)",
        ylabel="cross-entropy (nats per token, smoothed)",
        title=title,
        xlim=(0, at[-1]),
    )
    axes.grid(alpha=0.3)
    axes.legend(handles=[*ranked, boundary], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over the `width` values around each, over fewer at the ends; of NaN none counts."""
    found = np.isfinite(values)
    ones = np.ones(width)

    def around(each: np.ndarray) -> np.ndarray:
        return np.convolve(each, ones)[(width - 1) // 2 :][: len(values)]

    if not len(values):
        return values
    counts = around(found.astype(float))
    return np.divide(around(np.where(found, values, 0.0)), counts, out=np.full(len(values), np.nan), where=counts > 0)
