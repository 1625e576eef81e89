"""One run: its stages live, its training's curves, its log, what it made, and what can be done with it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from nicegui import background_tasks, context, ui

from cluster.storage import NotFound
from pipelines.console import charts
from pipelines.console.desk import Curve, Desk, told, told_until_over
from pipelines.console.frame import COLORS, STATE_CELL, Banner, ago, confirmed, empty, note, page, repeated, spent
from pipelines.data_report import JSON_FILE, in_one_line
from pipelines.follow import progress
from pipelines.quantity import size_in_words
from pipelines.runs import StageStatus
from pipelines.service import views
from pipelines.service.answers import ArtifactRow
from pipelines.service.door import CONSOLE
from pipelines.service.known import KnownRun, RunRow
from pipelines.service.submission import OVER

DATA_PICTURE = "plots/data.png"
LOG_LINES, LINE_CHARACTERS = 1000, 2000
"""That are shown of a log, and of a line."""

_LOG_SECONDS = 0.5

_TABS = ("Stages", "Training", "Log", "Artifacts", "Data", "Recipe")


async def show(desk: Desk, run_id: str) -> None:
    """The page of a run that may not be there."""
    with page(f"Run {run_id}"):
        banner = Banner()
        head = _Head(desk, run_id)
        with ui.tabs().props("dense align=left inline-label no-caps outside-arrows mobile-arrows") as tabs:
            for name in _TABS:
                ui.tab(name)
        panels = ui.tab_panels(tabs, value="Stages").classes("full-width bg-transparent panels").props("keep-alive")
        with panels:
            with ui.tab_panel("Stages"):
                stages = _Stages()
            with ui.tab_panel("Training"):
                training = _Training(desk, run_id)
            with ui.tab_panel("Log"):
                log = _Log(desk, run_id)
            with ui.tab_panel("Artifacts"):
                artifacts = _Artifacts(desk)
            with ui.tab_panel("Data"):
                data = _Data(desk, run_id)
            with ui.tab_panel("Recipe"):
                recipe = _Recipe(desk, run_id)

    async def look() -> None:
        with told_until_over(banner):
            row, run = await desk.ask(desk.orchestrator.find, run_id)
            head.update(row, run)
            stages.update(run, row.ended if row.state in OVER else None)
            if panels.value == "Training":
                await training.update()
            elif panels.value == "Log":
                log.follow(run)
            elif panels.value == "Artifacts":
                await artifacts.update(run)
            elif panels.value == "Data":
                await data.update()
            elif panels.value == "Recipe":
                await recipe.update()

    panels.on_value_change(look)
    repeated(look)


class _Head:
    """What state it is in, and the buttons."""

    def __init__(self, desk: Desk, run_id: str) -> None:
        self._desk, self._run_id = desk, run_id
        with ui.row().classes("items-center full-width"):
            self._state = ui.badge("…").props("outline=false").classes("text-subtitle2 q-pa-sm")
            self._state.props('role=status aria-live="polite"')
            self._about = ui.label().classes("told col")
            self._stop = ui.button("Stop", on_click=self._do_stop).props("outline color=negative")
            self._resume = ui.button("Resume", on_click=self._do_resume).props("outline")
            self._delete = ui.button("Delete", on_click=self._do_delete).props("flat color=negative")
        for button in (self._stop, self._resume, self._delete):
            button.visible = False

    def update(self, row: RunRow, run: KnownRun) -> None:
        self._state.text = row.state
        self._state.props(f"color={COLORS[row.state]}")
        self._about.text = about(row)
        ours = run.submission is not None
        self._stop.visible = ours and row.state not in OVER and row.state != "stopping"
        self._resume.visible = ours and row.state in OVER - {"done"}
        self._delete.visible = row.state in OVER

    async def _do_stop(self) -> None:
        with told(note):
            await self._desk.ask(self._desk.orchestrator.stop, self._run_id)
            note("It is being stopped; what it has begun on the cluster is ended first.", good=True)

    async def _do_resume(self) -> None:
        with told(note):
            await self._desk.ask(self._desk.orchestrator.resume, self._run_id)
            note("It is queued again.", good=True)

    async def _do_delete(self) -> None:
        question = f"Delete run {self._run_id}? Its recipe, states and plots go; its artifacts stay."
        if await confirmed(question, "Delete"):
            with told(note):
                await self._desk.ask(self._desk.orchestrator.delete, self._run_id)
                ui.navigate.to("/")


def about(row: RunRow, now: float | None = None) -> str:
    """What there is to say of a run besides its state."""
    parts = [row.name, f"created {ago(row.created, now)}"]
    if row.started is not None:
        parts.append(
            f"took {spent(row.started, row.ended, now)}" if row.ended else f"for {spent(row.started, None, now)}"
        )
    if row.priority:
        parts.append(f"priority {row.priority}")
    parts += [f"{name}={value}" for name, value in row.tags.items()]
    if row.waits_for:
        parts.append(row.waits_for)
    return " · ".join(part for part in parts if part) + (f"\n{row.error}" if row.error else "")


class _Stages:
    def __init__(self) -> None:
        columns = [
            {"name": name, "label": name, "field": name, "align": "left", "classes": "keep" if name == "time" else ""}
            for name in ("stage", "state", "time", "says")
        ]
        self._table = ui.table(rows=[], columns=columns, row_key="stage").classes("full-width")
        self._table.props("flat bordered dense")
        self._table.add_slot("no-data", empty("it has not begun"))
        self._table.add_slot("body-cell-state", STATE_CELL)

    def update(self, run: KnownRun, ended: float | None) -> None:
        """`ended`: of a run that is over; a stage that its driver left behind ran no longer."""
        self._table.rows = [stage_cells(name, stage, ended) for name, stage in run.status.stages.items()]


def stage_cells(name: str, stage: StageStatus, now: float | None = None) -> dict[str, Any]:
    """A row of the table of stages."""
    return {
        "stage": name,
        "state": stage.state,
        "color": COLORS[stage.state],
        "time": spent(stage.started, stage.ended, now) if stage.state != "skipped" else "",
        "says": (stage.error or stage.progress)[:500],
    }


class _Training:
    """Loss, throughput and expert load as they come."""

    def __init__(self, desk: Desk, run_id: str) -> None:
        self._desk = desk
        self._curve = Curve(desk.store, run_id)
        self._line = ui.label("No report of a training yet.").classes("told q-mb-sm")
        with ui.element("div").classes("charts"):
            self._charts = {name: _chart(name) for name in ("loss", "throughput", "expert load")}

    async def update(self) -> None:
        rows = await self._desk.ask(self._curve.poll)
        if not rows:
            return
        self._line.text = progress(rows[-1], next((row for row in reversed(rows) if row["val_loss"] is not None), {}))
        drawn = (charts.loss(rows), charts.throughput(rows), charts.expert_load(rows))
        for chart, options in zip(self._charts.values(), drawn, strict=True):
            chart.visible = options is not None
            if options is not None:
                chart.options.clear()
                chart.options.update(options)


def _chart(name: str) -> ui.echart:
    chart = ui.echart({"title": {"text": name}}).classes("chart")
    chart.props(f'data-chart="{name}"')  # ECharts itself says to a screen reader what is drawn
    chart.visible = False
    return chart


class _Log:
    """What the run's latest job prints, from when somebody first looks."""

    def __init__(self, desk: Desk, run_id: str) -> None:
        self._desk, self._run_id = desk, run_id
        self._job: str | None = None
        self._reading: asyncio.Task[None] | None = None
        self._shown: deque[int] = deque()
        self._line = ui.label().classes("quiet")
        self._log = ui.log().classes("mono full-width").style("height: 60vh")
        self._log.props('tabindex=0 role=log aria-label="log"')
        context.client.on_delete(self._leave)

    def follow(self, run: KnownRun) -> None:
        """Begins to, unless it does already."""
        job = run.submission.job_id if run.submission is not None else ""
        if not job:
            self._line.text = "There is no log here: it has not been started as a job."
        elif job != self._job:
            self._leave()
            self._job = job
            self._reading = background_tasks.create(self._read(job), name=f"log of {job}")

    def _leave(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self, job: str) -> None:
        self._line.text = f"job {job}, the last {LOG_LINES:,} lines"
        self._log.clear()
        self._shown.clear()
        rest, lines, pushed = "", deque[str](maxlen=LOG_LINES), 0.0
        with told(self._fail):
            async for piece in self._desk.bounded.follow(self._desk.orchestrator.jobs.logs(job, follow=True)):
                whole, rest = lines_of(rest, piece)
                lines.extend(whole)
                # a job that prints without a pause is not to keep the event loop from all else
                if time.monotonic() - pushed >= _LOG_SECONDS:
                    self._push(lines)
                    lines.clear()
                    pushed = time.monotonic()
            self._push([*lines, rest] if rest else lines)

    def _push(self, lines: Collection[str]) -> None:
        """One element for all of them, as making one takes longer than reading a line."""
        if not lines:
            return
        with self._log:
            ui.label("\n".join(lines))
        self._shown.append(len(lines))
        while sum(self._shown) - self._shown[0] >= LOG_LINES:
            self._shown.popleft()
            self._log.remove(0)

    def _fail(self, message: str) -> None:
        self._line.text = message
        self._job = None  # the next look tries again


def lines_of(rest: str, piece: str) -> tuple[list[str], str]:
    """The lines that a piece of a log ends, and the beginning of the next one. Of a line that was printed over, as a
    progress bar is, what came last; of a long one the beginning."""
    *lines, rest = (_last_over(line) for line in (rest + piece).split("\n"))
    return [line.rstrip("\r") for line in lines], rest


def _last_over(line: str) -> str:
    text = line.rstrip("\r")
    return text.rpartition("\r")[2][:LINE_CHARACTERS] + ("\r" if text != line else "")


class _Artifacts:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        columns = [
            {"name": name, "label": name, "field": name, "align": "left"}
            for name in ("stage", "state", "size", "made, UTC", "where")
        ]
        self._table = ui.table(rows=[], columns=columns, row_key="stage").classes("full-width")
        self._table.props("flat bordered dense wrap-cells")
        self._table.add_slot("no-data", empty("none yet"))
        self._table.add_slot("body-cell-where", '<q-td :props="props" class="mono told">{{ props.value }}</q-td>')

    async def update(self, run: KnownRun) -> None:
        found = await self._desk.ask(views.artifacts, self._desk.store, run)
        self._table.rows = [artifact_cells(each) for each in found]


def artifact_cells(found: ArtifactRow) -> dict[str, str]:
    """A row of the table of artifacts."""
    return {
        "stage": found.stage,
        "state": found.error or ("committed" if found.committed else "not yet"),
        "size": "" if found.size is None else size_in_words(found.size),
        "made, UTC": (found.created or "")[:19].replace("T", " "),
        "where": found.uri,
    }


class _Data:
    """What became of the documents."""

    def __init__(self, desk: Desk, run_id: str) -> None:
        self._desk, self._run_id = desk, run_id
        self._line = ui.label("The report comes with the end of the run.").classes("told q-mb-sm")
        self._picture = ui.element("img").style("max-width: 100%; background: white")
        self._picture.props('alt="what became of the documents: read, dropped by rule, kept; tokens by source"')
        self._picture.visible = False

    async def update(self) -> None:
        if self._picture.visible:
            return
        folder = self._desk.store.child("runs", self._run_id)
        with suppress(NotFound):
            report = json.loads(await self._desk.ask(folder.read_bytes, JSON_FILE))
            self._line.text = in_one_line(report)
            if await self._desk.ask(folder.exists, DATA_PICTURE):
                source = f"{CONSOLE}/files/{quote(self._run_id, safe='')}/{quote(DATA_PICTURE)}"
                self._picture.props(f'src="{source}"')
                self._picture.visible = True


class _Recipe:
    def __init__(self, desk: Desk, run_id: str) -> None:
        self._desk, self._run_id = desk, run_id
        self._text = ui.label().classes("mono told")

    async def update(self) -> None:
        if not self._text.text:
            folder = self._desk.store.child("runs", self._run_id)
            self._text.text = (await self._desk.ask(folder.read_bytes, "recipe.yaml")).decode()
