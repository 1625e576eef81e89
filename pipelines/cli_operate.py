"""The `caravan` commands for whoever looks after a store."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.screen import JsonOption, StoreOption, named_store, out, print_json


def gc(
    store: StoreOption = None,
    keep_last: Annotated[
        int | None, typer.Option(min=0, help="Keep the last so many runs that have ended [default: all]")
    ] = None,
    keep_days: Annotated[
        float | None, typer.Option(min=0, help="Keep runs that ended in the last so many days [default: all]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove artifacts, checkpoints and abandoned tries that no kept run and no deployment needs.

    A run is kept if it has not ended, or if --keep-last or --keep-days says so; without either all runs are. Runs that
    are not kept stay on record: to resume one makes its stages again.
    """
    from pipelines.garbage import collect, lines
    from pipelines.retention import Policy

    report = collect(named_store(store), Policy(keep_last, keep_days), dry_run)
    if as_json:
        print_json({"dry_run": dry_run, **report.as_json()})
    else:
        for line in lines(report, dry_run):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    if report.failed:
        raise typer.Exit(1)
