"""A sweep's report: `report.md` beside its pictures, `report.html` with them inside, and `sweep.json`.

All three are functions of one result, so that they cannot disagree.
"""

from __future__ import annotations

import base64
import html
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.quantity import size_in_words
from pipelines.sweep.results import CellResult, Finding, Spread, SweepResult

MARKDOWN, HTML, JSON_FILE = "report.md", "report.html", "sweep.json"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border: 1px solid #d0d7de; padding: .3rem .7rem; text-align: left; font-variant-numeric: tabular-nums }
th { background: #f6f8fa }
img { max-width: 100%; height: auto }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto }
"""


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on, in words."""

    processor: str
    cores: int
    torch: str

    @classmethod
    def here(cls) -> Machine:
        import torch

        name = platform.processor() or platform.machine()
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
        except OSError:
            pass
        return cls(name, os.cpu_count() or 1, torch.__version__)

    def __str__(self) -> str:
        return f"{self.processor}, {self.cores} cores, torch {self.torch}"


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def results_table(result: SweepResult) -> Table:
    """A row a cell, the lowest first measure on top."""
    experts = any(cell.active_parameters != cell.parameters for cell in result.cells)
    head = ["cell", *result.config.measures, "parameters", *(["active"] if experts else [])]
    head += ["training FLOPs", "tokens/s", "memory"]
    return Table(head, [list(_row(cell, result, experts)) for cell in result.cells])


def _row(cell: CellResult, result: SweepResult, experts: bool) -> Iterator[str]:
    yield cell.cell
    for measure in result.config.measures:
        yield _spread(cell.measures[measure], len(result.config.seeds))
    yield f"{cell.parameters:,}"
    if experts:
        yield f"{cell.active_parameters:,}"
    yield "–" if cell.flops is None else f"{cell.flops:.2e}"
    yield "–" if cell.tokens_per_second is None else f"{cell.tokens_per_second:,.0f}"
    yield "–" if cell.memory_bytes is None else size_in_words(cell.memory_bytes)


def _spread(spread: Spread | None, seeds: int) -> str:
    """`3.4123 ± 0.0045`: the mean and the sample's deviation; with fewer seeds than were tried their number."""
    if spread is None:
        return "–"
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.4f}"
    return f"{spread.mean:.4f}{deviation}" + ("" if spread.count == seeds else f" ({spread.count} of {seeds} seeds)")


def findings_table(findings: Sequence[Finding]) -> Table:
    rows = []
    for each in findings:
        difference = "–" if each.difference is None else _difference(each.difference)
        rows.append([f"{each.lower} below {each.than}", each.measure, difference, each.verdict, each.source])
    return Table(["expected", "measure", "difference", "found", "source"], rows)


def _difference(difference: Spread) -> str:
    """The mean, and the range over the seeds."""
    one = " (one seed)" if difference.count == 1 else f" ({difference.lowest:+.4f} to {difference.highest:+.4f})"
    return f"{difference.mean:+.4f}{one}"


def missing(result: SweepResult) -> list[str]:
    """Cells and seeds that came to no figure, and why."""
    return [f"{cell.cell}, {why}" for cell in result.cells for why in cell.missing]


def as_json(result: SweepResult, machine: Machine) -> dict[str, Any]:
    """All figures, and of the curves nothing but what was measured of them."""
    return {
        "name": result.config.name,
        "title": result.config.title,
        "machine": asdict(machine),
        "seeds": list(result.config.seeds),
        "measures": list(result.config.measures),
        "cells": [asdict(cell) for cell in result.cells],
        "trials": [
            {name: value for name, value in vars(trial).items() if name not in ("curve", "beyond", "why")}
            for trial in result.trials
        ],
        "expected": [asdict(each) for each in result.findings],
    }


def json_bytes(result: SweepResult, machine: Machine) -> bytes:
    return (json.dumps(as_json(result, machine), indent=2) + "\n").encode()


# --- for people ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Picture:
    name: str


Block = Heading | Code | Picture | Table | str
"""A str is a paragraph."""


def blocks(result: SweepResult, machine: Machine, command: str, pictures: Sequence[str]) -> list[Block]:
    """What the report says, in order. `pictures`: names of files."""
    config = result.config
    seeds = ", ".join(map(str, config.seeds))
    found: list[Block] = [Heading(config.title or config.name, 1), *_paragraphs(config.notes)]
    found += [Code(command), f"{len(config.cell_names)} cells, seeds {seeds}. Machine: {machine}."]
    found += [Heading("Results"), results_table(result)]
    found += [f"Mean ± standard deviation over the seeds, sorted by {config.measures[0]}. {_COLUMNS}"]
    if lines := missing(result):
        found += [Heading("Without a figure"), *lines]
    if result.findings:
        found += [Heading("Expected and found"), _VERDICTS, findings_table(result.findings)]
    found += [Heading("Pictures"), *map(Picture, pictures)] if pictures else []
    changes = [[name, _listed(sets)] for name, sets in [("(all)", config.set), *config.changes()]]
    return [*found, Heading("Cells"), Table(["cell", "sets"], changes)]


def _listed(changes: Mapping[str, Any]) -> str:
    return " ".join(", ".join(f"{key}={value}" for key, value in changes.items()).split()) or "–"


_COLUMNS = (
    "FLOPs: forward and backward, of the training. Tokens/s: of the training, as many trainings at once as the cluster "
    "had room for. Memory: the most that a training process held."
)
_VERDICTS = (
    "Compared seed by seed, for a seed decides the start values and the order of the data. Holds: with every seed the "
    "one ended below the other. Within the spread: only on average. In brackets the range over the seeds."
)


def markdown(result: SweepResult, machine: Machine, command: str, pictures: Sequence[str]) -> str:
    """The pictures lie beside it."""
    return "\n\n".join(map(_as_markdown, blocks(result, machine, command, pictures))) + "\n"


def html_page(result: SweepResult, machine: Machine, command: str, pictures: Mapping[str, bytes]) -> str:
    """One file, with the pictures in it."""
    body = "\n".join(_as_html(block, pictures) for block in blocks(result, machine, command, list(pictures)))
    title = html.escape(result.config.title or result.config.name)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _paragraphs(text: str) -> list[str]:
    return [" ".join(each.split()) for each in text.split("\n\n") if each.strip()]


def _as_markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Code(text):
            return f"```bash\n{text}\n```"
        case Picture(name):
            return f"![{name.removesuffix('.png')}]({name})"
        case Table(head, rows):
            cells = [
                [" ".join(cell.split()).replace("|", "\\|") for cell in row]
                for row in (head, ["---"] * len(head), *rows)
            ]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return block


def _as_html(block: Block, pictures: Mapping[str, bytes]) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(name):
            data = base64.b64encode(pictures[name]).decode()
            return f'<img alt="{html.escape(name.removesuffix(".png"))}" src="data:image/png;base64,{data}">'
        case Table(head, rows):
            lines = [("th", head), *(("td", row) for row in rows)]
            made = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in lines)
            return "<table>" + "".join(f"<tr>{row}</tr>" for row in made) + "</table>"
    return f"<p>{html.escape(block)}</p>"
