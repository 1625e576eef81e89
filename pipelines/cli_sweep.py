"""`caravan sweep`: one recipe, tried in several ways."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli_drive import DryRunOption, ForceOption, RunIdOption, Selection, SetOption, drive_new
from pipelines.screen import AddressOption, JsonOption, StoreOption, fail, named_store


def sweep(
    sweep: Annotated[Path, typer.Argument(help="YAML file of the sweep.")],
    overrides: SetOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report besides the run's own [default: none]", file_okay=False)
    ] = None,
    force: ForceOption = None,
    dry_run: DryRunOption = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe in several ways with several seeds and compare: a table, pictures, a report.

    It is a run like others (show, resume, gc): what is committed is skipped, and `caravan resume` goes on with one that
    was killed. A trial that fails does not hold up the others; the report names it, and the exit code is 1.
    """
    from pipelines.sweep.config import SweepConfig
    from pipelines.sweep.run import SweepRun

    if dry_run and out is not None:
        fail("--dry-run writes no report; leave --out out")
    config = SweepConfig.load(sweep, overrides or [])
    changes = [part for each in overrides or [] for part in ("--set", each)]
    kind = SweepRun(config, shlex.join(["caravan", "sweep", str(sweep), *changes]), out, named_store(store))
    drive_new(kind, Selection(force=tuple(force or ())), store, run_id, dry_run, address, as_json)
