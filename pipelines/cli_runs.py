"""The `caravan` commands that look at a run and take something out of it; neither needs a cluster."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pipelines.screen import JsonOption, RunArgument, StoreOption, named_store, out, print_json


def show(run_id: RunArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show a run: its stages, the training's last report, its checkpoints, plots and errors."""
    from pipelines.runs import Run
    from pipelines.show import print_view, view

    found = view(Run.open(named_store(store), run_id))
    if as_json:
        print_json(asdict(found))
    else:
        print_view(out, found)


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
