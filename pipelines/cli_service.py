"""The `caravan` commands around submitted runs.

They ask the service where there is one: that of `caravan up`, or the one that --address names. Without one, and for
another store than its own, they ask Ray's Jobs API and read the store themselves.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.cli_drive import (
    ForceOption,
    FromOption,
    KeepOption,
    RecipeArgument,
    RunIdOption,
    Selection,
    SetOption,
    UntilOption,
)
from pipelines.screen import (
    AddressOption,
    JsonOption,
    RunArgument,
    StoreOption,
    err,
    fail,
    named_store,
    open_store,
    out,
    print_json,
    service_for,
)

if TYPE_CHECKING:
    from pipelines.run_kinds import RunKind
    from pipelines.service.client import ServiceClient

FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Print the job's log until it ends.")]
TagOption = Annotated[list[str] | None, typer.Option("--tag", help="name=value; may be repeated.")]
_STOP_SECONDS = 60.0
_SHOWN = 50


# --- runs -----------------------------------------------------------------------------------------------------------


def submit(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    until: UntilOption = None,
    from_stage: FromOption = None,
    force: ForceOption = None,
    keep: KeepOption = False,
    priority: Annotated[int, typer.Option(help="-100 to 100; of the runs that wait the highest is first.")] = 0,
    tag: TagOption = None,
    address: AddressOption = None,
    follow: FollowOption = False,
    as_json: JsonOption = False,
) -> None:
    """Queue a run of a recipe at the cluster's service, or without one start it as a Ray job; prints the run's id."""
    from pipelines.recipe import Recipe
    from pipelines.run_kinds import RecipeRun

    selection = Selection(until, from_stage, tuple(force or ()), keep)
    with service_for(address, store) as found:
        home = named_store(found.health()["store"]) if found is not None else named_store(store)
        parsed = Recipe.load(recipe, overrides or [], home)
        if found is not None:
            body = {"recipe": parsed.to_yaml(), "run_id": run_id, **asdict(selection), "priority": priority}
            queued = found.submit({**body, "tags": _tags(tag)})
            submitted = {"run_id": queued["id"], "state": queued["state"], "store": home.uri}
        else:
            if priority or tag:
                fail("--priority and --tag are for a service, and there is none; start one: caravan up")
            submitted = _submit_job(RecipeRun(parsed), selection, store, run_id, address)
        print_submitted(submitted, as_json)
        if follow and found is not None:
            _follow_run(found, submitted["run_id"])
        elif follow:
            _follow_job(submitted["run_id"], address)


def print_submitted(submitted: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        print_json(submitted)
    else:
        line = f"submitted run {submitted['run_id']} to {submitted['store']}"
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _submit_job(
    kind: RunKind, selection: Selection, store: str | None, run_id: str | None, address: str | None
) -> dict[str, str]:
    """The driver as a Ray job, at once."""
    from cluster import jobs
    from pipelines.generations import make_anew
    from pipelines.runs import Run

    opened = open_store(store)
    graph = selection.build(kind, opened)  # what is wrong is said now, not in a job's log
    jobs.check(address)
    created = Run.create(opened, kind.to_yaml(), run_id, selection.until, selection.from_stage)
    arguments = ["resume", created.id, "--store", created.store.uri]
    arguments += ["--keep"] if selection.keep else []
    entrypoint = shlex.join(["python", "-m", "pipelines.cli", *arguments])
    try:
        make_anew(graph, selection.force, opened, created.id)
        job = jobs.submit(entrypoint, created.id, address=address, modules=kind.modules())
    except BaseException:
        created.delete()
        raise
    return {"run_id": created.id, "job_id": job.id, "store": created.store.uri}


def runs(
    state: Annotated[list[str] | None, typer.Option(help="Only runs in this state; may be repeated.")] = None,
    tag: TagOption = None,
    name: Annotated[str, typer.Option(help="Part of the run's id or of its recipe's name.")] = "",
    since: Annotated[str | None, typer.Option(help="Created then or later: 2026-01-31 or 2026-01-31T12:00:00.")] = None,
    sort: Annotated[str, typer.Option(help="created, ended, priority, state or id.")] = "created",
    ascending: Annotated[bool, typer.Option("--ascending", help="The smallest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Show so many.")] = _SHOWN,
    offset: Annotated[int, typer.Option(min=0, help="Leave out the first so many.")] = 0,
    store: StoreOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs of a store, newest first. Needs no cluster."""
    from pipelines.service.index import SORTS, RunIndex, Selection
    from pipelines.service.submission import STATES

    if sort not in SORTS:
        fail(f"--sort={sort} is none of {', '.join(SORTS)}")
    for each in state or []:
        if each not in STATES:
            fail(f"--state={each} is none of {', '.join(STATES)}")
    from_time = _seconds(since)
    with service_for(address, store) as found:
        if found is not None:
            query = {"state": state, "tag": tag, "name": name, "since": from_time, "sort": sort, "ascending": ascending}
            answer = found.runs({**query, "limit": limit, "offset": offset})
            rows, total = answer["runs"], answer["total"]
        else:
            index = RunIndex(named_store(store))
            index.refresh()
            selection = Selection(
                tuple(state or ()),
                _tags(tag),
                name,
                from_time,
                sort,
                ascending,
                limit,
                offset,  # type: ignore[arg-type]
            )
            selected, total = selection.of(index.rows())
            rows = [asdict(row) for row in selected]
    if as_json:
        print_json({"runs": rows, "total": total})
    else:
        _print_runs(rows, total)


def logs(run_id: RunArgument, follow: FollowOption = False, address: AddressOption = None) -> None:
    """Print what a submitted run has printed."""
    from cluster import jobs
    from pipelines.service.client import ServiceRefused

    with service_for(address, None) as found:
        try:
            if found is not None:
                _follow_run(found, run_id) if follow else _write(found.logs(run_id))
                return
        except ServiceRefused as error:
            if error.status != 404:
                raise  # else it may be a run of another store, which went past the service
    if follow:
        _follow_job(run_id, address)
    else:
        _write(jobs.logs(run_id, address))


def stop(run_id: RunArgument, address: AddressOption = None) -> None:
    """Take a submitted run out of the queue, or end it; `caravan resume` goes on with it."""
    from cluster import jobs
    from pipelines.service.client import ServiceRefused
    from pipelines.service.submission import OVER

    with service_for(address, None) as found:
        if found is not None:
            try:
                if found.run(run_id)["state"] not in OVER | {"stopping"}:
                    found.stop(run_id)
                run = found.await_state(run_id, OVER, _STOP_SECONDS)
                out.print(f"run {run_id} is {run['state']}", highlight=False)
                return
            except ServiceRefused as error:
                if error.status != 404:
                    raise  # else it may be a run of another store, which went past the service
        job = jobs.stop(run_id, address)
        out.print(f"job {job.id} is {job.status}", highlight=False)


def delete(run_id: RunArgument, store: StoreOption = None, address: AddressOption = None) -> None:
    """Remove the folder of a run that is over: its recipe, states, plots. Its artifacts stay."""
    from pipelines.runs import Run
    from pipelines.service.index import delete_run, read_run
    from pipelines.service.submission import OVER

    with service_for(address, store) as found:
        if found is not None:
            found.delete(run_id)
        else:
            home = named_store(store)
            Run.open(home, run_id)  # which says so if there is none, and names those like it
            run = read_run(home, run_id, submitted=True)
            state = run.row(time.time()).state if run is not None else "gone"
            if state not in OVER:
                fail(f"run {run_id} is {state}; stop it first")
            delete_run(home, run_id)
    out.print(f"run {run_id} is deleted; its artifacts stay", highlight=False)


# --- how they do it -------------------------------------------------------------------------------------------------


def _follow_run(service: ServiceClient, run_id: str) -> None:
    """Prints a run's log from when it starts until it is over; a run that does not end well fails the command."""
    from pipelines.service.client import ServiceRefused
    from pipelines.service.submission import OVER

    told = ""
    while (run := service.run(run_id))["state"] == "queued":
        if run["waits_for"] != told:
            told = run["waits_for"]
            err.print(told, highlight=False, markup=False)
        time.sleep(0.5)
    while True:
        try:
            _write(service.logs(run_id, follow=True))
            break
        except ServiceRefused as error:  # its job is not there yet
            if error.status != 404 or service.run(run_id)["state"] != "starting":
                raise
            time.sleep(0.5)
    run = service.await_state(run_id, OVER, _STOP_SECONDS)
    if run["state"] != "done":
        fail(f"run {run_id} is {run['state']}: {run['error']}".rstrip(": "))


def _follow_job(run_id: str, address: str | None) -> None:
    """Prints a job's log until it ends; a job that fails fails the command."""
    from cluster import jobs

    _write(jobs.logs(run_id, address, follow=True))
    job = jobs.status(run_id, address)
    if job.status != "SUCCEEDED":
        fail(f"job {job.id} is {job.status}: {job.message}")


def _write(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


def _tags(given: list[str] | None) -> dict[str, str]:
    for each in given or []:
        if not all(each.partition("=")):
            fail(f"--tag={each} is not of the form name=value")
    return {name: value for name, _, value in (each.partition("=") for each in given or [])}


def _seconds(since: str | None) -> float | None:
    if since is None:
        return None
    try:
        return datetime.fromisoformat(since).timestamp()
    except ValueError:
        fail(f"--since={since} is no time, such as 2026-01-31 or 2026-01-31T12:00:00")


def _print_runs(rows: list[Mapping[str, Any]], total: int) -> None:
    from pipelines.follow import duration

    table = Table("run", "recipe", "state", "created", "took", "tags", "")
    for row in rows:
        created = f"{datetime.fromtimestamp(row['created']):%Y-%m-%d %H:%M}" if row["created"] else ""
        end = row["ended"] if row["ended"] is not None else time.time()
        took = duration(max(0.0, end - row["started"])) if row["started"] and row["state"] != "queued" else ""
        tags = " ".join(f"{name}={value}" for name, value in row["tags"].items())
        what = row["error"] or row["waits_for"] or row["stage"]
        table.add_row(row["id"], row["name"], row["state"], created, took, escape(tags), escape(what))
    out.print(table)
    if len(rows) < total:
        out.print(f"{len(rows)} of {total}; --limit and --offset show the others", highlight=False)
