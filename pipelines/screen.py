"""What the commands share: where they print, how they fail, how they end on a signal."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

out, err = Console(), Console(stderr=True)

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C (typer's own) and SIGTERM: 128 and the signal's number."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; progress goes to stderr.")]


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_error(message: str) -> None:
    err.print("[bold red]error:[/]", end=" ")
    err.print(" ".join(message.split()), highlight=False, markup=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    print_error(message)
    raise typer.Exit(1)


def terminate(signum: int, frame: object) -> None:
    """A handler of SIGTERM that unwinds the stack."""
    raise SystemExit(TERMINATED)
