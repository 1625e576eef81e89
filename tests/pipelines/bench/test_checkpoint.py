"""The comparison itself, on a model of no size; its figures are for a quiet machine."""

import pytest

from cluster.storage import Store
from llama.bench.harness import BenchError
from pipelines.bench.checkpoint import CONTESTANTS, NONE, SYNCHRONOUS, CheckpointBench, as_text, measure


@pytest.mark.integration
def test_all_take_the_same_steps_and_leave_nothing(tmp_path) -> None:
    report = measure(CheckpointBench("tiny", seq_len=16, every=1, rounds=5, store=str(tmp_path)))
    rows = {row.name: row for row in report.rows}
    assert tuple(rows) == CONTESTANTS
    assert rows[NONE].cost is None and rows[NONE].stall_seconds is None
    assert rows[SYNCHRONOUS].cost.median > 1 and rows[SYNCHRONOUS].stall_seconds > 0
    assert report.megabytes == pytest.approx(1.6 * 12, rel=0.1)  # fp32 weights and two moments of 1.6M parameters
    assert "asynchronous" in as_text(report)
    assert Store(str(tmp_path)).list() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "llama-9"}, r"model='llama-9' is not one of tiny"),
        ({"rounds": 3}, "rounds=3 must be at least 5"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"seq_len": 4096}, "seq_len=4096 is longer than small's max_seq_len=2048"),
    ],
)
def test_settings_out_of_range_are_named(settings, message) -> None:
    with pytest.raises(BenchError, match=message):
        CheckpointBench(**settings)
