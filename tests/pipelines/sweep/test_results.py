"""Means, spreads, orders and verdicts, beside what one works out by hand."""

import math
import statistics

import pytest

from pipelines.sweep.curves import CURVE_MEASURES, CURVES
from pipelines.sweep.results import SweepResult, TrialResult, summarise, trial_result
from tests.pipelines.sweep.sweeps import sweep


def row(step: int, load: dict[int, list[float]] | None = None, val_loss: float | None = None) -> dict[str, object]:
    measured = {"loss": 5.0 - step, "val_loss": val_loss, "expert_load": load or {}, "memory_bytes": 1000 + step}
    return {"step": step, "tokens": 64 * step, "balance_loss": None, "grad_norm": 1.0} | measured


def results(losses: dict[tuple[str, int], float | None], **keys: object) -> SweepResult:
    config = sweep(**keys)
    trials = [
        TrialResult(cell, seed, {"pretrain.val_loss": loss}, 10, 10, 1e9, 100.0, 5, "" if loss else "it broke")
        for (cell, seed), loss in losses.items()
    ]
    return summarise(config, trials)


def test_cells_are_ordered_by_their_mean_and_what_failed_comes_last_with_its_reason() -> None:
    losses = {("rmsnorm", 0): None, ("layernorm", 0): 4.0, ("rmsnorm", 1): None, ("layernorm", 1): 5.0}
    found = results(losses)
    assert [cell.cell for cell in found.cells] == ["layernorm", "rmsnorm"]
    spread = found.cells[0].measures["pretrain.val_loss"]
    assert spread is not None and (spread.mean, spread.lowest, spread.highest, spread.count) == (4.5, 4.0, 5.0, 2)
    assert spread.deviation == pytest.approx(statistics.stdev([4.0, 5.0]))
    assert found.cells[1].measures["pretrain.val_loss"] is None
    assert found.cells[1].missing == ("seed 0: it broke", "seed 1: it broke")
    lucky = results({("rmsnorm", 0): 1.0, ("layernorm", 0): 4.0, ("rmsnorm", 1): None, ("layernorm", 1): 5.0})
    assert [cell.cell for cell in lucky.cells] == ["layernorm", "rmsnorm"], "a mean of those that went well is none"


@pytest.mark.parametrize(
    "rms, layer, verdict",
    [
        ((4.0, 5.0), (4.1, 5.1), "holds"),  # with either seed, though the ranges overlap
        ((4.0, 5.2), (4.5, 5.1), "within the spread"),
        ((4.0, 5.2), (3.9, 5.1), "does not hold"),
        ((4.0, None), (None, 5.0), "not measured"),
        ((4.0, None), (4.1, 1.0), "holds, with 1 of 2 seeds"),
    ],
)
def test_verdicts_compare_seed_by_seed(rms, layer, verdict) -> None:
    losses = {("rmsnorm", seed): value for seed, value in enumerate(rms)}
    losses |= {("layernorm", seed): value for seed, value in enumerate(layer)}
    (found,) = results(losses, expect=[{"lower": "rmsnorm", "than": ["layernorm"], "source": "x"}]).findings
    assert (found.verdict, found.source) == (verdict, "x")


def test_what_a_trial_left_is_looked_up_by_stage_and_key() -> None:
    trial = sweep().trials()[0]
    metadata = {
        "pretrain": {"val_loss": 3.5, "tokens": 1000, "tokens_per_second": 77.0, "lost": None},
        "evaluate": {"by": {"half": 2}, "odd": math.inf, "yes": True},
    }
    why = {
        "evaluate.odd": "is no finite number",
        "evaluate.yes": "is no finite number",
        "shards.rows": "is of a stage that has not come to its end",
        "pretrain.missing": "is nothing that the stage left, which is val_loss, tokens, tokens_per_second",
        "pretrain.lost": "is no finite number",
        "curve.imbalance": "is no finite number",
    }
    measures = ["pretrain.val_loss", "evaluate.by.half", *why]
    found = trial_result(trial, measures, metadata, [row(1), row(2)], "")
    assert list(found.measures.values()) == [3.5, 2.0, *[None] * len(why)]
    assert found.why == why
    assert found.parameters == trial.recipe.model.num_parameters()
    assert found.flops == 1000 * trial.recipe.model.flops_per_token(32)
    assert (found.tokens_per_second, found.memory_bytes) == (77.0, 1002)
    nothing = trial_result(trial, measures, {}, [], "the worker was lost")
    assert nothing.flops is None and nothing.memory_bytes is None and nothing.error == "the worker was lost"


def test_imbalance_is_the_fullest_expert_s_excess_averaged_over_layers_and_the_last_quarter() -> None:
    loads = [{0: [1.0, 0, 0, 0], 2: [0.25] * 4}] * 6 + [
        {0: [0.5, 0.5, 0, 0], 2: [0.25] * 4},
        {0: [0.25] * 4, 2: [0.4, 0.2, 0.2, 0.2]},
    ]
    curve = [row(step, load) for step, load in enumerate(loads)]
    assert CURVE_MEASURES["imbalance"](curve) == pytest.approx(((1.0 + 0) / 2 + (0 + 0.6) / 2) / 2)
    assert CURVES["imbalance"][1](curve[0]) == pytest.approx(3 / 2)
    assert CURVE_MEASURES["imbalance"]([row(1)]) is None, "a dense model has none"


def test_the_gap_is_validation_less_late_training() -> None:
    curve = [row(step) for step in range(7)] + [row(7, val_loss=1.0)]
    assert CURVE_MEASURES["gap"](curve) == pytest.approx(1.0 - (5.0 - 6 + 5.0 - 7) / 2)
    assert CURVE_MEASURES["gap"](curve[:-1]) is None
