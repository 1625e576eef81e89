"""The `caravan` commands that look at a run and take something out of it; neither needs a cluster."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.screen import (
    AddressOption,
    JsonOption,
    RunArgument,
    StoreOption,
    err,
    named_store,
    out,
    print_json,
    service_for,
)

if TYPE_CHECKING:
    from pipelines.service.client import ServiceClient
    from pipelines.show import RunView


def show(
    run_id: RunArgument, store: StoreOption = None, address: AddressOption = None, as_json: JsonOption = False
) -> None:
    """Show a run: its state and stages, the training's last report, its checkpoints, plots and errors.

    State and stages are the service's word where there is one; all else is read from the store.
    """
    from pipelines.runs import Run
    from pipelines.show import print_view, view

    with service_for(address, store) as service:
        found = _ask(service, run_id, address) if service is not None else None
    found = found or view(Run.open(named_store(store), run_id))
    if as_json:
        print_json(asdict(found))
    else:
        print_view(out, found)


def _ask(service: ServiceClient, run_id: str, address: str | None) -> RunView | None:
    """None for a run that the service does not have, unless it is the one that was named."""
    from cluster.storage import StorageError, Store
    from pipelines.runs import Run, RunError
    from pipelines.service.client import ServiceRefused
    from pipelines.show import view, view_of_service

    try:
        answer = service.run(run_id)
    except ServiceRefused as error:
        if error.status != 404 or address is not None:
            raise
        return None  # it may be a run of another store
    stored = None
    try:
        stored = view(Run.open(Store(service.health()["store"]), run_id))
    except (RunError, StorageError) as error:  # the service is elsewhere, perhaps
        reason = f"reports, checkpoints and files are not shown, the service's store is not read from here: {error}"
        err.print(reason, highlight=False, markup=False, soft_wrap=True)
    return view_of_service(answer, stored)


def export(
    run_id: RunArgument,
    to: Annotated[str, typer.Option(help="Folder or URI for the Hugging Face directory; must be empty.")],
    step: Annotated[
        str, typer.Option(help="Of which checkpoint: a step, last, or best (lowest validation loss).")
    ] = "last",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model of any of a run's checkpoints, whatever the layout it was trained in, as a Hugging Face
    directory. The weights pass through this process's memory."""
    from pipelines.export import export_checkpoint
    from pipelines.runs import Run

    exported = export_checkpoint(Run.open(named_store(store), run_id), step, to)
    if as_json:
        print_json({"step": exported, "directory": to})
    else:
        out.print(f"wrote the model of step {exported} to {to}", highlight=False, markup=False, soft_wrap=True)
