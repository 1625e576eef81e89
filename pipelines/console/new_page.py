"""A new run: a recipe, what it would do, and into the queue."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from nicegui import ui

from pipelines.console.desk import Desk, told
from pipelines.console.frame import Banner, page
from pipelines.runs import new_run_id
from pipelines.service.api import parse_tags
from pipelines.service.errors import RequestRefused
from pipelines.service.intake import RunRequest

_STAGES_SHOWN = "what each stage would do"


def examples() -> dict[str, str]:
    """The recipes that come with the project, by name."""
    found = {entry.name: entry.read_text() for entry in files("pipelines").joinpath("recipes").iterdir()
             if entry.name.endswith(".yaml")}  # fmt: skip
    return dict(sorted(found.items()))


async def show(desk: Desk) -> None:
    """The page."""
    recipes = examples()
    with page("New run"):
        banner = Banner()
        with ui.row().classes("full-width items-center"):
            example = (
                ui.select(["", *recipes], value="", label="Begin with").props("dense outlined").classes("col-grow")
            )
        recipe = ui.textarea("Recipe, YAML").props("outlined spellcheck=false").classes("full-width mono")
        recipe.props('input-style="height: 22rem"')
        example.on_value_change(lambda event: recipe.set_value(recipes.get(event.value, "")))
        with ui.element("div").classes("charts q-mt-sm"):
            fields = {
                "overrides": ui.input("Overrides", placeholder="train.steps=100 tokenizer.vocab_size=2048"),
                "until": ui.input("Until stage", placeholder="export"),
                "from_stage": ui.input("From stage"),
                "force": ui.input("Make anew", placeholder="pretrain"),
                "tags": ui.input("Tags", placeholder="user=ana"),
                "priority": ui.input("Priority", value="0"),
            }
        for field in fields.values():
            field.props("dense outlined")
        keep = ui.checkbox("Leave its endpoint serving")
        with ui.row():
            enter = ui.button("Submit", on_click=lambda: submit())
            ui.button("What would it do?", on_click=lambda: foresee()).props("outline")
        plan = ui.table(rows=[], row_key="stage", columns=[
            {"name": name, "label": name, "field": name, "align": "left"} for name in ("stage", "action", "why")
        ]).classes("full-width")  # fmt: skip
        plan.props(f'flat bordered dense aria-label="{_STAGES_SHOWN}"')
        plan.visible = False

    @cache
    def run_id() -> str:
        """One, however often the form is sent: an answer that did not come in time may have been a yes."""
        return new_run_id()

    def asked() -> RunRequest:
        values = {name: str(field.value or "") for name, field in fields.items()}
        return request(recipe.value or "", values, run_id(), keep=keep.value)

    async def foresee() -> None:
        banner("")
        plan.visible = False
        with told(banner):
            steps = await desk.ask(desk.foresee, asked())
            plan.rows = [{"stage": step.stage, "action": step.action, "why": step.why} for step in steps]
            plan.visible = True

    async def submit() -> None:
        if not enter.enabled:  # a second click, which was under way
            return
        enter.disable()
        banner("")
        with told(banner):
            row = await desk.ask(desk.orchestrator.submit, asked())
            ui.navigate.to(f"/runs/{row.id}")
            return
        enter.enable()


def request(recipe: str, values: dict[str, str], run_id: str, *, keep: bool) -> RunRequest:
    """What the form says; lists are words. Raises RequestRefused."""
    words: dict[str, list[str]] = {name: values[name].split() for name in ("overrides", "force", "tags")}
    options: dict[str, Any] = {name: values[name].strip() or None for name in ("until", "from_stage")}
    return RunRequest(
        recipe,
        overrides=words["overrides"],
        run_id=run_id,
        force=words["force"],
        keep=keep,
        priority=_whole(values["priority"]),
        tags=parse_tags(words["tags"]),
        **options,
    )


def _whole(text: str) -> int:
    try:
        return int(text.strip() or "0")
    except ValueError:
        raise RequestRefused(f"priority={text[:40]!r} is no whole number", "priority") from None
