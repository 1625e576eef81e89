"""What came out of a sweep: of every trial what its stages left in the store, of every cell mean and spread over seeds.

A measure is `stage.key`, a number in that stage's metadata (keys of mappings within it are joined by dots), or one of
the training's curve (curves.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from cluster.artifact import Manifest
from cluster.storage import Store
from pipelines.extrapolate import JSON_FILE
from pipelines.metrics import MetricsReader
from pipelines.runs import RunStatus
from pipelines.sweep.config import ExpectConfig, SweepConfig, Trial, own_measure
from pipelines.sweep.curves import CURVE_MEASURES, Row
from pipelines.sweep.trials import SweepGraph
from pipelines.training_folder import METRICS


@dataclass(frozen=True)
class TrialResult:
    """`error`: why there is none, one line. None stands for what was not measured, or was not finite."""

    cell: str
    seed: int
    measures: Mapping[str, float | None]
    parameters: int
    active_parameters: int
    flops: float | None
    """Of the training, forward and backward (`ModelConfig.flops_per_token`)."""
    tokens_per_second: float | None
    memory_bytes: int | None
    """The most that a training process held."""
    error: str = ""
    why: Mapping[str, str] = field(default_factory=dict)
    """Of each measure that is None."""
    curve: Sequence[Row] = ()
    beyond: Mapping[str, Any] | None = None
    """What `extrapolate.measure` found, if the sweep asks for it."""


@dataclass(frozen=True)
class Spread:
    """Over the seeds that came to a finite number. `deviation` is the sample's; None of one."""

    mean: float
    deviation: float | None
    lowest: float
    highest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, min(values), max(values), len(values))


@dataclass(frozen=True)
class CellResult:
    """`missing`: of each seed for which a measure of the table has no finite number, why."""

    cell: str
    measures: Mapping[str, Spread | None]
    parameters: int
    active_parameters: int
    flops: float | None
    tokens_per_second: float | None
    memory_bytes: int | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One expectation, seed by seed. `verdict`: `holds` if with every seed `lower` ended below `than`; `within the
    spread` if only on average; `does not hold`; `not measured`. Where seeds are missing it says with how many."""

    lower: str
    than: str
    measure: str
    """Of the terms that name none of their own."""
    verdict: str
    difference: Spread | None
    """`lower` less `than`, by seed."""
    source: str = ""


@dataclass(frozen=True)
class SweepResult:
    """`cells` from the lowest first measure up, what came to none last."""

    config: SweepConfig
    trials: Sequence[TrialResult]
    cells: Sequence[CellResult] = field(default=())
    findings: Sequence[Finding] = field(default=())


def collect(
    config: SweepConfig,
    trials: Sequence[Trial],
    graph: SweepGraph,
    committed: Mapping[str, Manifest],
    status: RunStatus,
    store: Store,
) -> SweepResult:
    """Reads the curves of what is `committed`, by stage (`drive.find_committed`). Raises StorageError."""

    def read(trial: Trial) -> TrialResult:
        stages = graph.stages[trial.label]
        metadata = {kind: committed[name].metadata for kind, name in stages.items() if name in committed}
        curve: list[dict[str, Any]] = []
        if "pretrain" in metadata:
            reader = MetricsReader(graph.graph.artifact(store, stages["pretrain"]).store.child(METRICS))
            reader.poll()
            curve = reader.steps()
        beyond = None
        if "extrapolate" in metadata:
            beyond = graph.graph.artifact(store, stages["extrapolate"]).files.read_json(JSON_FILE)
        failed = [status.stages[name].error for name in stages.values() if name in status.stages]
        found = trial_result(trial, config.all_measures, metadata, curve, next(filter(None, failed), ""))
        return replace(found, beyond=beyond)

    return summarise(config, [read(trial) for trial in trials])


def trial_result(
    trial: Trial, measures: Sequence[str], metadata: Mapping[str, Mapping[str, Any]], curve: Sequence[Row], error: str
) -> TrialResult:
    """`metadata`: by kind of stage, of those that are committed."""
    model, train = trial.recipe.model, trial.recipe.train
    trained = metadata.get("pretrain", {})
    found = {measure: _measured(measure, metadata, curve) for measure in measures}
    return TrialResult(
        trial.cell,
        trial.seed,
        {measure: value if isinstance(value, float) else None for measure, value in found.items()},
        model.num_parameters(),
        model.num_active_parameters(),
        model.flops_per_token(train.seq_len) * trained["tokens"] if trained else None,
        trained.get("tokens_per_second"),
        max((row["memory_bytes"] for row in curve), default=None),
        error,
        {measure: value for measure, value in found.items() if isinstance(value, str)},
        curve,
    )


def summarise(config: SweepConfig, trials: Sequence[TrialResult]) -> SweepResult:
    """Pure."""
    cells = [_cell([trial for trial in trials if trial.cell == cell], config.measures) for cell in config.cell_names]
    first = [cell.measures[config.measures[0]] for cell in cells]
    seeds = len(config.seeds)

    def rank(index: int) -> tuple[bool, float]:
        """A mean over fewer seeds, perhaps of those that went well, is no better than one over all."""
        found = first[index]
        return (True, math.inf) if found is None else (found.count < seeds, found.mean)

    order = sorted(range(len(cells)), key=rank)
    findings = [_finding(trials, pair, config, expected) for expected in config.expect for pair in expected.pairs]
    return SweepResult(config, trials, [cells[i] for i in order], findings)


def _cell(trials: Sequence[TrialResult], measures: Sequence[str]) -> CellResult:
    def mean(values: Sequence[float | None]) -> float | None:
        found = [value for value in values if value is not None]
        return fmean(found) if found else None

    memory = [trial.memory_bytes for trial in trials if trial.memory_bytes is not None]
    return CellResult(
        trials[0].cell,
        {
            name: Spread.of([v for trial in trials if (v := trial.measures[name]) is not None])
            for name in trials[0].measures
        },
        trials[0].parameters,
        trials[0].active_parameters,
        mean([trial.flops for trial in trials]),
        mean([trial.tokens_per_second for trial in trials]),
        max(memory, default=None),
        tuple(f"seed {trial.seed}: {why}" for trial in trials for why in _missing(trial, measures)),
    )


def _missing(trial: TrialResult, measures: Sequence[str]) -> list[str]:
    """What failed; if nothing did, which figures are not there all the same."""
    if trial.error:
        return [trial.error]
    return [f"{measure} {trial.why[measure]}" for measure in measures if trial.measures[measure] is None]


def _finding(
    trials: Sequence[TrialResult], pair: tuple[str, str], config: SweepConfig, expected: ExpectConfig
) -> Finding:
    first = config.measures[0]
    lower, than = (
        {
            trial.seed: value
            for trial in trials
            if trial.cell == term.partition("/")[0]
            and (value := trial.measures[own_measure(term) or first]) is not None
        }
        for term in pair
    )
    measure = first if not all(map(own_measure, pair)) else own_measure(pair[0])
    difference = Spread.of([lower[seed] - than[seed] for seed in lower if seed in than])
    verdict = "not measured"
    if difference is not None:
        verdict = "holds" if difference.highest < 0 else "within the spread" if difference.mean < 0 else "does not hold"
        if difference.count < len(config.seeds):
            verdict += f", with {difference.count} of {len(config.seeds)} seeds"
    return Finding(*pair, measure, verdict, difference, expected.source)


def _measured(measure: str, metadata: Mapping[str, Mapping[str, Any]], curve: Sequence[Row]) -> float | str:
    """The number, or why there is none."""
    stage, _, key = measure.partition(".")
    left = metadata.get("pretrain" if stage == "curve" else stage)
    if left is None:
        return "is of a stage that has not come to its end"
    value: Any = left
    if stage == "curve":
        value = CURVE_MEASURES[key](curve) if curve else None
    for part in key.split(".") if stage != "curve" else ():
        if not isinstance(value, Mapping) or part not in value:
            known = ", ".join(name for name, each in left.items() if isinstance(each, int | float | dict))
            return f"is nothing that the stage left, which is {known}"
        value = value[part]
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "is no finite number"
    return float(value)
