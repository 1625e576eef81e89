"""The `caravan` command.

Commands only parse, call and print. Every expected failure ends as one line on stderr and exit code 1. Ray and torch
are imported by the command that needs them: `--help` must not wait for either.
"""

from __future__ import annotations

import logging

import typer

from pipelines.cli_bench import bench
from pipelines.cli_chat import chat
from pipelines.cli_cluster import down, up
from pipelines.cli_drive import run
from pipelines.cli_explain import explain
from pipelines.cli_keys import keys
from pipelines.cli_operate import doctor, gc, render
from pipelines.cli_predict import predict
from pipelines.cli_resume import resume
from pipelines.cli_runs import export, show
from pipelines.cli_serve import deploy, scale, status, trace, undeploy
from pipelines.cli_service import delete, logs, runs, stop, submit
from pipelines.cli_sweep import sweep
from pipelines.screen import (
    INTERRUPTED,
    TERMINATED,
    err,
    expected_error,
    print_error,
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
for command in (
    up,
    down,
    run,
    sweep,
    resume,
    submit,
    runs,
    logs,
    stop,
    delete,
    show,
    export,
    deploy,
    scale,
    status,
    trace,
    chat,
    predict,
    undeploy,
    doctor,
    gc,
    explain,
):
    app.command()(command)

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
