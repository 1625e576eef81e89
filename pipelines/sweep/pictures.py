"""A sweep's pictures: every curve over the training, a line a cell; and where the cells ended, a row a cell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING

from pipelines.extrapolate import draw_extrapolation
from pipelines.figures import new_figure, own_style, png
from pipelines.report import in_thousands
from pipelines.sweep.curves import CURVES, LABELS
from pipelines.sweep.results import SweepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = 10
_STYLES = ("-", "--", ":", "-.")
_WARM_UP = 0.08
"""Share of the training whose values do not decide where the axis ends."""
_MEASURES_A_ROW = 3
_LABEL_CHARS = 34
_NAMES_A_COLUMN, _MOST_NAMED = 24, 48
"""Of more cells a legend would be larger than the picture; results.png has their names."""


def draw(result: SweepResult) -> dict[str, bytes]:
    """PNGs by file name: `results.png`, and `{curve}.png` for each of the sweep's curves that has values."""
    with own_style():
        figures = {"results.png": draw_results(result)}
        for name in result.config.curves:
            if (figure := draw_curve(result, name)) is not None:
                figures[f"{name}.png"] = figure
        figures |= draw_beyond(result)
        return {name: png(figure) for name, figure in figures.items()}


def draw_curve(result: SweepResult, name: str) -> Figure | None:
    """Over the tokens trained on: the mean of the seeds, and a band from their lowest to their highest."""
    label, value_of = CURVES[name]
    figure = new_figure(10, 5.6)
    axes = figure.add_subplot()
    shown: list[tuple[float, float]] = []  # share of the training, value
    for index, cell in enumerate(result.config.cell_names):
        found: dict[int, list[float]] = defaultdict(list)
        for trial in result.trials:
            for row in trial.curve if trial.cell == cell else ():
                if (value := value_of(row)) is not None:
                    found[row["tokens"]].append(value)
        if not found:
            continue
        tokens = sorted(found)
        means = [fmean(found[each]) for each in tokens]
        color, style = f"C{index % _COLORS}", _STYLES[index // _COLORS % len(_STYLES)]
        axes.plot(tokens, means, style, color=color, linewidth=1.5, label=cell)
        lowest, highest = ([edge(found[each]) for each in tokens] for edge in (min, max))
        axes.fill_between(tokens, lowest, highest, color=color, alpha=0.15, linewidth=0)
        shown += [(each / tokens[-1], mean) for each, mean in zip(tokens, means, strict=True)]
    if not shown:
        return None
    _limit(axes, shown)
    seeds = f"mean of {len(result.config.seeds)} seeds, band from lowest to highest"
    axes.set(xlabel="tokens trained on", ylabel=label, xlim=(0, None))
    axes.set_title(f"{_title(result)}\n{seeds if len(result.config.seeds) > 1 else 'one seed'}", fontsize=11)
    axes.xaxis.set_major_formatter(in_thousands)
    axes.grid(alpha=0.3)
    cells = len(result.config.cell_names)
    if cells <= _MOST_NAMED:
        columns = -(-cells // _NAMES_A_COLUMN)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False, ncols=columns)
    return figure


def draw_results(result: SweepResult) -> Figure:
    """For each measure every seed's value as a dot and the mean as a bar across, the lowest first measure on top."""
    measures = result.config.measures
    columns = min(len(measures), _MEASURES_A_ROW)
    rows = math.ceil(len(measures) / columns)
    figure = new_figure(10, rows * (1.5 + 0.3 * len(result.cells)))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    names = [cell.cell for cell in result.cells]
    for axes in grid[len(measures) :]:
        axes.set_visible(False)
    for axes, measure in zip(grid, measures, strict=False):
        for place, cell in enumerate(result.cells):
            color = f"C{result.config.cell_names.index(cell.cell) % _COLORS}"
            values = [trial.measures[measure] for trial in result.trials if trial.cell == cell.cell]
            dots = [value for value in values if value is not None]
            axes.plot(dots, [place] * len(dots), "o", color=color, markersize=5, alpha=0.6)
            if (spread := cell.measures[measure]) is not None:
                axes.plot([spread.mean], [place], "|", color=color, markersize=18, markeredgewidth=2.5)
            else:
                axes.text(0.02, place, "none: see the table", transform=axes.get_yaxis_transform(), va="center")
        axes.set(xlabel=_in_lines(LABELS.get(measure, measure)), yticks=range(len(names)))
        axes.set_yticklabels(names)
        axes.grid(alpha=0.3)
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(f"{_title(result)}\na dot per seed, a bar at their mean", fontsize=11)
    return figure


def draw_beyond(result: SweepResult) -> dict[str, Figure]:
    """Loss by position, of every cell and of the scalings that it was put under: the mean of the seeds. A picture for
    each length of training, by the name of its file."""
    measured = [trial for trial in result.trials if trial.beyond is not None]
    lengths = sorted({trial.beyond["train_seq_len"] for trial in measured if trial.beyond is not None})
    scaled = {trial.cell for trial in measured if trial.beyond is not None and len(trial.beyond["curves"]) > 1}
    seeds = f"mean of {len(result.config.seeds)} seeds" if len(result.config.seeds) > 1 else "one seed"
    figures = {}
    for length in lengths:
        curves: dict[str, Sequence[float | None]] = {}
        positions: Sequence[int] = ()
        for cell in result.config.cell_names:
            found = [trial.beyond for trial in measured if trial.cell == cell and trial.beyond is not None]
            found = [each for each in found if each["train_seq_len"] == length]
            for place, name in enumerate(found[0]["curves"] if found else ()):
                positions = found[0]["positions"]
                columns = zip(*(each["curves"][name] for each in found), strict=True)
                own = cell if not place else name if len(scaled) == 1 else f"{cell}, {name}"
                curves[own] = [None if None in column else fmean(column) for column in columns]
        file = "extrapolation.png" if len(lengths) == 1 else f"extrapolation-{length}.png"
        figures[file] = draw_extrapolation(positions, curves, length, f"{_title(result)}\n{seeds}")
    return figures


def _in_lines(label: str) -> str:
    """Narrow enough for one of several axes side by side."""
    return "\n".join(wrap(label, _LABEL_CHARS))


def _title(result: SweepResult) -> str:
    return result.config.title or result.config.name


def _limit(axes: Axes, shown: Sequence[tuple[float, float]]) -> None:
    """The axis shows what happens after the first steps, during which a loss falls further than ever after."""
    late = [value for share, value in shown if share > _WARM_UP] or [value for _, value in shown]
    margin = 0.05 * (max(late) - min(late)) or 0.05 * abs(max(late)) or 1.0
    axes.set_ylim(min(late) - margin, max(late) + margin)
