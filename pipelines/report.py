"""What a run amounts to: its figures in one place, and its pictures.

{run}/plots/loss.png            training and validation loss over tokens, with the held-out text's beside them
{run}/plots/learning_rate.png   learning rate and gradient norm over the steps
{run}/plots/throughput.png      tokens per second and MFU over the steps
{run}/plots/expert_load.png     every expert's share of the tokens over the run, a strip per layer
{run}/plots/data.png            what became of the documents (pipelines/data_report.py)
{run}/data_report.json          the same in figures, with examples
{run}/summary.json
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines.data_report import JSON_FILE, PICTURE_FILE, in_one_line
from pipelines.figures import new_figure, own_style, png
from pipelines.metrics import MetricsReader
from pipelines.runs import Run
from pipelines.stage import StageResult
from pipelines.training_folder import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PLOTS = "plots"
_COLUMNS = 400  # of the heat map, about
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
    val_loss: float | None = None
    """On the validation rows, after the last step."""
    resumed_step: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    unigram_bits_per_byte: float | None = None
    zstd_bits_per_byte: float | None = None
    exact_match: float | None = None
    """Of an encoder–decoder: the share of held-out targets that were answered whole."""
    token_accuracy: float | None = None
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
        **{key: train.get(key) for key in ("parameters", "tokens", "tokens_per_second", "val_loss", "resumed_step")},
        **{
            key: evaluation.get(key)
            for key in ("loss", "perplexity", "bits_per_byte", "unigram_bits_per_byte", "zstd_bits_per_byte")
        },
        **{key: evaluation.get(key) for key in ("exact_match", "token_accuracy")},
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
        figures = {
            "loss": draw_loss(curve, evaluation),
            "learning_rate": draw_learning_rate(curve),
            "throughput": draw_throughput(curve),
        }
        if curve[0]["expert_load"]:
            figures["expert_load"] = draw_expert_load(curve)
        pictures = {f"{_PLOTS}/{name}.png": png(figure) for name, figure in figures.items()}
    for path, picture in pictures.items():
        run.write_bytes(path, picture)
    return [_shown(run, path) for path in pictures]


def _shown(store: Store, path: str) -> str:
    return str(store.local_path(path) or store.child(path).uri)


def draw_loss(curve: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> Figure:
    """Loss in nats per token, with horizontal lines for what the evaluate stage measured on held-out text."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    axes.plot([step["tokens"] for step in curve], _column(curve, "loss"), label="training", linewidth=1.2)
    validated = [step for step in curve if step["val_loss"] is not None]
    if validated:
        axes.plot(
            [step["tokens"] for step in validated],
            _column(validated, "val_loss"),
            color="tab:orange",
            marker="o",
            markersize=4,
            label=f"validation, last {validated[-1]['val_loss']:.2f}",
        )
    if evaluation.get("loss"):
        axes.axhline(evaluation["loss"], color="tab:green", linestyle="--", label=f"held out {evaluation['loss']:.2f}")
        nats_per_bit_per_byte = evaluation["loss"] / evaluation["bits_per_byte"]
        unigram = evaluation["unigram_bits_per_byte"] * nats_per_bit_per_byte
        axes.axhline(unigram, color="tab:gray", linestyle=":", label=f"unigram, held out {unigram:.2f}")
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats per token)", title="Loss", xlim=(0, None))
    axes.xaxis.set_major_formatter(in_thousands)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_learning_rate(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """The learning rate, and below it the gradient's norm before clipping."""
    from matplotlib.ticker import NullFormatter

    figure = new_figure(8, 4.5)
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = [step["step"] for step in curve]
    upper.plot(steps, _column(curve, "learning_rate"))
    upper.set(ylabel="learning rate", title="Learning rate and gradient norm", ylim=(0, None))
    lower.plot(steps, _column(curve, "grad_norm"), color="tab:purple", linewidth=1)
    lower.set(xlabel="step", ylabel="gradient norm", yscale="log", xlim=(0, None))
    norms = [norm for norm in _column(curve, "grad_norm") if norm > 0]
    within_a_decade = bool(norms) and max(norms) < 10 * min(norms)
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter("{x:g}" if within_a_decade else NullFormatter())
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


def draw_throughput(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens per second since the report before, and the same as a share of the devices' peak, which is another scale
    of the one curve."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    steps, rates = [step["step"] for step in curve], _column(curve, "tokens_per_second")
    typical = median(rates)
    axes.plot(steps, rates, linewidth=1.2, label="since the report before")
    axes.axhline(typical, color="tab:gray", linestyle="--", label=f"median {typical:,.0f}")
    axes.set(xlabel="step", ylabel="tokens per second", title="Throughput", xlim=(0, None), ylim=(0, 1.15 * max(rates)))
    axes.yaxis.set_major_formatter(in_thousands)
    axes.grid(alpha=0.3)
    known = [step for step in curve if step["mfu"] is not None and step["tokens_per_second"] > 0]
    if known:
        # Of a run that moved to other devices the last ones'.
        per_token = 100 * known[-1]["mfu"] / known[-1]["tokens_per_second"]
        share = axes.secondary_yaxis("right", functions=(lambda rate: rate * per_token, lambda mfu: mfu / per_token))
        share.set_ylabel("MFU (%)")
    axes.legend(loc="lower right")
    return figure


def draw_expert_load(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """A strip per MoE layer: experts down, training across, colour is the load as a multiple of the balanced one."""
    curve = curve[:: -max(1, len(curve) // _COLUMNS)][::-1]  # the last report is among them
    layers = list(curve[0]["expert_load"])
    experts = len(curve[0]["expert_load"][layers[0]])
    strip = min(max(0.22 * experts, 0.7), 2.5, max(0.5, 18 / len(layers)))  # inches; of many experts a row is a hair
    figure = new_figure(8, 1.2 + strip * len(layers))
    grid = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    edges = [0, *(step["step"] for step in curve)]
    mesh = None
    for axes, layer in zip(grid, layers, strict=True):
        loads = [[share * experts for share in step["expert_load"][layer]] for step in curve]
        mesh = axes.pcolormesh(
            edges,
            [expert - 0.5 for expert in range(experts + 1)],
            list(zip(*loads, strict=True)),
            vmin=0,
            vmax=2,
            cmap="coolwarm",
        )
        axes.set_ylabel(f"layer {layer}")
        axes.set_yticks(range(0, experts, -(-experts // max(1, min(8, int(strip / 0.2))))))
        axes.invert_yaxis()
    grid[0].set_title("Load of each expert")
    grid[-1].set_xlabel("step")
    assert mesh is not None
    bar = figure.colorbar(
        mesh, ax=list(grid), extend="max", ticks=[0, 0.5, 1, 1.5, 2], aspect=7 * figure.get_figheight()
    )
    bar.set_label("share of tokens × experts (1 is balanced)")
    return figure


def _column(curve: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A gap where it was not finite."""
    return [math.nan if step[name] is None else step[name] for step in curve]


def in_thousands(value: float, position: float) -> str:
    """`1.5 M` for 1,500,000; a billion is a B."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
