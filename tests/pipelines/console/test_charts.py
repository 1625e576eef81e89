"""What is drawn is what was reported."""

from dataclasses import asdict
from typing import Any

import pytest

from cluster.serve.view import AppStatus, Endpoint
from pipelines.console import charts
from pipelines.serve_status import Look, ReplicaView
from tests.pipelines.reports import report


def rows(number: int, **changed: Any) -> list[dict[str, Any]]:
    return [asdict(report(step, **changed)) for step in range(1, number + 1)]


def series(options: dict[str, Any]) -> dict[str, list[Any]]:
    return {each["name"]: each["data"] for each in options["series"]}


def test_loss_and_throughput_are_the_reports_over_their_steps() -> None:
    found = rows(4)
    found[1]["val_loss"] = 5.5
    assert series(charts.loss(found)) == {
        "training": [[row["step"], row["loss"]] for row in found],
        "validation": [[2, 5.5]],
    }
    assert series(charts.throughput(found)) == {"tokens/s": [[step, 1000.0] for step in (1, 2, 3, 4)]}
    assert list(series(charts.loss(rows(1)))) == ["training"]


@pytest.mark.parametrize("number", [1, 599, 600, 601, 1201, 10_000])
def test_a_long_curve_is_thinned_evenly_and_keeps_its_end_and_what_was_validated(number: int) -> None:
    found = rows(number)
    found[number // 2]["val_loss"] = 1.0
    kept = [row["step"] for row in charts.thinned(found)]
    assert len(kept) <= charts.MOST_POINTS + 2
    assert {1, number, number // 2 + 1} <= set(kept) and kept == sorted(set(kept))
    gaps = [after - before for before, after in zip(kept, kept[1:], strict=False)]
    assert not gaps or max(gaps) <= -(-number // charts.MOST_POINTS)


def test_expert_load_is_each_expert_s_share_against_an_even_one() -> None:
    found = rows(2, expert_load={0: [0.5, 0.25, 0.25, 0.0], 3: [0.25] * 4})
    drawn = charts.expert_load(found)
    assert drawn is not None
    cells = {(layer, expert): load for expert, layer, load in drawn["series"][0]["data"]}
    assert cells == {(0, 0): 2.0, (0, 1): 1.0, (0, 2): 1.0, (0, 3): 0.0, **{(1, expert): 1.0 for expert in range(4)}}
    assert drawn["yAxis"]["data"] == ["layer 0", "layer 3"]


def test_a_dense_model_has_no_expert_load() -> None:
    assert charts.expert_load(rows(3)) is None and charts.expert_load([]) is None


def test_replicas_are_drawn_over_time_and_what_is_not_known_is_left_out() -> None:
    status = AppStatus("RUNNING", "", Endpoint("http://127.0.0.1:1", "m"), [], [], None, None)
    looks = [
        (1000.0, Look(status, [ReplicaView("a", "RUNNING", 1, "n", running=1, waiting=2, kv_used=0.25)], {})),
        (
            2000.0,
            Look(status, [ReplicaView("a", "RUNNING", 1, "n"), ReplicaView("b", "RUNNING", 2, "n", running=0)], {}),
        ),
    ]
    drawn = [(each["name"], each.get("yAxisIndex", 0), each["data"]) for each in charts.replicas(looks)["series"]]
    assert drawn == [("a", 0, [[1000.0, 3]]), ("a", 1, [[1000.0, 25.0]]), ("b", 0, [[2000.0, 0]]), ("b", 1, [])]
