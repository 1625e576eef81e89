"""The `caravan` command that draws what a component of a model does; it needs no cluster."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.screen import JsonOption, StoreOption, fail, named_store, out, print_json

if TYPE_CHECKING:
    from pipelines.explain.registry import Component, Loaded


def explain(
    component: Annotated[str | None, typer.Argument(help="Which one; without it they are listed.")] = None,
    to: Annotated[
        str | None, typer.Option("--out", help="Folder for the PNGs, made if need be [default: this one]")
    ] = None,
    text: Annotated[str | None, typer.Option(help="What routing sends to experts, or bpe merges.")] = None,
    preset: Annotated[str | None, typer.Option(help="Whose sizes: of rope, cache and routing.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Trained weights or tokenizer: a run with a checkpoint, or a Hugging Face directory."),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw what a component does, by the library's own code: pictures as PNG, and in words what they show.

    With --json also all numbers that are drawn. An option that the component does not use is refused.
    """
    from pipelines.explain import registry

    given = {"text": text, "preset": preset, "model": model, "store": store, "out": to}
    if component is None:
        if needless := [f"--{name}" for name, value in given.items() if value is not None]:
            fail(f"{', '.join(needless)}: of which component? caravan explain lists them")
        _list(as_json)
        return
    _refuse_others(component, registry.find(component), given)
    if "://" in (to or ""):
        fail(f"--out={to} is a URI; give a folder of this machine")
    loaded = None if model is None else _load(model, store)
    explanation = registry.explain(component, registry.Options(text, preset, loaded))
    folder = Path(to or ".")
    paths = _write(folder, explanation.pictures())
    if as_json:
        print_json(
            {
                "component": component,
                "says": explanation.lines,
                "pictures": paths,
                "numbers": registry.as_json(explanation.data),
            }
        )
        return
    for line in (*explanation.lines, *(f"wrote {path}" for path in paths)):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _list(as_json: bool) -> None:
    from rich.table import Table

    from pipelines.explain.registry import COMPONENTS

    if as_json:
        print_json(
            [
                {"name": name, "description": each.description, "options": [f"--{option}" for option in each.options]}
                for name, each in COMPONENTS.items()
            ]
        )
        return
    table = Table("component", "draws", "options", box=None)
    for name, each in COMPONENTS.items():
        table.add_row(name, each.description, " ".join(f"--{option}" for option in each.options))
    out.print(table)


def _refuse_others(name: str, component: Component, given: dict[str, str | None]) -> None:
    for option in ("text", "preset", "model"):
        if given[option] is not None and option not in component.options:
            uses = " and ".join(f"--{each}" for each in component.options) or "none of --text, --preset and --model"
            fail(f"--{option} means nothing to {name}, which takes {uses}; leave it out")
    if given["store"] is not None and given["model"] is None:
        fail("--store is where the run of --model lies; give that too, or leave it out")


def _load(model: str, store: str | None) -> Loaded:
    """The weights and the tokenizer of a run's last checkpoint, or of a Hugging Face directory on this machine."""
    import torch

    from llama.hf import load_pretrained
    from llama.tokenizer import Tokenizer
    from pipelines.explain.registry import Loaded

    if Path(model).is_dir():
        if store is not None:
            fail(f"--store says where a run lies, and --model={model} is a directory; leave --store out")
        try:
            return Loaded(model, load_pretrained(model, dtype=torch.float32), Tokenizer.load(model))
        except (ValueError, OSError) as error:
            fail(f"--model={model}: {error}")
    if "/" in model:
        fail(f"--model={model} is no folder here; give a Hugging Face directory of this machine, or a run's id")
    from pipelines.export import export_checkpoint
    from pipelines.runs import Run

    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(Run.open(named_store(store), model), "last", folder)
        return Loaded(model, load_pretrained(folder, dtype=torch.float32), Tokenizer.load(folder))


def _write(folder: Path, pictures: dict[str, bytes]) -> list[str]:
    from cluster.storage import StorageError, Store

    store = Store(folder.resolve())
    for name, picture in pictures.items():
        try:
            store.write_bytes(name, picture)
        except StorageError:
            fail(f"--out={folder}: {name} cannot be written there; choose another folder")
    return [str(folder / name) for name in pictures]
