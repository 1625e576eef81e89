"""What is known of a run: its stages, how far it came, the last report, its checkpoints and pictures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.storage import Store
from pipelines.follow import duration, progress
from pipelines.metrics import MetricsReader
from pipelines.runs import Run
from pipelines.training_folder import METRICS, checkpoints_of, training_folder


@dataclass(frozen=True)
class RunView:
    """Plain data: `dataclasses.asdict` is JSON. Times are seconds."""

    run_id: str
    state: str = ""
    """The service's word; without one that of the status, or `lost`: it says running, and its driver is gone."""
    error: str = ""
    waits_for: str = ""
    """Why the service has it queued."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """name, state, seconds (None before it began), progress, error."""
    last: dict[str, Any] | None = None
    """The training's last report (`StepMetrics`); None before the first."""
    validated: dict[str, Any] | None = None
    """The last one with a validation loss."""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    """step, loss, val_loss of each whole one."""
    files: list[str] = field(default_factory=list)
    """What lies in the run's folder for the eye: plots, TensorBoard's folder, tracebacks."""


def view(run: Run) -> RunView:
    """A run as the store has it. Raises StorageError."""
    status = run.status
    curve: list[dict[str, Any]] = []
    if (folder := training_folder(run)) is not None:
        reader = MetricsReader(folder.child(METRICS))
        reader.poll()
        curve = reader.steps()
    return RunView(
        run_id=run.id,
        state="lost" if status.is_lost() else status.state,
        error=status.error,
        stages=_stages({"stage": name, **asdict(stage)} for name, stage in status.stages.items()),
        last=curve[-1] if curve else None,
        validated=next((row for row in reversed(curve) if row["val_loss"] is not None), None),
        checkpoints=[
            {"step": step, "loss": saved.get("loss"), "val_loss": saved.get("val_loss")}
            for step, saved in checkpoints_of(run).items()
        ],
        files=[_shown(run.directory, path) for path in run.directory.list() if path.split("/")[0] in _FOR_THE_EYE],
    )


def view_of_service(answer: Mapping[str, Any], stored: RunView | None) -> RunView:
    """A run as the service has it (`RunDetails` of its answers.py), with what else the store has, if it can be read."""
    return replace(
        stored or RunView(answer["id"]),
        state=answer["state"],
        error=answer["error"],
        waits_for=answer["waits_for"],
        stages=_stages(answer["stages"]),
    )


def _stages(stages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`stages`: the fields of StageStatus, and the name as `stage`."""
    now = time.time()
    return [
        {
            "name": stage["stage"],
            "state": stage["state"],
            "seconds": None if stage["started"] is None else round((stage["ended"] or now) - stage["started"], 1),
            "progress": stage["progress"],
            "error": stage["error"],
        }
        for stage in stages
    ]


_FOR_THE_EYE = ("plots", "tensorboard", "errors", "sweep")


def _shown(store: Store, path: str) -> str:
    return str(store.local_path(path) or store.child(path).uri)


def print_view(console: Console, view: RunView) -> None:
    console.print(
        f"[bold]run[/] {view.run_id}: {view.state} {escape(view.error or view.waits_for)}".rstrip(), highlight=False
    )
    table = Table("stage", "state", "time", "progress")
    for stage in view.stages:
        seconds = "" if stage["seconds"] is None else duration(stage["seconds"])
        table.add_row(stage["name"], stage["state"], seconds, escape(stage["error"] or stage["progress"]))
    console.print(table)
    if view.last is not None:
        console.print(f"[bold]training[/] {progress(view.last, view.validated or {})}", highlight=False)
    if view.checkpoints:
        table = Table("checkpoint", "loss", "validation loss")
        for saved in view.checkpoints:
            losses = ("" if saved[name] is None else f"{saved[name]:.4f}" for name in ("loss", "val_loss"))
            table.add_row(f"step {saved['step']}", *losses)
        console.print(table)
    for path in view.files:
        console.print(escape(path), highlight=False, soft_wrap=True)
