"""The `caravan` command.

Commands only parse, call and print. Every expected failure ends as one line on stderr and exit code 1. Ray and torch
are imported by the command that needs them: `--help` must not wait for either.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from pipelines.cli_bench import bench
from pipelines.cli_keys import keys
from pipelines.cli_operate import gc
from pipelines.cli_runs import export, show
from pipelines.cli_serve import deploy, scale, status, trace, undeploy
from pipelines.screen import (
    INTERRUPTED,
    TERMINATED,
    AddressOption,
    JsonOption,
    RunArgument,
    StoreOption,
    err,
    fail,
    named_store,
    open_store,
    out,
    print_error,
    print_json,
    terminate,
)

if TYPE_CHECKING:
    from pipelines.recipe import Recipe
    from pipelines.runs import Run

app = typer.Typer(
    name="caravan",
    help="A language model from raw text to an endpoint, on a Ray cluster or on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would take the [default: ...] of the help texts for markup
    add_completion=False,
)
app.add_typer(bench, name="bench")
app.add_typer(keys, name="keys")
for command in (show, export, gc, deploy, scale, status, trace, undeploy):
    app.command()(command)

RecipeArgument = Annotated[Path, typer.Argument(help="YAML file of the run.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: train.steps=100.")]
RunIdOption = Annotated[str | None, typer.Option(help="Name of the new run [default: time and a random part]")]
UntilOption = Annotated[str | None, typer.Option(help="Run this stage and what it needs, nothing more.")]
ResumeUntilOption = Annotated[
    str | None, typer.Option(help="Run this stage and what it needs from now on [default: as the run was begun]")
]
KeepOption = Annotated[bool, typer.Option("--keep", help="Leave the endpoint serving.")]


# --- the local cluster ----------------------------------------------------------------------------------------------


@app.command()
def up(
    num_cpus: Annotated[int | None, typer.Option(help="CPUs to offer [default: all]")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="GPUs to offer [default: all]")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the head [default: a free one]")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Port of the dashboard [default: a free one]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a Ray head on this machine that stays until `caravan down`."""
    from cluster import head

    record = head.up(num_cpus=num_cpus, num_gpus=num_gpus, port=port, dashboard_port=dashboard_port)
    if as_json:
        print_json(asdict(record))
    else:
        out.print(f"Ray is up at {record.address}, dashboard {record.dashboard_url}", highlight=False)


@app.command()
def down(as_json: JsonOption = False) -> None:
    """End the Ray head that `caravan up` started, and all that runs on it."""
    from cluster import head

    record = head.down()
    if as_json:
        print_json(asdict(record))
    else:
        out.print(f"Ray at {record.address} is down", highlight=False)


# --- runs -----------------------------------------------------------------------------------------------------------


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    until: UntilOption = None,
    keep: KeepOption = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe's stages here; what is committed already is skipped."""
    from pipelines.recipe import Recipe
    from pipelines.runs import Run

    parsed = Recipe.load(recipe, overrides or [], named_store(store))
    opened = open_store(store)
    _drive(parsed, lambda: Run.create(opened, parsed.to_yaml(), run_id, until), store, until, keep, address, as_json)


@app.command()
def resume(
    run_id: RunArgument,
    overrides: SetOption = None,
    store: StoreOption = None,
    until: ResumeUntilOption = None,
    keep: KeepOption = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run that ended early, up to the stage that it was begun for: committed stages are skipped, training
    goes on from its last checkpoint."""
    from pipelines.recipe import Recipe
    from pipelines.runs import Run

    found = Run.open(open_store(store), run_id)
    recipe = Recipe.from_yaml(found.recipe_yaml, overrides or [], found.store)
    until = until or found.status.until

    def open_run() -> Run:
        found.status.until = until
        if overrides:
            found.replace_recipe(recipe.to_yaml())
        return found

    _drive(recipe, open_run, store, until, keep, address, as_json)


@app.command()
def submit(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    until: UntilOption = None,
    keep: KeepOption = False,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print the job's log until it ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe as a Ray job on a running cluster; prints the run's id."""
    from cluster import jobs
    from pipelines.recipe import Recipe
    from pipelines.runs import Run
    from pipelines.stages import build_graph

    parsed = Recipe.load(recipe, overrides or [], named_store(store))
    _check_keep(keep, until)
    build_graph(parsed, dashboard_url="", keep=keep).selected(until)  # what is wrong is said now, not in a job's log
    opened = open_store(store)
    jobs.check(address)
    created = Run.create(opened, parsed.to_yaml(), run_id, until)
    arguments = ["resume", created.id, "--store", created.store.uri]
    arguments += ["--keep"] if keep else []
    try:
        job = jobs.submit(shlex.join(["python", "-m", "pipelines.cli", *arguments]), created.id, address=address)
    except BaseException:
        created.delete()
        raise
    if as_json:
        print_json({"run_id": created.id, "job_id": job.id, "store": created.store.uri})
    else:
        out.print(f"submitted run {created.id} to {created.store.uri}", highlight=False, markup=False)
    if follow:
        _follow(created.id, address)


@app.command()
def logs(
    run_id: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    address: AddressOption = None,
) -> None:
    """Print what a submitted run has printed."""
    from cluster import jobs

    if follow:
        _follow(run_id, address)
        return
    for piece in jobs.logs(run_id, address):
        sys.stdout.write(piece)


@app.command()
def stop(run_id: RunArgument, address: AddressOption = None) -> None:
    """End a submitted run; `caravan resume` goes on with it."""
    from cluster import jobs

    job = jobs.stop(run_id, address)
    out.print(f"job {job.id} is {job.status}", highlight=False)


def _follow(run_id: str, address: str | None) -> None:
    """Prints a job's log until it ends; a job that fails fails the command."""
    from cluster import jobs

    for piece in jobs.logs(run_id, address, follow=True):
        sys.stdout.write(piece)
        sys.stdout.flush()
    job = jobs.status(run_id, address)
    if job.status != "SUCCEEDED":
        fail(f"job {job.id} is {job.status}: {job.message}")


def _drive(
    recipe: Recipe,
    open_run: Callable[[], Run],
    store: str | None,
    until: str | None,
    keep: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Runs the stages of a recipe on a cluster and prints how it went.

    The run's folder is made last of all, so that a run that cannot start leaves nothing behind.
    """
    from cluster import session
    from cluster.serve import control
    from pipelines.pretrain import check_room
    from pipelines.progress import RunDisplay, print_summary
    from pipelines.report import summarise
    from pipelines.runs import one_line
    from pipelines.sources import DataError
    from pipelines.stages import build_graph

    started = time.monotonic()
    _check_keep(keep, until)
    build_graph(recipe, dashboard_url="", keep=keep).selected(until)
    console = err if as_json else out
    console.print("[dim]connecting to Ray, or starting it[/]")
    with session.connect(address) as connected:
        signal.signal(signal.SIGTERM, terminate)  # Ray has put a handler there that ends in a crash
        dashboard_url = connected.dashboard_url or ""
        if until in (None, "deploy"):
            # Now, and not after minutes of training.
            control.check_can_deploy(dashboard_url, recipe.serve.port, replace=keep)
        graph = build_graph(recipe, dashboard_url, keep)
        trains = any(stage.name == "pretrain" for stage in graph.selected(until))
        if trains and not graph.artifact(named_store(store), "pretrain").committed:
            check_room(recipe.model, recipe.train)
        run = open_run()
        only = f", until {until}" if until else ""
        console.print(f"[bold]run[/] {run.id} in {escape(run.store.uri)}{only}", highlight=False)
        try:
            with RunDisplay(console) as display:
                results = graph.run(run.store, run, until=until, on_event=display)
        except BaseException as error:
            options = {"--store": run.store.uri if store else None, "--address": address}
            again = resume_command(run.id, options, keep)
            expected = _expected(error)
            if expected is not None:
                print_error(one_line(expected))
            first = "change the data, or a setting with --set, and " if isinstance(expected, DataError) else ""
            console.print(f"{first}go on with it: {again}", highlight=False, markup=False, soft_wrap=True)
            if expected is None:
                raise
            raise typer.Exit(1) from error
        summary = summarise(run, results, time.monotonic() - started)
        if as_json:
            print_json(asdict(summary))
        else:
            print_summary(out, summary)
        if keep and connected.owned and summary.url:
            console.print(f"serving at {summary.url}/v1 until interrupted (Ctrl-C)", highlight=False)
            with suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)


def resume_command(run_id: str, options: Mapping[str, str | None], keep: bool) -> str:
    """What goes on with a run as it was begun, for a shell."""
    given = [part for option, value in options.items() if value is not None for part in (option, value)]
    return shlex.join(["caravan", "resume", run_id, *given, *(["--keep"] if keep else [])])


def _check_keep(keep: bool, until: str | None) -> None:
    if keep and until not in (None, "deploy"):
        fail(
            f"--keep leaves an endpoint running, but --until={until} starts none; leave --keep out, or give "
            "--until deploy"
        )


# --- the screen --------------------------------------------------------------------------------------------------


def _expected(error: BaseException) -> BaseException | None:
    """An error that the project raises on purpose, or None for anything else, which is a bug."""
    while isinstance(cause := getattr(error, "cause", None), BaseException) and cause is not error:
        error = cause  # raised in a Ray task, and wrapped
    ours = type(error).__module__.partition(".")[0] in ("llama", "cluster", "pipelines")
    return error if ours else None


def main() -> None:
    """Entry point: runs the command and turns an expected error into one line and exit code 1."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app()
    except SystemExit as ended:
        if ended.code in (INTERRUPTED, TERMINATED):
            err.print("interrupted" if ended.code == INTERRUPTED else "terminated")
        raise
    except Exception as error:
        from pipelines.runs import one_line

        expected = _expected(error)
        if expected is None:
            raise
        print_error(one_line(expected))
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
