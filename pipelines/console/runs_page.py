"""The list of runs, live, and what the cluster has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nicegui import ui

from pipelines.console.desk import Desk
from pipelines.console.frame import COLORS, STATE_CELL, Banner, ago, empty, page, repeated, spent
from pipelines.service.door import CONSOLE
from pipelines.service.index import Selection
from pipelines.service.known import RunRow
from pipelines.service.submission import STATES

PAGE_LENGTH = 25

_RUN_CELL = f"""
<q-td :props="props"><a class="text-primary" :href="'{CONSOLE}/runs/' + encodeURIComponent(props.row.id)">
{{{{ props.row.id }}}}</a></q-td>"""
_CARD = f"""
<div class="q-pa-xs col-12"><q-card flat bordered class="q-pa-sm">
<div class="row items-center justify-between"><a class="text-primary text-weight-medium"
:href="'{CONSOLE}/runs/' + encodeURIComponent(props.row.id)">{{{{ props.row.id }}}}</a>
<q-badge :color="props.row.color" :label="props.row.state" /></div>
<div>{{{{ props.row.name }}}} <span class="text-grey-7">{{{{ props.row.created }}}}</span></div>
<div class="told">{{{{ props.row.about }}}}</div></q-card></div>"""
_COLUMNS = [
    {"name": name, "label": name, "field": name, "align": "left"}
    for name in ("run", "name", "state", "created", "took", "priority", "about")
]


async def show(desk: Desk) -> None:
    """The page."""
    with page("Runs"):
        banner = Banner()
        room = ui.label().classes("text-grey-8 q-mb-sm")
        with ui.row().classes("items-center full-width"):
            state = ui.select(["all", *STATES], value="all", label="State").classes("col-grow").props("dense outlined")
            name = ui.input("Name").classes("col-grow").props("dense outlined clearable")
            tag = ui.input("Tag", placeholder="user=ana").classes("col-grow").props("dense outlined clearable")
        table = ui.table(rows=[], columns=_COLUMNS, row_key="id").classes("full-width q-mt-sm")
        table.props('flat bordered :grid="Quasar.Screen.lt.sm"')
        table.add_slot("no-data", empty("no such run"))
        table.add_slot("body-cell-run", _RUN_CELL)
        table.add_slot("body-cell-state", STATE_CELL)
        table.add_slot("item", _CARD)
        with ui.row().classes("items-center q-mt-sm"):
            pages = ui.pagination(1, 1, direction_links=True)
            count = ui.label().classes("text-grey-8")

    async def look() -> None:
        selection = Selection(
            () if state.value == "all" else (state.value,),
            _tags(tag.value),
            name.value or "",
            offset=PAGE_LENGTH * (int(pages.value) - 1),
            limit=PAGE_LENGTH,
        )
        found, total = selection.of(desk.orchestrator.rows())
        table.rows = [cells(row) for row in found]
        pages.max = max(1, -(-total // PAGE_LENGTH))
        pages.value = min(int(pages.value), pages.max)
        count.text = f"{total:,} run{'s' if total != 1 else ''}"
        room.text = in_one_line(desk.orchestrator.cluster())
        banner("; ".join(f"{what}: {why}" for what, why in desk.orchestrator.health()["problems"].items()))

    for control in (state, name, tag, pages):
        control.on_value_change(look)
    repeated(look)


def cells(row: RunRow, now: float | None = None) -> dict[str, Any]:
    """A row of the table. Text, and of few characters: it is sent again and again."""
    tags = " ".join(f"{name}={value}" for name, value in row.tags.items())
    about = row.error or row.waits_for or (f"at {row.stage}" if row.stage else "")
    return {
        "id": row.id,
        "run": row.id,
        "name": row.name,
        "state": row.state,
        "color": COLORS[row.state],
        "created": ago(row.created, now),
        "took": spent(row.started, row.ended, now),
        "priority": row.priority,
        "about": " · ".join(part for part in (about[:300], tags) if part),
    }


def in_one_line(cluster: Mapping[str, Any]) -> str:
    """`CPU: 1 of 2 taken by runs, 0 by others`, for each kind that there is; and how many wait."""
    parts = []
    for kind, all_of_it in cluster["capacity"].items():
        if not all_of_it:
            continue
        ours = sum(needs.get(kind, 0) for needs in cluster["running"].values())
        others = cluster["others"].get(kind, 0)
        parts.append(f"{kind}: {ours:g} of {all_of_it:g} taken by runs" + (f", {others:g} by others" if others else ""))
    waiting = len(cluster["waiting"])
    return "; ".join([*parts, f"{waiting} waiting"]) if parts else "the cluster has not been looked at yet"


def _tags(given: str | None) -> dict[str, str]:
    """Of `name=value`; nothing until it is whole."""
    name, _, value = (given or "").partition("=")
    return {name.strip(): value.strip()} if name.strip() and value.strip() else {}
