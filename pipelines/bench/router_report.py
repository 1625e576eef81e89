"""What a comparison of routing policies says: figures, who is better by how much, and the table."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

OURS = "caravan"
METRICS = ("ttft_mean", "ttft_p99", "e2e_mean")
"""Compared with the best peer in each; lower is better."""

Figures = dict[str, Any]


class Findings:
    """Figures as they come, by policy and setting: one run of each, or several."""

    def __init__(self, peers: Iterable[str]) -> None:
        self._peers = tuple(peers)
        self._runs: dict[str, dict[str, list[Figures]]] = {}

    def add(self, policy: str, setting: str, figures: Figures) -> None:
        """One more run."""
        self._runs.setdefault(policy, {}).setdefault(setting, []).append(figures)

    def rivals(self) -> list[tuple[str, str]]:
        """Policy and setting of ours and of the best peer, by the mean time to the first token; if both have run."""
        peers = [(self._mean(name, own, "ttft_mean"), name, own) for name, own in self._settings(self._peers)]
        if OURS not in self._runs or not peers:
            return []
        _, name, setting = min(peers)
        return [(OURS, ""), (name, setting)]

    def policies(self) -> dict[str, Figures]:
        """Of each policy its best setting's figures, of the first run, and those of all settings beside them."""
        found = {}
        for policy, settings in self._runs.items():
            best = min(settings, key=lambda setting: self._mean(policy, setting, "ttft_mean"))
            found[policy] = dict(settings[best][0])
            if list(settings) != [""]:
                found[policy]["setting"] = best
                found[policy]["settings"] = {setting: runs[0] for setting, runs in settings.items()}
        return found

    def comparison(self) -> dict[str, Figures]:
        """By metric: the best peer in it, our mean over its, the noise, and who is better.

        The noise is the spread of repeated runs of one setting over their mean, the largest of those seen. Where it
        exceeds the margin, or is not known, there is no verdict.
        """
        if not self.rivals():
            return {}
        return {metric: self._compare(metric) for metric in METRICS}

    def _compare(self, metric: str) -> Figures:
        theirs, name, setting = min(
            (self._mean(name, setting, metric), name, setting) for name, setting in self._settings(self._peers)
        )
        ratio = self._mean(OURS, "", metric) / theirs
        repeated = [
            [figures[metric] for figures in runs]
            for settings in self._runs.values()
            for runs in settings.values()
            if len(runs) > 1
        ]
        noise = max(((max(values) - min(values)) / fmean(values) for values in repeated), default=None)
        verdict = "no verdict"
        if noise is not None and abs(ratio - 1) > noise:
            verdict = "better" if ratio < 1 else "worse"
        peer = f"{name} {setting}".strip()
        return {"ratio": ratio, "best_peer": peer, "noise": noise, "verdict": verdict}

    def _settings(self, policies: Iterable[str]) -> list[tuple[str, str]]:
        return [(policy, setting) for policy in policies for setting in self._runs.get(policy, {})]

    def _mean(self, policy: str, setting: str, metric: str) -> float:
        values = [figures[metric] for figures in self._runs[policy][setting]]
        # Of a run that answered nobody there is no mean.
        return float("inf") if None in values else fmean(values)


_COLUMNS = (
    ("ttft_mean", "TTFT mean", "{:.2f}"),
    ("ttft_p50", "p50", "{:.2f}"),
    ("ttft_p90", "p90", "{:.2f}"),
    ("ttft_p99", "p99", "{:.2f}"),
    ("e2e_mean", "whole mean", "{:.1f}"),
    ("e2e_p50", "p50", "{:.1f}"),
    ("e2e_p99", "p99", "{:.1f}"),
    ("goodput", "goodput", "{:.3f}"),
    ("hit_rate", "hit", "{:.3f}"),
    ("rejects", "rejects", "{}"),
    ("imbalance", "imbalance", "{:.3f}"),
    ("pick_us_p50", "pick µs p50", "{:.0f}"),
    ("pick_us_p99", "p99", "{:.0f}"),
    ("loop_lag_ms_p99", "loop lag ms p99", "{:.1f}"),
    ("machine_cpu", "CPUs used", "{:.2f}"),
)


def as_text(report: dict[str, Any]) -> str:
    """The report as a table; times in seconds."""
    given = report["given"]
    hits = given["hit_rate_of_load"]
    head = (
        f"{given['requests']} requests of {given['trace']} ({given['stamps']} stamps × {given['time_scale']:.3f}) "
        f"in {given['seconds']:.0f} s on {given['replicas']} replicas, {given['mode']}: load {given['load']:.3f}"
        + (f" at a hit rate of {hits:.3f}" if hits is not None else " of what they can do")
        + f"; goodput: first token within {given['deadline']:g} s"
    )
    columns = [column for column in _COLUMNS if any(column[0] in own for own in report["policies"].values())]
    rows = [["seconds", *(title for _, title, _ in columns)]]
    for name, figures in report["policies"].items():
        shown = figures.get("settings") or {"": figures}
        for setting, own in shown.items():
            mark = "*" if setting and setting == figures.get("setting") else ""
            label = f"{name} {setting}{mark}".strip()
            rows.append([label, *(_cell(own.get(key), form) for key, _, form in columns)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([head, "", *lines, *_verdicts(report["comparison"])])


def _verdicts(comparison: dict[str, Figures]) -> list[str]:
    lines = [""] if comparison else []
    for metric, found in comparison.items():
        noise = "one run" if found["noise"] is None else f"noise {found['noise']:.1%}"
        lines.append(f"{metric}: {found['ratio']:.3f} × {found['best_peer']} ({noise}): {found['verdict']}")
    return lines


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)
