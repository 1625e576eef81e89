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
    from pipelines.recipe import Recipe
    from pipelines.runs import Run

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

    def build(self, recipe: Recipe, store: Store, dashboard_url: str = "") -> Graph:
        """The recipe's graph as the store has it now. Says what is wrong with the selection: GraphError."""
        from pipelines.generations import read_generations
        from pipelines.stages import build_graph

        if self.keep and self.until not in (None, "deploy"):
            fail(
                f"--keep leaves an endpoint running, but --until={self.until} starts none; leave --keep out, or give "
                "--until deploy"
            )
        graph = build_graph(recipe, dashboard_url, self.keep, read_generations(store))
        graph.selected(self.until, self.from_stage)
        for name in self.force:
            graph.check_forced(name, self.until, self.from_stage)
        return graph

    def includes(self, graph: Graph, stage: str) -> bool:
        return any(each.name == stage for each in graph.selected(self.until, self.from_stage))


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
    from pipelines.recipe import Recipe
    from pipelines.runs import Run

    parsed = Recipe.load(recipe, overrides or [], named_store(store))
    selection = Selection(until, from_stage, tuple(force or ()), keep)
    if dry_run:
        show_plan(parsed, selection, named_store(store), as_json)
        return
    opened = open_store(store)

    def create() -> Run:
        return Run.create(opened, parsed.to_yaml(), run_id, until, from_stage)

    _drive(parsed, create, opened, selection, store, address, as_json)


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
    from pipelines.recipe import Recipe
    from pipelines.runs import Run

    found = Run.open(open_store(store), run_id)
    recipe = Recipe.from_yaml(found.recipe_yaml, overrides, found.store)
    selection = Selection(until or found.status.until, found.status.from_stage, force, keep)

    def open_run() -> Run:
        found.check_undriven()
        found.status.until = selection.until
        if overrides:
            found.replace_recipe(recipe.to_yaml())
        return found

    _drive(recipe, open_run, found.store, selection, store, address, as_json)


def show_plan(recipe: Recipe, selection: Selection, store: Store, as_json: bool) -> None:
    """What a run would do, and why; touches nothing."""
    from rich.table import Table

    from pipelines.drive import foresee

    graph = selection.build(recipe, store)
    steps = foresee(graph, store, recipe.name, selection.until, selection.from_stage, selection.force)
    if as_json:
        print_json([asdict(step) for step in steps])
        return
    table = Table("stage", "", "why")
    for step in steps:
        table.add_row(step.stage, step.action, escape(step.why))
    out.print(table)


def _drive(
    recipe: Recipe,
    open_run: Callable[[], Run],
    store: Store,
    selection: Selection,
    named: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Runs the selected stages of a recipe on a cluster and prints how it went.

    The run's folder is made last of all, so that a run that cannot start leaves nothing behind.
    """
    from cluster import session
    from pipelines.generations import make_anew
    from pipelines.plan import write_record
    from pipelines.user_stage import user_modules

    started = time.monotonic()
    selection.build(recipe, store)
    console = err if as_json else out
    console.print("[dim]connecting to Ray, or starting it[/]")
    with session.connect(address, modules=user_modules(recipe.stages)) as connected:
        signal.signal(signal.SIGTERM, terminate)  # Ray has put a handler there that ends in a crash
        graph = selection.build(recipe, store, connected.dashboard_url or "")
        _check_cluster(recipe, graph, store, selection, connected.dashboard_url or "")
        run = open_run()
        graph = make_anew(graph, selection.force, store, run.id)
        write_record(graph, recipe.name, run.directory)
        only = f", until {selection.until}" if selection.until else ""
        console.print(f"[bold]run[/] {run.id} in {escape(run.store.uri)}{only}", highlight=False)
        url = _run_stages(recipe, graph, run, selection, {"--store": named, "--address": address}, as_json, started)
        if selection.keep and connected.owned and url:
            console.print(f"serving at {url}/v1 until interrupted (Ctrl-C)", highlight=False)
            with suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)


def _check_cluster(recipe: Recipe, graph: Graph, store: Store, selection: Selection, dashboard_url: str) -> None:
    """What would stop the run on this cluster is said now, and not after minutes of training."""
    from cluster.serve import control
    from pipelines.pretrain import check_room

    if selection.includes(graph, "deploy"):
        control.check_can_deploy(dashboard_url, recipe.serve.port, replace=selection.keep)
    if selection.includes(graph, "pretrain") and not graph.artifact(store, "pretrain").committed:
        check_room(recipe.model, recipe.train)


def _run_stages(
    recipe: Recipe,
    graph: Graph,
    run: Run,
    selection: Selection,
    options: Mapping[str, str | None],
    as_json: bool,
    started: float,
) -> str | None:
    """Returns the URL of the endpoint that is left serving, if there is one."""
    from pipelines.drive import drive
    from pipelines.progress import RunDisplay, print_summary
    from pipelines.ray_execution import OnRay
    from pipelines.report import summarise
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
            )
    except BaseException as error:
        again = resume_command(run.id, options, selection.keep)
        expected = expected_error(error)
        if expected is not None:
            print_error(one_line(expected))
        first = "change the data, or a setting with --set, and " if isinstance(expected, DataError) else ""
        console.print(f"{first}go on with it: {again}", highlight=False, markup=False, soft_wrap=True)
        if expected is None:
            raise
        raise typer.Exit(1) from error
    with only_json(as_json):
        summary = summarise(run, results, time.monotonic() - started)
    if as_json:
        print_json(asdict(summary))
    else:
        print_summary(out, summary)
    return summary.url


def resume_command(run_id: str, options: Mapping[str, str | None], keep: bool) -> str:
    """What goes on with a run as it was begun, for a shell."""
    given = [part for option, value in options.items() if value is not None for part in (option, value)]
    return shlex.join(["caravan", "resume", run_id, *given, *_flag("--keep", keep)])


def _flag(name: str, is_set: bool) -> Sequence[str]:
    return [name] if is_set else []
