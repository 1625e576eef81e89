from pathlib import Path

from cluster.storage import Store
from pipelines.metrics import FLUSH_SECONDS, MetricsReader, MetricsWriter


def test_parts_are_written_at_intervals_and_read_once(tmp_path: Path) -> None:
    now = [0.0]
    store = Store(tmp_path)
    writer, reader = MetricsWriter(store, "a", clock=lambda: now[0]), MetricsReader(store)
    writer.write({"step": 1, "loss": 3.0})
    writer.write({"step": 2, "loss": 2.5})
    assert [line["step"] for line in reader.poll()] == [1]  # the second waits for the interval
    now[0] += FLUSH_SECONDS
    writer.write({"step": 3, "loss": 2.0})
    assert [line["step"] for line in reader.poll()] == [2, 3]
    assert reader.poll() == []
    writer.write({"step": 4, "loss": 1.0})
    writer.flush()
    writer.flush()
    assert [line["loss"] for line in reader.steps()] == [3.0, 2.5, 2.0]
    reader.poll()
    assert [line["loss"] for line in reader.steps()] == [3.0, 2.5, 2.0, 1.0]
    assert len(store.list()) == 3


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, steps in (("t1", [1, 2, 3, 4, 5]), ("t2", [3, 4])):
        writer = MetricsWriter(store, name)
        for step in steps:
            writer.write({"step": step, "by": name})
        writer.flush()
    reader = MetricsReader(store)
    reader.skip_existing()
    assert reader.poll() == []
    assert [(line["step"], line["by"]) for line in reader.steps()] == [(1, "t1"), (2, "t1"), (3, "t2"), (4, "t2")]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    writer = MetricsWriter(Store(tmp_path), "a")
    writer.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "tokens": 3})
    assert MetricsReader(Store(tmp_path)).poll() == [{"step": 1, "loss": None, "grad_norm": None, "tokens": 3}]
