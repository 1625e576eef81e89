"""Routing policies side by side: one trace, as many replicas for each, in virtual time or on Serve.

    sim        virtual time: the production router code and Ray's own router classes around modelled engines
    modelled   Serve, its routers and its processes for real; only the engines sleep instead of computing
    real       Serve with real engines, prompts and answers as much shorter as the block of such an engine is

Every policy gets the same requests at the same times and the same replicas. The trace's stamps are scaled to the load
asked for (cluster/serve/replay/load.py). A policy with a setting that decides how well it does is run with each of
several values, and the best one by mean time to the first token stands for it; all are reported.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from llama.bench.harness import BenchError
from pipelines.bench.turns import Say

Mode = Literal["sim", "modelled", "real"]
MAX_ORACLE_REPLICAS = 16
"""The oracle looks into every replica at every request."""
_LOAD_TOLERANCE = 0.01
Results = Iterator[tuple[Any, dict[str, Any]]]
"""A variant and its figures, one after the other."""
_FIRST_GUESS = 0.6
"""Of what an endless cache would save, about what a real one does."""


@dataclass(frozen=True)
class RouterBench:
    """What is compared.

    `trace`: a file in Mooncake's format; None makes one of conversations, in bursts of `burst`. `seconds`: of traffic,
    at most. `deadline`: seconds to the first token, for goodput. `repeat`: runs of our policy and of the best peer.

    Raises:
        BenchError: a setting is out of range; names field, value and remedy.
    """

    trace: str | None = None
    replicas: int = 4
    mode: Mode = "sim"
    seconds: float | None = None
    requests: int = 1500
    policies: tuple[str, ...] = ()
    load: float = 0.8
    stamps: Literal["raw", "spread"] = "raw"
    burst: int = 1
    deadline: float = 5.0
    repeat: int = 1
    seed: int = 0
    jobs: int = 0
    together: int = 3
    model: str | None = None

    def __post_init__(self) -> None:
        for name in ("replicas", "requests", "repeat", "burst", "together"):
            if getattr(self, name) < 1:
                raise BenchError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("load", "deadline"):
            if not 0 < getattr(self, name) < float("inf"):
                raise BenchError(f"{name}={getattr(self, name)} must be positive")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise BenchError(f"seconds={self.seconds} must be positive")
        if self.jobs < 0:
            raise BenchError(f"jobs={self.jobs} must be 0, for one on each CPU, or more")
        if self.model is not None and self.mode != "real":
            raise BenchError(f"--model has no effect with --mode {self.mode}; leave it out, or use --mode real")
        if self.trace is not None and self.burst != 1:
            raise BenchError("--burst is for the trace that is made up; leave it out with --trace")


def measure(bench: RouterBench, say: Say = lambda message: None) -> dict[str, Any]:
    """The report: `policies`, each with its figures, and what they were given. Raises BenchError."""
    # Here, for they import Ray, which reads its settings when it is imported.
    from cluster.serve.replay.policies import POLICIES, ROUTERS, variants

    possible = tuple(ROUTERS) if bench.mode != "sim" else POLICIES
    policies = bench.policies or tuple(
        name for name in possible if name != "oracle" or bench.replicas <= MAX_ORACLE_REPLICAS
    )
    if impossible := set(policies) & set(POLICIES) - set(possible):
        raise BenchError(f"policies={','.join(sorted(impossible))} exist in --mode sim only; leave them out")
    try:
        contestants = [variant for name in dict.fromkeys(policies) for variant in variants(name)]
    except ValueError as error:
        raise BenchError(str(error)) from error
    figures: dict[str, dict[str, Any]] = {}
    with _workers(bench.jobs) as submit:
        scenario, given = _fit(bench, submit, say)
        results = _simulate(bench, scenario, contestants, submit) if bench.mode == "sim" else None
        for variant, own in results or _on_serve(bench, scenario, contestants, say):
            figures.setdefault(variant.policy, {})[variant.setting] = own
            say(f"{variant.name}: mean time to first token {own['ttft_mean']:.3f} s")
    return {"policies": {name: _best(found) for name, found in figures.items()}, "given": given}


def _simulate(bench: RouterBench, scenario: Any, contestants: Sequence[Any], submit: Callable[..., Any]) -> Results:
    runs = [(variant, submit(_simulated, scenario, variant, bench.deadline)) for variant in contestants]
    for variant, run in runs:
        yield variant, run.result()


def _on_serve(bench: RouterBench, scenario: Any, contestants: Sequence[Any], say: Say) -> Results:
    from cluster import session
    from cluster.serve.replay.measure import summary

    with session.connect("local", num_cpus=os.cpu_count(), dashboard=False):
        from cluster.serve.replay.on_serve import live_scenario, replay_together

        live = live_scenario(scenario)
        for first in range(0, len(contestants), bench.together):
            wave = contestants[first : first + bench.together]
            for variant, replay in zip(wave, replay_together(wave, live, say), strict=True):
                yield variant, summary(replay, bench.deadline)


def _best(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A policy's figures: those of its best setting, with all of them beside."""
    worst = float("inf")
    setting = min(found, key=lambda name: worst if found[name]["ttft_mean"] is None else found[name]["ttft_mean"])
    if list(found) == [""]:
        return found[""]
    return {**found[setting], "setting": setting, "settings": found}


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Any]]:
    """Processes of their own: each policy gets a fresh one's random numbers, hashes of strings included."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(jobs or os.cpu_count() or 1, mp_context=context, max_tasks_per_child=1) as pool:
            try:
                yield pool.submit
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before


def _simulated(scenario: Any, variant: Any, deadline: float) -> dict[str, Any]:
    from cluster.serve.replay.measure import summary
    from cluster.serve.replay.simulate import simulate

    return summary(simulate(scenario, variant), deadline)


def _fit(bench: RouterBench, submit: Callable[..., Any], say: Say) -> tuple[Any, dict[str, Any]]:
    """The scenario at the load asked for, and what the report says of it."""
    from cluster.serve.replay.load import at_load, endless_hit_rate, offered_load, offered_work_s, within
    from cluster.serve.replay.policies import Variant
    from cluster.serve.replay.simulate import Scenario
    from cluster.serve.replay.timing import MODELLED_ENGINE, StepTime
    from cluster.serve.replay.trace import Prompts

    requests, timing, prompts = _requests(bench), StepTime(), Prompts()

    def work_s(hit_rate: float) -> float:
        return offered_work_s(requests, hit_rate, timing, MODELLED_ENGINE, prompts)

    judge = "oracle" if bench.replicas <= MAX_ORACLE_REPLICAS else "caravan"
    hit_rate = _FIRST_GUESS * endless_hit_rate(requests, prompts)
    if bench.seconds is not None:
        count = within(requests, bench.seconds, bench.load, bench.replicas, work_s(hit_rate))
        requests = requests[:count]
        hit_rate = _FIRST_GUESS * endless_hit_rate(requests, prompts)
    for _ in range(3):
        scaled = at_load(requests, bench.load, bench.replicas, work_s(hit_rate))
        scenario = Scenario(scaled, bench.replicas, timing=timing, seed=bench.seed)
        found = submit(_simulated, scenario, Variant(judge), bench.deadline).result()["hit_rate"]
        load = offered_load(scaled, bench.replicas, work_s(found))
        say(f"{judge} finds {found:.3f} of the prompts cached: load {load:.3f}")
        hit_rate = found
        if abs(load / bench.load - 1) < _LOAD_TOLERANCE:
            break
    duration = scaled[-1].at
    original = requests[-1].at - requests[0].at
    return scenario, {
        "mode": bench.mode,
        "trace": bench.trace or "synthetic",
        "stamps": bench.stamps,
        "requests": len(scaled),
        "replicas": bench.replicas,
        "seconds": duration,
        "time_scale": duration / original if original else 1.0,
        "load": load,
        "hit_rate_of_load": found,
        "seed": bench.seed,
        "deadline": bench.deadline,
    }


def _requests(bench: RouterBench) -> list[Any]:
    from cluster.serve.replay.trace import SyntheticTrace, TraceError, make_trace, read_trace, spread

    if bench.trace is None:
        return make_trace(SyntheticTrace(requests=bench.requests, burst=bench.burst, seed=bench.seed))
    try:
        requests = read_trace(bench.trace, bench.requests)
    except TraceError as error:
        raise BenchError(str(error)) from error
    return spread(requests, bench.seed) if bench.stamps == "spread" else requests


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
    head = (
        f"{given['requests']} requests of {given['trace']} ({given['stamps']} stamps × {given['time_scale']:.3f}) "
        f"in {given['seconds']:.0f} s on {given['replicas']} replicas, {given['mode']}: load {given['load']:.3f} at a "
        f"hit rate of {given['hit_rate_of_load']:.3f}; goodput: first token within {given['deadline']:g} s"
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
    return "\n".join([head, "", *lines])


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)
