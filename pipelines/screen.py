"""What the commands share: where they print, how they fail, how they end on a signal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from cluster.storage import Store
    from pipelines.service.client import ServiceClient

out, err = Console(), Console(stderr=True)

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C (typer's own) and SIGTERM: 128 and the signal's number."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; progress goes to stderr.")]
RunArgument = Annotated[str, typer.Argument(help="Id of a run in the store.")]
StoreOption = Annotated[
    str | None, typer.Option(help="Folder or URI for artifacts and runs [default: $CARAVAN_HOME/store]")
]

AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster: host:port, auto (one on this machine) or local (a new one). "
        "Default: $RAY_ADDRESS, else the one of `caravan up`, else local."
    ),
]


def named_store(uri: str | None) -> Store:
    from cluster.head import caravan_home
    from cluster.storage import Store, has_credentials

    if uri is not None and has_credentials(uri):
        fail("--store carries credentials; put them in the environment of the cluster's nodes")
    return Store(uri or caravan_home() / "store")


def open_store(uri: str | None) -> Store:
    """Raises StorageError unless it can be written to."""
    store = named_store(uri)
    store.check_writable()
    if uri is None:
        from cluster.head import make_home

        make_home()
    return store


@contextmanager
def service_for(address: str | None, store: str | None) -> Iterator[ServiceClient | None]:
    """The service to ask; None if there is none, or if it keeps another store than the one that is named."""
    from pipelines.service.client import find_service

    found = find_service(address)
    try:
        if found is not None and store is not None and found.health()["store"] != named_store(store).uri:
            yield None
        else:
            yield found
    finally:
        if found is not None:
            found.close()


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_json_line(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


@contextmanager
def only_json(as_json: bool) -> Iterator[None]:
    """What libraries print inside the block goes to stderr, so that stdout has JSON and nothing else."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def print_error(message: str) -> None:
    err.print("[bold red]error:[/]", end=" ")
    err.print(" ".join(message.split()), highlight=False, markup=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    print_error(message)
    raise typer.Exit(1)


def expected_error(error: BaseException) -> BaseException | None:
    """An error that the project raises on purpose, or None for anything else, which is a bug."""
    while isinstance(cause := getattr(error, "cause", None), BaseException) and cause is not error:
        error = cause  # raised in a Ray task, and wrapped
    ours = type(error).__module__.partition(".")[0] in ("llama", "cluster", "pipelines")
    return error if ours else None


def terminate(signum: int, frame: object) -> None:
    """A handler of SIGTERM that unwinds the stack."""
    raise SystemExit(TERMINATED)
