"""`caravan resume`: a run goes on where it was begun, in the queue of its service or driven from this process."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli_drive import ForceOption, KeepOption, SetOption, drive_again
from pipelines.cli_service import print_submitted
from pipelines.screen import AddressOption, JsonOption, RunArgument, StoreOption, fail, service_for

if TYPE_CHECKING:
    from pipelines.service.client import ServiceClient

ResumeUntilOption = Annotated[
    str | None, typer.Option(help="Run this stage and what it needs from now on [default: as the run was begun]")
]


def resume(
    run_id: RunArgument,
    overrides: SetOption = None,
    store: StoreOption = None,
    until: ResumeUntilOption = None,
    force: ForceOption = None,
    keep: KeepOption = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run that ended early, with the stages that it was begun for: committed ones are skipped, training
    goes on from its last checkpoint.

    A run that was submitted to a service is queued there again, as it was submitted. To go on with it otherwise (--set,
    --force, another --until, --keep) name the Ray cluster with --address: it is then driven from here, past the queue.
    """
    from cluster.head import JOB_ID

    if JOB_ID not in os.environ:  # else this is the driver that the service has started
        with service_for(address, store) as service:
            submission = None if service is None else _submission(service, run_id, address)
            if service is not None and submission is not None:
                changes = _changes(submission, overrides, until, force, keep)
                if changes:
                    _refuse(service, run_id, changes, address)
                home = service.health()["store"]
                queued = service.resume(run_id)
                print_submitted({"run_id": queued["id"], "state": queued["state"], "store": home}, as_json)
                return
    drive_again(run_id, overrides or [], store, until, tuple(force or ()), keep, address, as_json)


def _submission(service: ServiceClient, run_id: str, address: str | None) -> Mapping[str, Any] | None:
    """None for a run that is to be driven from here: the service has none of that id, or it did not come through it. A
    service that was named has the last word itself."""
    from pipelines.service.client import ServiceRefused

    try:
        found = service.run(run_id)["submission"]
    except ServiceRefused as error:
        if error.status != 404 or address is not None:
            raise
        return None  # it may be a run of another store
    return {} if found is None and address is not None else found


def _changes(
    submission: Mapping[str, Any], overrides: list[str] | None, until: str | None, force: list[str] | None, keep: bool
) -> list[str]:
    """The options that ask for something else than was submitted."""
    given = [part for each in overrides or [] for part in ("--set", each)]
    given += [part for each in force or [] for part in ("--force", each)]
    given += ["--until", until] if until is not None and until != submission.get("until") else []
    return given + (["--keep"] if keep and not submission.get("keep") else [])


def _refuse(service: ServiceClient, run_id: str, changes: list[str], address: str | None) -> None:
    from cluster.head import recorded

    record = recorded() if address is None else None
    ray = record.address if record is not None else "HOST:PORT"
    here = ["caravan", "resume", run_id, *changes, "--store", service.health()["store"], "--address", ray]
    options = " and ".join(dict.fromkeys(each for each in changes if each.startswith("--")))
    fail(
        f"the service goes on with run {run_id} as it was submitted; leave {options} out, or drive it from here, past "
        f"the queue: {shlex.join(here)}"
    )
