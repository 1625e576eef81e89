"""The `caravan` command.

Commands only parse, call and print. Every expected failure ends as one line on stderr and exit code 1. Ray and torch
are imported by the command that needs them: `--help` must not wait for either.
"""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from pipelines.cli_bench import bench
from pipelines.cli_drive import (
    ForceOption,
    FromOption,
    KeepOption,
    RecipeArgument,
    RunIdOption,
    Selection,
    SetOption,
    UntilOption,
    resume,
    run,
)
from pipelines.cli_keys import keys
from pipelines.cli_operate import doctor, gc, render
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
    expected_error,
    fail,
    named_store,
    open_store,
    out,
    print_error,
    print_json,
)

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
app.add_typer(render, name="render")
for command in (run, resume, show, export, deploy, scale, status, trace, undeploy, doctor, gc):
    app.command()(command)

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
def submit(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    until: UntilOption = None,
    from_stage: FromOption = None,
    force: ForceOption = None,
    keep: KeepOption = False,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print the job's log until it ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe as a Ray job on a running cluster; prints the run's id."""
    from cluster import jobs
    from pipelines.generations import make_anew
    from pipelines.recipe import Recipe
    from pipelines.runs import Run
    from pipelines.user_stage import user_modules

    parsed = Recipe.load(recipe, overrides or [], named_store(store))
    selection = Selection(until, from_stage, tuple(force or ()), keep)
    opened = open_store(store)
    graph = selection.build(parsed, opened)  # what is wrong is said now, not in a job's log
    jobs.check(address)
    created = Run.create(opened, parsed.to_yaml(), run_id, until, from_stage)
    arguments = ["resume", created.id, "--store", created.store.uri]
    arguments += ["--keep"] if keep else []
    entrypoint = shlex.join(["python", "-m", "pipelines.cli", *arguments])
    try:
        make_anew(graph, selection.force, opened, created.id)
        job = jobs.submit(entrypoint, created.id, address=address, modules=user_modules(parsed.stages))
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


# --- the screen --------------------------------------------------------------------------------------------------


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

        expected = expected_error(error)
        if expected is None:
            raise
        print_error(one_line(expected))
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
