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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Literal

from llama.bench.harness import BenchError
from pipelines.bench.router_report import Findings
from pipelines.bench.turns import Say

Mode = Literal["sim", "modelled", "real"]
MAX_ORACLE_REPLICAS = 16
"""The oracle looks into every replica at every request."""
_LOAD_TOLERANCE = 0.01
Results = Iterator[tuple[Any, dict[str, Any]]]
"""A variant and its figures, one after the other."""
Runner = Callable[[Sequence[Any], int], Results]
"""Runs variants, for the n-th time."""
_FIRST_GUESS = 0.6
"""Of what an endless cache would save, about what a real one does."""


@dataclass(frozen=True)
class RouterBench:
    """What is compared.

    `trace`: a file in Mooncake's format; None makes one of conversations, in bursts of `burst`. `seconds`: of traffic,
    at most. `deadline`: seconds to the first token, for goodput. `repeat`: runs of our policy and of the best peer.
    `settings`: of a class that has some, all are run, or on Serve only the one that is best in virtual time.

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
    settings: Literal["all", "best"] = "all"

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
    """The report: `policies`, each with its figures, `comparison` of ours with the best peer, and what was `given`.

    Raises BenchError.
    """
    # Here, for they import Ray, which reads its settings when it is imported.
    from cluster.serve.replay.policies import PEERS

    contestants = _contestants(bench)
    if bench.settings == "best" and bench.mode != "sim":
        contestants = _best_settings(bench, contestants, say)
    findings = Findings(PEERS)
    runners = {"sim": _in_virtual_time, "modelled": _on_modelled_engines, "real": _on_real_engines}
    with runners[bench.mode](bench, say) as (run, given):
        for number in range(bench.repeat):
            chosen = (
                contestants
                if not number
                else [variant for variant in contestants if (variant.policy, variant.setting) in findings.rivals()]
            )
            for variant, figures in run(chosen, number):
                findings.add(variant.policy, variant.setting, figures)
                say(f"{variant.name}: mean time to first token {figures['ttft_mean']:.3f} s")
    return {"policies": findings.policies(), "comparison": findings.comparison(), "given": given}


def foretell(bench: RouterBench, report: dict[str, Any], runs: int = 5) -> dict[str, list[float]]:
    """What the simulation says to a report from Serve: of each policy and setting there the mean time to the first
    token, on replicas of the same names, `runs` times with other random numbers."""
    told: dict[str, list[float]] = {}
    with _workers(bench.jobs) as submit:
        scenario, _ = _fit(bench, submit, lambda message: None)
        for variant in _contestants(replace(bench, policies=tuple(report["policies"]))):
            figures = report["policies"][variant.policy]
            seen = (figures.get("settings") or {"": figures}).get(variant.setting)
            if seen is not None and len(seen["names"]) == bench.replicas:
                named = replace(scenario, names=seen["names"])
                futures = [
                    submit(_simulated, replace(named, seed=bench.seed + run), variant, bench.deadline)
                    for run in range(runs)
                ]
                told[variant.name] = [future.result()["ttft_mean"] for future in futures]
    return told


def _best_settings(bench: RouterBench, contestants: list[Any], say: Say) -> list[Any]:
    """Of each policy the one setting with which it has the shortest mean time to the first token, in virtual time."""
    counts = Counter(variant.policy for variant in contestants)
    several = tuple(policy for policy, count in counts.items() if count > 1)
    if not several:
        return contestants
    found = measure(replace(bench, mode="sim", policies=several, repeat=1, model=None), say)["policies"]
    best = {policy: found[policy]["setting"] for policy in several}
    return [variant for variant in contestants if best.get(variant.policy, variant.setting) == variant.setting]


def _contestants(bench: RouterBench) -> list[Any]:
    from cluster.serve.replay.policies import POLICIES, ROUTERS, variants

    possible = POLICIES if bench.mode == "sim" else tuple(ROUTERS)
    policies = bench.policies or tuple(
        name for name in possible if name != "oracle" or bench.replicas <= MAX_ORACLE_REPLICAS
    )
    if impossible := set(policies) & set(POLICIES) - set(possible):
        raise BenchError(f"policies={','.join(sorted(impossible))} exist in --mode sim only; leave them out")
    try:
        return [variant for name in dict.fromkeys(policies) for variant in variants(name)]
    except ValueError as error:
        raise BenchError(str(error)) from error


@contextmanager
def _in_virtual_time(bench: RouterBench, say: Say) -> Iterator[tuple[Runner, dict[str, Any]]]:
    with _workers(bench.jobs) as submit:
        scenario, given = _fit(bench, submit, say)

        def run(variants: Sequence[Any], number: int) -> Results:
            again = replace(scenario, seed=bench.seed + number)
            runs = [(variant, submit(_simulated, again, variant, bench.deadline)) for variant in variants]
            for variant, future in runs:
                yield variant, future.result()

        yield run, given


@contextmanager
def _on_modelled_engines(bench: RouterBench, say: Say) -> Iterator[tuple[Runner, dict[str, Any]]]:
    with _workers(bench.jobs) as submit:
        scenario, given = _fit(bench, submit, say)
    with _ray():
        from cluster.serve.replay.on_serve import modelled

        yield partial(_on_serve, bench, modelled(scenario), say), given


@contextmanager
def _on_real_engines(bench: RouterBench, say: Say) -> Iterator[tuple[Runner, dict[str, Any]]]:
    with _ray():
        from cluster.serve.replay.on_serve import real, saturated_s
        from cluster.serve.replay.trace import scaled

        with TemporaryDirectory(prefix="caravan-replay-") as folder:
            live, left_out = real(_requests(bench), bench.replicas, bench.model, folder)
            if left_out:
                say(f"{left_out} requests are longer than the model's context and left out")
            seconds = saturated_s(live, say)
            say(f"as fast as they can, the replicas take {seconds:.1f} s for these requests")
            if bench.seconds is not None:
                count = max(1, min(len(live.requests), int(len(live.requests) * bench.seconds * bench.load / seconds)))
                seconds *= count / len(live.requests)
                live = replace(live, requests=live.requests[:count])
            original = live.requests[-1].at - live.requests[0].at
            factor = seconds / bench.load / original if original else 1.0
            live = replace(live, requests=scaled(live.requests, factor))
            yield partial(_on_serve, bench, live, say), _given(bench, live.requests, factor, bench.load, None)


@contextmanager
def _ray() -> Iterator[None]:
    from cluster import session

    with session.connect("local", num_cpus=os.cpu_count(), dashboard=False):
        yield


def _on_serve(bench: RouterBench, live: Any, say: Say, variants: Sequence[Any], number: int) -> Results:
    from cluster.serve.replay.measure import summary
    from cluster.serve.replay.on_serve import replay_together

    together = bench.together if bench.mode == "modelled" else 1
    for first in range(0, len(variants), together):
        wave = variants[first : first + together]
        for variant, replay in zip(wave, replay_together(wave, live, say), strict=True):
            yield variant, summary(replay, bench.deadline)


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Any]]:
    """Processes in which strings hash alike every time: Ray's power of two draws from a set of replica ids."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(jobs or os.cpu_count() or 1, mp_context=context) as pool:
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
        fitted = at_load(requests, bench.load, bench.replicas, work_s(hit_rate))
        scenario = Scenario(fitted, bench.replicas, timing=timing, seed=bench.seed)
        found = submit(_simulated, scenario, Variant(judge), bench.deadline).result()["hit_rate"]
        load = offered_load(fitted, bench.replicas, work_s(found))
        say(f"{judge} finds {found:.3f} of the prompts cached: load {load:.3f}")
        hit_rate = found
        if abs(load / bench.load - 1) < _LOAD_TOLERANCE:
            break
    original = requests[-1].at - requests[0].at
    return scenario, _given(bench, fitted, fitted[-1].at / original if original else 1.0, load, found)


def _given(
    bench: RouterBench, requests: Sequence[Any], factor: float, load: float, hit_rate: float | None
) -> dict[str, Any]:
    return {
        "mode": bench.mode,
        "trace": bench.trace or "synthetic",
        "stamps": bench.stamps,
        "requests": len(requests),
        "replicas": bench.replicas,
        "seconds": requests[-1].at,
        "time_scale": factor,
        "load": load,
        "hit_rate_of_load": hit_rate,
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
