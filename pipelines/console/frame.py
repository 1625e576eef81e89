"""What all pages look like: the bar with the ways to the others, and small parts that more than one page has."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from nicegui import ui

from pipelines.follow import duration

LIVE_SECONDS = 2.0
"""Between two looks of a page."""

COLORS = {
    "queued": "grey-7",
    "pending": "grey-7",
    "starting": "indigo",
    "running": "primary",
    "stopping": "deep-orange-9",
    "stopped": "brown",
    "done": "green-8",
    "skipped": "teal-8",
    "failed": "negative",
    "lost": "negative",
}
"""Of a run's or a stage's state; the state is written there too."""

STATE_CELL = '<q-td :props="props"><q-badge :color="props.row.color" :label="props.value" /></q-td>'

_WAYS = {"Runs": "/", "New run": "/new", "Endpoint": "/endpoint"}

_CSS = """
.body--light { background: #f6f7f9 }
.page { width: 100%; max-width: 1100px; margin: 0 auto; padding: 12px }
.page .q-table th { font-weight: 600 }
.page .q-table td { white-space: normal }
.page .q-table td.keep { white-space: nowrap }
.panels > .q-panel > .q-tab-panel { padding: 8px 0 }
.mono, .mono textarea { font-family: ui-monospace, monospace; font-size: 12.5px; line-height: 1.45 }
.told { white-space: pre-wrap; overflow-wrap: anywhere }
.chart { height: 300px; width: 100% }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)) }
.charts { gap: 12px; width: 100% }
a:focus-visible, button:focus-visible { outline: 3px solid #f59e0b; outline-offset: 2px }
"""


@contextmanager
def page(title: str) -> Iterator[None]:
    """The block's elements are the page's content."""
    ui.page_title(f"{title} · Caravan")
    ui.add_css(_CSS)
    ui.colors(primary="#1d4ed8")  # white on it, and it on white, can be read
    with ui.header().classes("items-center q-py-xs").props("bordered"):
        ui.label("Caravan").classes("text-h6 q-mr-md")
        for name, target in _WAYS.items():
            ui.link(name, target).classes("text-white q-px-sm q-py-xs")
    with ui.element("main").classes("page"):
        ui.label(title).classes("text-h5 q-mb-sm").props("role=heading aria-level=1")
        yield


def empty(text: str) -> str:
    """The slot of a table that has no row."""
    return f'<span class="text-grey-8">{text}</span>'


class Banner:
    """One line on top that something does not work; gone when it does again."""

    def __init__(self) -> None:
        self._label = ui.label().classes("told bg-negative text-white q-pa-sm rounded-borders full-width")
        self._label.props('role=alert aria-live="polite"')
        self._label.visible = False

    def __call__(self, message: str) -> None:
        """Nothing, where the message is empty."""
        self._label.text = message
        self._label.visible = bool(message)


def note(message: str, *, good: bool = False) -> None:
    """A line that goes by itself."""
    ui.notify(message, type="positive" if good else "negative", multi_line=True, close_button="OK", timeout=8000)


def ago(then: float | None, now: float | None = None) -> str:
    """`3m05s ago`; nothing for None."""
    return "" if then is None else f"{duration(max(0.0, (time.time() if now is None else now) - then))} ago"


def spent(started: float | None, ended: float | None, now: float | None = None) -> str:
    """How long something took, or takes so far."""
    if started is None:
        return ""
    return duration(max(0.0, (ended or (time.time() if now is None else now)) - started))


async def confirmed(question: str, yes: str) -> bool:
    """Whether whoever is asked says so."""
    with ui.dialog() as dialog, ui.card():
        ui.label(question).classes("told")
        with ui.row().classes("full-width justify-end"):
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat autofocus")
            ui.button(yes, on_click=lambda: dialog.submit(True)).props("color=negative")
    answer = await dialog
    dialog.delete()
    return bool(answer)


def repeated(look: Callable[[], Awaitable[None]], seconds: float = LIVE_SECONDS) -> None:
    """Looks now and then again, one look at a time, as long as the page is open."""
    looking = False

    async def once() -> None:
        nonlocal looking
        if looking:
            return
        looking = True
        try:
            await look()
        finally:
            looking = False

    ui.timer(0, once, once=True)
    ui.timer(seconds, once)
