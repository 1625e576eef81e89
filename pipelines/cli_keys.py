"""The `caravan keys` commands: who may ask an endpoint. None needs a cluster; a running endpoint reads the file again
by itself."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from pipelines.screen import JsonOption, err, out, print_json

keys = typer.Typer(help="API keys: who may ask an endpoint, and how much.", no_args_is_help=True)

FileOption = Annotated[str, typer.Option("--file", help="The key file, as for `caravan deploy --api-key-file`.")]
NameArgument = Annotated[str, typer.Argument(help="The key's name; it shows in metrics and traces.")]


@keys.command()
def add(
    name: NameArgument,
    file: FileOption,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="[default: no limit]")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Prompt and generated [default: no limit]")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at once [default: no limit]")] = None,
    priority: Annotated[int, typer.Option(help="The highest that its requests may have; lower is sooner.")] = 0,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Share no cached blocks with other keys, and the engines fairly.")
    ] = False,
    operator: Annotated[bool, typer.Option("--operator", help="Open /metrics and /caravan/... as well.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it: the file keeps only its hash, so it is shown this once."""
    from cluster.serve.keys import KeyFile, Keys, NoKeyFile

    key_file = KeyFile(file)
    with key_file.changing() as replace:
        try:
            known = key_file.read()
        except NoKeyFile:
            known = Keys()
        known, key = known.with_key(
            name,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrency=concurrency,
            priority=priority,
            isolated=isolated,
            operator=operator,
        )
        replace(known)
    if as_json:
        print_json({"name": name, "key": key, "file": key_file.uri})
    else:
        out.print(key, highlight=False, markup=False, soft_wrap=True)
        err.print(f"this is the only time that the key of {name} is shown; store it now", highlight=False, markup=False)


@keys.command("list")
def list_keys(file: FileOption, as_json: JsonOption = False) -> None:
    """Show the keys of a file: their names and limits."""
    from cluster.serve.keys import KeyFile

    records: list[dict[str, Any]] = [record.model_dump(exclude={"sha256"}) for record in KeyFile(file).read().keys]
    if as_json:
        print_json(records)
        return
    table = Table("name", "requests/min", "tokens/min", "at once", "priority", "isolated", "operator")
    for record in records:
        table.add_row(*["-" if value is None else _shown(value) for value in record.values()])
    out.print(table)


def _shown(value: object) -> str:
    return {True: "yes", False: ""}[value] if isinstance(value, bool) else str(value)


@keys.command()
def remove(name: NameArgument, file: FileOption, as_json: JsonOption = False) -> None:
    """Remove a key: within seconds endpoints let it in no more."""
    from cluster.serve.keys import KeyFile

    key_file = KeyFile(file)
    with key_file.changing() as replace:
        replace(key_file.read().without(name))
    if as_json:
        print_json({"name": name, "file": key_file.uri})
    else:
        out.print(f"removed the key of {name}", highlight=False, markup=False)
