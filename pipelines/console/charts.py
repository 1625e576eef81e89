"""Figures as ECharts draws them: options, made of a training's reports and of looks at the replicas. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.serve_status import Look

MOST_POINTS = 600
"""Of a curve on the screen, which is not wider."""

_GREY = "#8a8f98"
_COLORS = ["#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d"]


def thinned(rows: Sequence[Mapping[str, Any]], most: int = MOST_POINTS) -> list[Mapping[str, Any]]:
    """At most so many of the rows, evenly; the last one always, and each that has a validation loss."""
    if len(rows) <= most:
        return list(rows)
    stride = -(-len(rows) // most)
    last = len(rows) - 1
    return [row for i, row in enumerate(rows) if i % stride == 0 or i == last or row.get("val_loss") is not None]


def loss(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training and validation loss over the steps, nats per token."""
    points = thinned(rows)
    series = [_line("training", [[row["step"], row["loss"]] for row in points])]
    validated = [[row["step"], row["val_loss"]] for row in points if row["val_loss"] is not None]
    if validated:
        series.append(_line("validation", validated) | {"symbolSize": 6, "showSymbol": True})
    return _over_steps("loss, nats per token", series, scale=True)


def throughput(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens per second over the steps."""
    points = [[row["step"], row["tokens_per_second"]] for row in thinned(rows)]
    return _over_steps("tokens per second", [_line("tokens/s", points)], scale=False)


def expert_load(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What each expert of each layer got at the last step, against an even share; None for a dense model."""
    row = next((row for row in reversed(rows) if row["expert_load"]), None)
    if row is None:
        return None
    load = {int(layer): shares for layer, shares in row["expert_load"].items()}
    layers = sorted(load)
    experts = max(len(shares) for shares in load.values())
    cells = [
        [expert, place, round(share * len(load[layer]), 3)]
        for place, layer in enumerate(layers)
        for expert, share in enumerate(load[layer])
    ]
    name = f"expert load at step {row['step']:,}, 1 is an even share"
    return _titled(name) | {
        "tooltip": {"position": "top"},
        "grid": {"left": 70, "right": 20, "top": 44, "bottom": 92},
        "xAxis": _axis("expert", "category") | {"data": [str(expert) for expert in range(experts)]},
        "yAxis": {"type": "category", "data": [f"layer {layer}" for layer in layers], "axisLabel": {"color": _GREY}},
        "visualMap": {
            "min": 0,
            "max": max(2.0, *(cell[2] for cell in cells)),
            "orient": "horizontal",
            "left": "center",
            "bottom": 4,
            "calculable": True,
            "textStyle": {"color": _GREY},
            "inRange": {"color": ["#3b82f6", "#e5e7eb", "#ef4444"]},
        },
        "series": [
            {"type": "heatmap", "name": "load", "data": cells, "label": {"show": len(cells) <= 128, "color": "#111827"}}
        ],
    }


def replicas(looks: Iterable[tuple[float, Look]]) -> dict[str, Any]:
    """Requests and key/value memory of each replica over time. `looks`: milliseconds since the epoch, and what was
    seen."""
    requests: dict[str, list[Any]] = {}
    memory: dict[str, list[Any]] = {}
    for at, found in looks:
        for view in found.replicas:
            if view.running is not None:
                requests.setdefault(view.replica, []).append([at, view.running + (view.waiting or 0)])
            if view.kv_used is not None:
                memory.setdefault(view.replica, []).append([at, round(100 * view.kv_used, 1)])
    series = []
    for number, name in enumerate(sorted(requests | memory)):
        color = {"itemStyle": {"color": _COLORS[number % len(_COLORS)]}}
        series.append(_line(name, requests.get(name, [])) | color)
        series.append(
            _line(name, memory.get(name, []))
            | color
            | {"xAxisIndex": 1, "yAxisIndex": 1, "areaStyle": {"opacity": 0.1}}
        )
    times = {"type": "time", "axisLabel": {"color": _GREY, "hideOverlap": True}, "splitLine": {"show": False}}
    return {
        "aria": {"enabled": True},
        "title": [
            _title("requests, running and waiting"),
            _title("key/value memory used, %") | {"top": "53%"},
        ],
        "color": _COLORS,
        "animation": False,
        "tooltip": {"trigger": "axis"},
        "grid": [
            {"left": 56, "right": 20, "top": 40, "height": "30%"},
            {"left": 56, "right": 20, "top": "63%", "height": "28%"},
        ],
        "xAxis": [times | {"gridIndex": 0}, times | {"gridIndex": 1}],
        "yAxis": [
            _axis("", "value") | {"gridIndex": 0, "minInterval": 1},
            _axis("", "value") | {"gridIndex": 1, "min": 0, "max": 100},
        ],
        "series": series,
    }


def _over_steps(name: str, series: list[dict[str, Any]], *, scale: bool) -> dict[str, Any]:
    """`scale`: the axis need not begin at 0."""
    return _titled(name) | {
        "color": _COLORS,
        "animation": False,
        "tooltip": {"trigger": "axis"},
        "legend": {"show": len(series) > 1, "top": 2, "right": 12, "textStyle": {"color": _GREY}},
        "grid": {"left": 62, "right": 20, "top": 44, "bottom": 70},
        "dataZoom": [{"type": "inside"}, {"type": "slider", "height": 16, "bottom": 8}],
        "xAxis": _axis("step", "value") | {"min": "dataMin", "max": "dataMax"},
        "yAxis": _axis("", "value") | {"scale": scale},
        "series": series,
    }


def _titled(name: str) -> dict[str, Any]:
    return {"title": _title(name), "aria": {"enabled": True}}


def _title(name: str) -> dict[str, Any]:
    return {"text": name, "left": 8, "top": 4, "textStyle": {"fontSize": 13, "fontWeight": "normal", "color": _GREY}}


def _axis(name: str, kind: str) -> dict[str, Any]:
    return {
        "type": kind,
        "name": name,
        "nameLocation": "middle",
        "nameGap": 26,
        "nameTextStyle": {"color": _GREY},
        "axisLabel": {"color": _GREY, "hideOverlap": True},
        "splitLine": {"lineStyle": {"opacity": 0.25}},
    }


def _line(name: str, points: list[Any]) -> dict[str, Any]:
    return {"type": "line", "name": name, "data": points, "showSymbol": len(points) == 1}
