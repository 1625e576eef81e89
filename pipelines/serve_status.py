"""What `caravan status` shows: the controller's list of replicas beside the ingress's view of them. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cluster.serve.view import AppStatus

WIDE = 110
"""Columns of a screen from which a replica's node and weights have a column each."""


@dataclass(frozen=True)
class ReplicaView:
    """One replica; None: not known. `hit_rate`: of all its prompt tokens so far, those that it had in its cache.

    `tokens_per_s`: generated between this look and the one before.
    """

    replica: str
    state: str
    pid: int | None
    node_id: str | None
    weights_id: str | None = None
    fresh: bool | None = None
    draining: bool = False
    running: int | None = None
    waiting: int | None = None
    pending_prefill_s: float | None = None
    kv_used: float | None = None
    hit_rate: float | None = None
    tokens_per_s: float | None = None
    index_lag_s: float | None = None


@dataclass(frozen=True)
class Look:
    """The application at one moment. `reported`: each replica's generated tokens, and when it had that many."""

    status: AppStatus
    replicas: list[ReplicaView]
    reported: dict[str, tuple[float, int]]

    @property
    def tokens_per_s(self) -> float | None:
        known = [view.tokens_per_s for view in self.replicas if view.tokens_per_s is not None]
        return sum(known) if known else None

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.status),
            "tokens_per_s": self.tokens_per_s,
            "replicas": [asdict(view) for view in self.replicas],
        }


def look(status: AppStatus, at: float, before: Look | None = None) -> Look:
    """`at`: seconds of any clock, when `status` was asked for."""
    routing = {entry["replica"]: entry for entry in status.routing or []}
    reported = {
        name: (at - entry["age_s"], entry["load"]["generated_tokens"])
        for name, entry in routing.items()
        if entry["load"]
    }
    earlier = before.reported if before else {}
    views = [
        _view(process, routing.get(process["replica"]), _rate(process["replica"], earlier, reported))
        for process in (asdict(process) for process in status.replicas)
    ]
    return Look(status, views, reported)


def _view(process: Mapping[str, Any], entry: Mapping[str, Any] | None, tokens_per_s: float | None) -> ReplicaView:
    about = {name: process[name] for name in ("replica", "state", "pid", "node_id")}
    if entry is None:
        return ReplicaView(**about)
    info, load = entry["info"], entry["load"]
    view: dict[str, Any] = {"fresh": entry["fresh"], "index_lag_s": entry["lag_s"], "tokens_per_s": tokens_per_s}
    if info is not None:
        view["weights_id"] = info["weights_id"]
    if load is not None:
        view |= {name: load[name] for name in ("running", "waiting", "draining")}
        view["pending_prefill_s"] = load["pending_prefill_tokens"] * entry["prefill_s_per_token"]
        view["hit_rate"] = load["cached_tokens"] / load["prompt_tokens"] if load["prompt_tokens"] else None
        view["kv_used"] = 1 - load["free_blocks"] / info["num_blocks"] if info is not None else None
    return ReplicaView(**about, **view)


def _rate(replica: str, earlier: Mapping[str, tuple[float, int]], now: Mapping[str, tuple[float, int]]) -> float | None:
    if replica not in earlier or replica not in now:
        return None
    (before_s, before), (now_s, tokens) = earlier[replica], now[replica]
    return (tokens - before) / (now_s - before_s) if now_s > before_s else 0.0


# -- on the screen


def headline(found: Look) -> str:
    """The endpoint in one line."""
    status = found.status
    fresh = sum(bool(view.fresh) for view in found.replicas)
    parts = [
        f"{status.endpoint.served_name} at {status.endpoint.url}/v1: {status.state}",
        f"{len(found.replicas)} replica{'s' if len(found.replicas) != 1 else ''}, {fresh} live",
    ]
    if status.message:
        parts.insert(1, " ".join(status.message.split()))
    if status.autoscaling is not None:
        parts[-1] += ", from {} to {} as the load asks".format(*status.autoscaling)
    if found.tokens_per_s is not None:
        parts.append(f"{found.tokens_per_s:,.0f} tokens/s")
    if status.routing is None:
        parts.append("the endpoint does not answer")
    return ", ".join(parts)


def table(found: Look, width: int) -> Table:
    """The replicas, in a table that fits so many columns."""
    wide = width >= WIDE
    made = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="bold")
    columns: list[tuple[str, bool]] = [("replica", False), ("state", False), ("pid", True)]
    if wide:
        columns += [("node", False), ("weights", False)]
    for name in ("run", "wait", "prefill", "KV", "hits", "tok/s", "lag"):
        columns.append((name, True))
    columns.append(("events", False))
    for name, right in columns:
        made.add_column(name, justify="right" if right else "left", no_wrap=True)
    for view in found.replicas:
        made.add_row(*(cell for name, cell in _cells(view).items() if wide or name not in ("node", "weights")))
    return made


def lines(found: Look, at: time.struct_time) -> list[str]:
    """The same for what is no screen: a line for the endpoint, and one for each replica."""
    stamp = time.strftime("%H:%M:%S", at)
    replicas = [
        " ".join([stamp, view.replica, view.state, *(f"{name}={cell}" for name, cell in _named(view) if cell.plain)])
        for view in found.replicas
    ]
    return [f"{stamp} {headline(found)}", *replicas]


def _named(view: ReplicaView) -> list[tuple[str, Text]]:
    return [(name, cell) for name, cell in _cells(view).items() if name not in ("replica", "state")]


def _cells(view: ReplicaView) -> dict[str, Text]:
    events = {True: Text("live", "green"), False: Text("stale", "bold red"), None: Text("")}[view.fresh]
    state = "draining" if view.draining else view.state
    return {
        "replica": Text(view.replica),
        "state": Text(state, "" if state == "RUNNING" else "yellow"),
        "pid": Text(str(view.pid or "")),
        "node": Text((view.node_id or "")[:8]),
        "weights": Text((view.weights_id or "")[:8]),
        "run": _number(view.running),
        "wait": _number(view.waiting),
        "prefill": Text("" if view.pending_prefill_s is None else seconds(view.pending_prefill_s)),
        "KV": _percent(view.kv_used),
        "hits": _percent(view.hit_rate),
        "tok/s": _number(view.tokens_per_s),
        "lag": Text("" if view.index_lag_s is None else seconds(view.index_lag_s)),
        "events": events,
    }


def seconds(value: float) -> str:
    """`0`, `3.1ms`, `250ms`, `1.2s`: short enough for a column."""
    if value >= 1:
        return f"{value:.1f}s"
    return f"{1000 * value:.0f}ms" if value >= 0.0095 else f"{1000 * value:.1f}ms" if value >= 0.00005 else "0"


def _number(value: float | None) -> Text:
    return Text("" if value is None else f"{value:,.0f}")


def _percent(value: float | None) -> Text:
    return Text("" if value is None else f"{100 * value:.0f}%")
