"""The endpoint: its replicas and their load, how many there shall be, and a talk with the model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from nicegui import ui

from cluster.serve.errors import NotDeployed
from pipelines.chat import converse
from pipelines.console import charts
from pipelines.console.desk import Desk, told
from pipelines.console.frame import Banner, confirmed, note, page, repeated
from pipelines.serve_status import Look, ReplicaView, headline, seconds

_COLUMNS = [
    {"name": name, "label": label, "field": name, "align": "left"}
    for name, label in (
        ("replica", "replica"), ("state", "state"), ("running", "running"), ("waiting", "waiting"), ("kv", "KV used"),
        ("hits", "cache hits"), ("speed", "tokens/s"), ("lag", "event lag"), ("weights", "weights"),
    )
]  # fmt: skip
_LOOKS_DRAWN = 150


async def show(desk: Desk) -> None:
    """The page."""
    seen: deque[tuple[float, Look]] = deque(maxlen=_LOOKS_DRAWN)

    def latest() -> Look | None:
        return seen[-1][1] if seen else None

    with page("Endpoint"):
        banner = Banner()
        line = ui.label().classes("told q-mb-sm").props('role=status aria-live="polite"')
        nothing = ui.label(
            "Nothing is deployed. caravan deploy RUN does it, or a run that leaves its endpoint serving."
        )
        nothing.visible = False
        key = ui.input("Operator's key, where the endpoint asks for one", password=True).props("dense outlined")
        key.classes("full-width q-mb-sm").props("autocomplete=off")
        with ui.column().classes("full-width") as content:
            table = ui.table(rows=[], columns=_COLUMNS, row_key="replica").classes("full-width")
            table.props('flat bordered dense :grid="Quasar.Screen.lt.sm"')
            _Scale(desk, latest)
            chart = ui.echart(charts.replicas([])).classes("full-width").style("height: 420px")
            _Chat(latest, lambda: key.value or None)
        content.visible = False

    async def look() -> None:
        try:
            found = await desk.look(key.value or None, latest())
        except NotDeployed:
            seen.clear()
            nothing.visible, content.visible, line.text = True, False, ""
            banner("")
            return
        seen.append((1000 * time.time(), found))
        nothing.visible, content.visible = False, True
        banner("" if found.status.routing is not None else _silent(found))
        line.text = headline(found)
        table.rows = [cells(view) for view in found.replicas]
        chart.options.clear()
        chart.options.update(charts.replicas(seen))

    async def safely() -> None:
        with told(banner):
            await look()

    repeated(safely)


def _silent(found: Look) -> str:
    return f"{found.status.endpoint.url} does not say how its replicas are: it does not answer, or asks for a key"


def cells(view: ReplicaView) -> dict[str, Any]:
    """A row of the table of replicas; what is not known is a dash."""

    def known(value: float | None, shown: Callable[[float], str]) -> str:
        return "–" if value is None else shown(value)

    return {
        "replica": view.replica,
        "state": "draining" if view.draining else view.state + ("" if view.fresh in (True, None) else ", stale"),
        "running": known(view.running, "{:,.0f}".format),
        "waiting": known(view.waiting, "{:,.0f}".format),
        "kv": known(view.kv_used, "{:.0%}".format),
        "hits": known(view.hit_rate, "{:.0%}".format),
        "speed": known(view.tokens_per_s, "{:,.0f}".format),
        "lag": known(view.index_lag_s, seconds),
        "weights": (view.weights_id or "–")[:8],
    }


class _Scale:
    """How many replicas there shall be."""

    def __init__(self, desk: Desk, latest: Callable[[], Look | None]) -> None:
        self._desk, self._latest = desk, latest
        with ui.row().classes("items-center"):
            self._number = ui.number("Replicas", value=1, min=1, max=1000, precision=0).props("dense outlined")
            self._button = ui.button("Scale", on_click=self._scale)
            self._line = ui.label().props('role=status aria-live="polite"')

    async def _scale(self) -> None:
        wanted, found = int(self._number.value or 0), self._latest()
        if wanted < 1:
            note("Replicas must be 1 or more.")
            return
        autoscaling = found.status.autoscaling if found else None
        if autoscaling is not None and not await confirmed(
            "The number follows the load now. A number that is set ends that; go on?", "Set it"
        ):
            return
        self._button.disable()
        self._line.text = f"waiting until {wanted} replica{'s' if wanted > 1 else ''} serve{'' if wanted > 1 else 's'}"
        try:
            with told(note):
                await self._desk.scale(wanted)
                note(f"{wanted} replica{'s' if wanted > 1 else ''} running.", good=True)
        finally:
            self._line.text = ""
            self._button.enable()


class _Chat:
    """A conversation with the model; it is nowhere but on this page."""

    def __init__(self, latest: Callable[[], Look | None], key: Callable[[], str | None]) -> None:
        self._latest, self._key = latest, key
        self._messages: list[dict[str, str]] = []
        with ui.card().classes("full-width").props("flat bordered"):
            ui.label("Talk to it").classes("text-h6").props("role=heading aria-level=2")
            self._talk = (
                ui.column().classes("full-width").props('role=log aria-live="polite" aria-label="conversation"')
            )
            with ui.row().classes("full-width items-center no-wrap"):
                self._text = ui.input("Message").classes("col").props("dense outlined maxlength=4000")
                self._text.on("keydown.enter", self._send)
                self._button = ui.button("Send", on_click=self._send)
            with ui.row().classes("items-center"):
                self._longest = (
                    ui.number("Tokens at most", value=64, min=1, max=4096, precision=0)
                    .props("dense")
                    .style("min-width: 9rem")
                )
                self._anew = ui.button("Begin anew", on_click=self._forget).props("flat")

    def _forget(self) -> None:
        self._messages.clear()
        self._talk.clear()

    async def _send(self) -> None:
        text, found = (self._text.value or "").strip(), self._latest()
        if not text or found is None or not self._button.enabled:
            return
        self._text.value = ""
        asked = [*self._messages, {"role": "user", "content": text}]
        with self._talk:
            ui.chat_message(text, name="you", sent=True).classes("full-width").props("bg-color=blue-2")
            said = ui.chat_message(name=found.status.endpoint.served_name).classes("full-width")
            with said.props("bg-color=grey-3"), ui.column().classes("gap-none"):
                reply = ui.label("…").classes("told text-black")
                counts = ui.label().classes("text-caption text-black told")
        self._button.disable()
        self._anew.disable()
        with told(counts.set_text):
            answer = await self._listen(found, asked, reply, counts)
            self._messages = [*asked, {"role": "assistant", "content": answer}]
        if not self._button.is_deleted:
            self._button.enable()
            self._anew.enable()

    async def _listen(self, found: Look, asked: list[dict[str, str]], reply: ui.label, counts: ui.label) -> str:
        endpoint, said = found.status.endpoint, ""
        most = int(self._longest.value or 64)
        async with aclosing(converse(endpoint.url, endpoint.served_name, asked, self._key(), most)) as pieces:
            async for piece in pieces:
                if reply.is_deleted:  # nobody reads it: the endpoint need not go on
                    break
                said += piece.text
                reply.text = said
                if piece.prompt_tokens is not None:
                    counts.text = piece.counts()
        return said
