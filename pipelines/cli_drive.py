"""Driving a run from this process: `caravan run`, and what `caravan resume` does where no service does it."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from pipelines.screen import (
    AddressOption,
    JsonOption,
    StoreOption,
    err,
    expected_error,
    fail,
    named_store,
    only_json,
    open_store,
    out,
    print_error,
    print_json,
    terminate,
)

if TYPE_CHECKING:
    from cluster.storage import Store
    from pipelines.graph import Graph
    from pipelines.run_kinds import RunKind
    from pipelines.runs import Run
    from pipelines.stage import StageResult

RecipeArgument = Annotated[Path, typer.Argument(help="YAML file of the run.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: train.steps=100.")]
RunIdOption = Annotated[str | None, typer.Option(help="Name of the new run [default: time and a random part]")]
UntilOption = Annotated[str | None, typer.Option(help="Run this stage and what it needs, nothing more.")]
FromOption = Annotated[
    str | None, typer.Option("--from", help="Run this stage and what follows it; what it needs must be committed.")
]
ForceOption = Annotated[
    list[str] | None, typer.Option("--force", help="Make this stage anew, and so what follows it; may be repeated.")
]
KeepOption = Annotated[bool, typer.Option("--keep", help="Leave the endpoint serving.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would run and why, and do nothing.")]


@dataclass(frozen=True)
class Selection:
    """Which stages of a recipe to run, and how: the options of the commands."""

    until: str | None = None
    from_stage: str | None = None
    force: tuple[str, ...] = ()
    keep: bool = False

    def build(self, kind: RunKind, store: Store, dashboard_url: str = "") -> Graph:
        """The graph as the store has it now. Says what is wrong with the selection: GraphError."""
        if self.keep and self.until not in (None, "deploy"):
            fail(
                f"--keep leaves an endpoint running, but --until={self.until} starts none; leave --keep out, or give "
                "--until deploy"
            )
        graph = kind.build(store, dashboard_url, self.keep)
        graph.selected(self.until, self.from_stage)
        for name in self.force:
            graph.check_forced(name, self.until, self.from_stage)
        return graph

    def names(self, graph: Graph) -> list[str]:
        return [stage.name for stage in graph.selected(self.until, self.from_stage)]


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    until: UntilOption = None,
    from_stage: FromOption = None,
    force: ForceOption = None,
    keep: KeepOption = False,
    dry_run: DryRunOption = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe's stages here; what is committed already is skipped."""
    from pipelines.run_kinds import kind_of_file

    kind = kind_of_file(recipe, overrides or [], named_store(store))
    drive_new(kind, Selection(until, from_stage, tuple(force or ()), keep), store, run_id, dry_run, address, as_json)


def drive_new(
    kind: RunKind,
    selection: Selection,
    store: str | None,
    run_id: str | None,
    dry_run: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Begins a run, or with `dry_run` says what it would do."""
    from pipelines.runs import Run

    if dry_run:
        show_plan(kind, selection, named_store(store), as_json)
        return
    opened = open_store(store)

    def create() -> Run:
        return Run.create(opened, kind.to_yaml(), run_id, selection.until, selection.from_stage)

    _drive(kind, create, opened, selection, store, address, as_json)


def drive_again(
    run_id: str,
    overrides: list[str],
    store: str | None,
    until: str | None,
    force: tuple[str, ...],
    keep: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Goes on with a run; `until` is None for the stage that it was begun for."""
    from pipelines.run_kinds import stored_kind
    from pipelines.runs import Run

    found = Run.open(open_store(store), run_id)
    kind = stored_kind(found.recipe_yaml, overrides, found.store, f"caravan resume {run_id}")
    selection = Selection(until or found.status.until, found.status.from_stage, force, keep)

    def open_run() -> Run:
        found.check_undriven()
        found.status.until = selection.until
        if overrides:
            found.replace_recipe(kind.to_yaml())
        return found

    _drive(kind, open_run, found.store, selection, store, address, as_json)


def show_plan(kind: RunKind, selection: Selection, store: Store, as_json: bool) -> None:
    """What a run would do, and why; touches nothing."""
    from rich.table import Table

    from pipelines.drive import foresee

    graph = selection.build(kind, store)
    steps = foresee(graph, store, kind.name, selection.until, selection.from_stage, selection.force)
    if as_json:
        print_json([asdict(step) for step in steps])
        return
    table = Table("stage", "", "why")
    for step in steps:
        table.add_row(step.stage, step.action, escape(step.why))
    out.print(table)


def _drive(
    kind: RunKind,
    open_run: Callable[[], Run],
    store: Store,
    selection: Selection,
    named: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Runs the selected stages on a cluster and prints how it went.

    The run's folder is made last of all, so that a run that cannot start leaves nothing behind.
    """
    from cluster import session
    from pipelines.generations import make_anew
    from pipelines.plan import write_record

    started = time.monotonic()
    selection.build(kind, store)
    console = err if as_json else out
    console.print("[dim]connecting to Ray, or starting it[/]")
    with session.connect(address, modules=kind.modules()) as connected:
        signal.signal(signal.SIGTERM, terminate)  # Ray has put a handler there that ends in a crash
        dashboard = connected.dashboard_url or ""
        graph = selection.build(kind, store, dashboard)
        kind.check_cluster(graph, selection.names(graph), store, dashboard, selection.keep)
        run = open_run()
        graph = make_anew(graph, selection.force, store, run.id)
        write_record(graph, kind.name, run.directory)
        only = f", until {selection.until}" if selection.until else ""
        console.print(f"[bold]run[/] {run.id} in {escape(run.store.uri)}{only}", highlight=False)
        url = _run_stages(kind, graph, run, selection, {"--store": named, "--address": address}, as_json, started)
        if selection.keep and connected.owned and url:
            console.print(f"serving at {url}/v1 until interrupted (Ctrl-C)", highlight=False)
            with suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)


def _run_stages(
    kind: RunKind,
    graph: Graph,
    run: Run,
    selection: Selection,
    options: Mapping[str, str | None],
    as_json: bool,
    started: float,
) -> str | None:
    """Returns the URL of the endpoint that is left serving, if there is one."""
    from pipelines.drive import drive
    from pipelines.progress import RunDisplay
    from pipelines.ray_execution import OnRay
    from pipelines.runs import one_line
    from pipelines.sources import DataError

    console = err if as_json else out
    try:
        with only_json(as_json), RunDisplay(console) as display, OnRay() as executor:
            results = drive(
                graph,
                run.store,
                run,
                until=selection.until,
                from_stage=selection.from_stage,
                executor=executor,
                on_event=display,
                keep_going=kind.keep_going,
            )
    except BaseException as error:
        again = resume_command(run.id, options, selection.keep)
        expected = expected_error(error)
        if expected is not None:
            print_error(one_line(expected))
        if isinstance(error, Exception):
            _show_what_there_is(kind, run, graph, started, as_json)
        first = "change the data, or a setting with --set, and " if isinstance(expected, DataError) else ""
        console.print(f"{first}go on with it: {again}", highlight=False, markup=False, soft_wrap=True)
        if expected is None:
            raise
        raise typer.Exit(1) from error
    return _conclude(kind, run, graph, results, started, as_json)


def _show_what_there_is(kind: RunKind, run: Run, graph: Graph, started: float, as_json: bool) -> None:
    """Of a run that failed; whose own error is the one to report."""
    try:
        _conclude(kind, run, graph, None, started, as_json)
    except Exception as error:
        print_error(f"what there is could not be shown: {error}")


def _conclude(
    kind: RunKind,
    run: Run,
    graph: Graph,
    results: Mapping[str, StageResult] | None,
    started: float,
    as_json: bool,
) -> str | None:
    """Shows what came of the run, of one that failed if there is something to show."""
    with only_json(as_json):
        conclusion = kind.conclude(run, graph, results, time.monotonic() - started)
    if conclusion is None:
        return None
    if as_json:
        print_json(conclusion.as_json())
    else:
        conclusion.print(out)
    return conclusion.url


def resume_command(run_id: str, options: Mapping[str, str | None], keep: bool) -> str:
    """What goes on with a run as it was begun, for a shell."""
    given = [part for option, value in options.items() if value is not None for part in (option, value)]
    return shlex.join(["caravan", "resume", run_id, *given, *_flag("--keep", keep)])


def _flag(name: str, is_set: bool) -> Sequence[str]:
    return [name] if is_set else []
