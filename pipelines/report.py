"""What a run amounts to: its figures in one place, and its pictures.

{run}/plots/loss.png            training loss over tokens, with the held-out loss and the unigram's beside it
{run}/plots/expert_load.png     every expert's share of the tokens over the run, a strip per layer
{run}/plots/data.png            what became of the documents (pipelines/data_report.py)
{run}/data_report.json          the same in figures, with examples
{run}/summary.json
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.storage import Artifact, Store
from pipelines.data_report import JSON_FILE, PICTURE_FILE, in_one_line
from pipelines.figures import new_figure, own_style, png
from pipelines.graph import StageResult
from pipelines.metrics import MetricsReader
from pipelines.pretrain import METRICS
from pipelines.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PLOTS = "plots"
_QUARANTINE = "quarantine"  # of ingest's files


@dataclass(frozen=True)
class RunSummary:
    """A run's figures; None where the stage was not part of it. Rates are tokens per second, times seconds."""

    run_id: str
    seconds: float
    stages: dict[str, str]
    """State of each stage, with its seconds."""
    data: str | None = None
    """What became of the documents, in a line."""
    quarantine: str | None = None
    """Where the records that could not be read are listed, if there are any."""
    parameters: int | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    resumed_step: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    unigram_bits_per_byte: float | None = None
    zstd_bits_per_byte: float | None = None
    samples: tuple[dict[str, str], ...] = ()
    """Prompts and the model's continuations."""
    requests: int | None = None
    predicted_cached_tokens: int | None = None
    cached_tokens: int | None = None
    url: str | None = None
    plots: tuple[str, ...] = ()
    model: str | None = None
    """Where the exported Hugging Face directory lies."""
    architecture: str | None = None
    """The class of transformers that reads it."""


def summarise(run: Run, results: Mapping[str, StageResult], seconds: float) -> RunSummary:
    """Draws the pictures, collects the figures, writes both into the run's folder."""
    metadata: dict[str, Any] = {name: result.metadata for name, result in results.items()}
    data, quarantine, data_plots = _copy_data_report(run.directory, results)
    train, evaluation, deploy = (metadata.get(name, {}) for name in ("pretrain", "evaluate", "deploy"))
    summary = RunSummary(
        run_id=run.id,
        seconds=round(seconds, 1),
        stages={
            name: "skipped" if result.state == "skipped" else f"{result.seconds:.1f} s"
            for name, result in results.items()
        },
        data=data,
        quarantine=quarantine,
        **{key: train.get(key) for key in ("parameters", "tokens", "tokens_per_second", "resumed_step")},
        **{
            key: evaluation.get(key)
            for key in ("loss", "perplexity", "bits_per_byte", "unigram_bits_per_byte", "zstd_bits_per_byte")
        },
        samples=tuple(evaluation.get("samples", ())),
        **{key: deploy.get(key) for key in ("requests", "predicted_cached_tokens", "cached_tokens")},
        url=deploy.get("url") if deploy.get("kept") else None,
        plots=(*data_plots, *_draw(run.directory, results, evaluation)),
        model=_exported(results),
        architecture=metadata.get("export", {}).get("architecture"),
    )
    run.directory.write_json("summary.json", asdict(summary))
    return summary


def _exported(results: Mapping[str, StageResult]) -> str | None:
    artifact = results["export"].artifact if "export" in results else None
    if artifact is None:
        return None
    files = artifact.files
    return str(files.local_path() or files.uri)


def _copy_data_report(run: Store, results: Mapping[str, StageResult]) -> tuple[str | None, str | None, list[str]]:
    """The report on the data in a line, where what could not be read is listed, and where the picture now lies; also if
    the stages were skipped."""
    ingest, shards = (results[name].artifact if name in results else None for name in ("ingest", "shards"))
    if ingest is None or shards is None:
        return None, None, []
    picture = f"{_PLOTS}/data.png"
    run.write_bytes(JSON_FILE, shards.files.read_bytes(JSON_FILE))
    run.write_bytes(picture, shards.files.read_bytes(PICTURE_FILE))
    report = run.read_json(JSON_FILE)
    quarantine = _shown(ingest.files, _QUARANTINE) if report["quarantined"]["records"] else None
    return in_one_line(report), quarantine, [_shown(run, picture)]


def _draw(run: Store, results: Mapping[str, StageResult], evaluation: Mapping[str, Any]) -> list[str]:
    artifact: Artifact | None = results["pretrain"].artifact if "pretrain" in results else None
    if artifact is None:
        return []
    reader = MetricsReader(artifact.store.child(METRICS))
    reader.poll()
    curve = reader.steps()
    if not curve:
        return []
    with own_style():
        pictures = {f"{_PLOTS}/loss.png": png(draw_loss(curve, evaluation))}
        if curve[0]["expert_load"]:
            pictures[f"{_PLOTS}/expert_load.png"] = png(draw_expert_load(curve))
    for path, picture in pictures.items():
        run.write_bytes(path, picture)
    return [_shown(run, path) for path in pictures]


def _shown(store: Store, path: str) -> str:
    return str(store.local_path(path) or store.child(path).uri)


def draw_loss(curve: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> Figure:
    """Training loss in nats per token, with horizontal lines for what was measured on held-out text."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    losses = [math.nan if step["loss"] is None else step["loss"] for step in curve]  # a gap where it was not finite
    axes.plot([step["tokens"] for step in curve], losses, label="training")
    if evaluation.get("loss"):
        axes.axhline(evaluation["loss"], color="tab:green", linestyle="--", label=f"held out {evaluation['loss']:.2f}")
        nats_per_bit_per_byte = evaluation["loss"] / evaluation["bits_per_byte"]
        unigram = evaluation["unigram_bits_per_byte"] * nats_per_bit_per_byte
        axes.axhline(unigram, color="tab:gray", linestyle=":", label=f"unigram, held out {unigram:.2f}")
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_expert_load(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """A strip per MoE layer: experts down, training across, colour is the share of (token, choice) pairs."""
    layers = list(curve[0]["expert_load"])
    experts = len(curve[0]["expert_load"][layers[0]])
    figure = new_figure(8, 1.2 + 0.28 * len(layers) * max(experts, 3))
    grid = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    edges = [0, *(step["step"] for step in curve)]
    mesh = None
    for axes, layer in zip(grid, layers, strict=True):
        shares = [step["expert_load"][layer] for step in curve]
        mesh = axes.pcolormesh(
            edges,
            [expert - 0.5 for expert in range(experts + 1)],
            list(zip(*shares, strict=True)),
            vmin=0,
            vmax=2 / experts,
            cmap="coolwarm",
        )
        axes.set(ylabel=f"layer {layer}", yticks=range(experts))
        axes.invert_yaxis()
    grid[0].set_title(f"Share of tokens by expert ({1 / experts:.2f} is balanced)")
    grid[-1].set_xlabel("step")
    assert mesh is not None
    figure.colorbar(mesh, ax=list(grid))
    return figure
