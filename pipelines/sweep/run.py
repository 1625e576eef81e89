"""A run that is a sweep: its graph, and the report that is made of what it has left in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines.generations import read_generations
from pipelines.graph import Graph
from pipelines.recipe_text import RecipeError
from pipelines.stage import StageResult
from pipelines.sweep.config import SweepConfig, Trial
from pipelines.sweep.trials import SweepGraph, sweep_graph
from pipelines.user_stage import user_modules

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.runs import Run
    from pipelines.sweep.report import Machine
    from pipelines.sweep.results import SweepResult

FOLDER = "sweep"
"""Of the report, in the run's."""
_WIDTH = 240


@dataclass
class SweepRun:
    """A kind of run (pipelines/run_kinds.py). `folder`: where the report is written besides the run's own folder."""

    config: SweepConfig
    command: str
    folder: Path | None = None
    store: Store | None = None
    """Where a run that `train.start_from` names is looked for."""
    keep_going: bool = field(default=True, init=False)

    @property
    def name(self) -> str:
        return self.config.name

    @cached_property
    def _trials(self) -> list[Trial]:
        return self.config.trials(self.store)

    def to_yaml(self) -> str:
        return self.config.to_yaml()

    def modules(self) -> list[str]:
        return sorted({module for trial in self._trials for module in user_modules(trial.recipe.stages)})

    def build(self, store: Store, dashboard_url: str, keep: bool) -> Graph:
        if keep:
            raise RecipeError("--keep leaves an endpoint running, and a sweep has none; leave it out")
        return self._graph(store).graph

    def _graph(self, store: Store) -> SweepGraph:
        return sweep_graph(self._trials, self.config.kinds, read_generations(store), self.config.extrapolate)

    def check_cluster(
        self, graph: Graph, selected: Sequence[str], store: Store, dashboard_url: str, keep: bool
    ) -> None:
        from pipelines.drive import find_committed
        from pipelines.pretrain import check_room

        chosen = [graph.stages[name] for name in selected if graph.stages[name].kind == "pretrain"]
        committed = find_committed(graph, store, chosen, Artifact.manifest)
        planned = self._graph(store)
        for trial in self._trials:
            name = planned.stages[trial.label].get("pretrain")
            if name in selected and name not in committed:
                check_room(trial.recipe.model, trial.recipe.train)

    def conclude(
        self, run: Run, graph: Graph, results: Mapping[str, StageResult] | None, seconds: float
    ) -> SweepConclusion:
        """Also of a sweep in which something failed: what there is is shown, and what is missing named."""
        from pipelines.drive import find_committed
        from pipelines.sweep import pictures, report
        from pipelines.sweep.results import collect

        planned = self._graph(run.store)
        committed = find_committed(planned.graph, run.store, list(planned.graph.stages.values()), Artifact.manifest)
        result = collect(self.config, self._trials, planned, committed, run.status, run.store)
        machine = report.Machine.here()
        drawn = pictures.draw(result)
        conclusion = SweepConclusion(result, machine, run.id, round(seconds, 1))
        files = {
            report.MARKDOWN: report.markdown(result, machine, self.command, list(drawn)).encode(),
            report.HTML: report.html_page(result, machine, self.command, drawn).encode(),
            report.JSON_FILE: report.json_bytes(result, machine),
            **drawn,
        }
        target = run.directory.child(FOLDER)
        for name, data in files.items():
            target.write_bytes(name, data)
        conclusion.report = str(target.local_path(report.HTML) or target.child(report.HTML).uri)
        if self.folder is not None:
            copy = Store(self.folder)
            for name, data in files.items():
                copy.write_bytes(name, data)
        return conclusion


@dataclass
class SweepConclusion:
    result: SweepResult
    machine: Machine
    run_id: str
    seconds: float
    report: str = ""
    """Where it lies."""
    url: None = field(default=None, init=False)

    def as_json(self) -> Any:
        from pipelines.sweep import report

        figures = report.as_json(self.result, self.machine)
        return {"run_id": self.run_id, "seconds": self.seconds, "report": self.report, **figures}

    def print(self, console: Console) -> None:
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        from pipelines.sweep import report

        wide = Console(file=console.file, width=max(console.width, _WIDTH))  # a figure that is cut off is none

        def show(table: report.Table) -> None:
            shown = Table(box=box.SIMPLE_HEAD)
            for name in table.head:
                shown.add_column(escape(name), no_wrap=True)
            for row in table.rows:
                shown.add_row(*map(escape, row))
            wide.print(shown)

        show(report.results_table(self.result))
        for line in report.missing(self.result):
            console.print(f"[red]{escape(line)}[/]", highlight=False, soft_wrap=True)
        if self.result.findings:
            show(report.findings_table(self.result.findings))
        console.print(f"[bold]report[/] {escape(self.report)}", highlight=False, soft_wrap=True)
