import json
import logging
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import StorageError, Store
from pipelines.event_file import scalars
from pipelines.metrics import FLUSH_SECONDS, LONGEST_FLUSH_SECONDS, MetricsReader, MetricsWriter
from tests.pipelines.reports import report


def test_parts_are_written_at_intervals_and_read_once(tmp_path: Path) -> None:
    now = [0.0]
    store = Store(tmp_path)
    writer, reader = MetricsWriter(store, "a", clock=lambda: now[0]), MetricsReader(store)
    writer.write(report(1))
    writer.write(report(2))
    assert [row["step"] for row in reader.poll()] == [1]  # the second waits for the interval
    now[0] += FLUSH_SECONDS
    writer.write(report(3))
    assert [row["step"] for row in reader.poll()] == [2, 3]
    assert reader.poll() == []
    writer.write(report(4))
    writer.flush()
    writer.flush()
    assert [row["step"] for row in reader.steps()] == [1, 2, 3]
    reader.poll()
    assert [row["step"] for row in reader.steps()] == [1, 2, 3, 4]
    assert len(store.list()) == 3


def test_a_long_training_writes_few_parts(tmp_path: Path) -> None:
    now = [0.0]
    writer = MetricsWriter(Store(tmp_path), "a", clock=lambda: now[0])
    for step in range(1, 451):
        writer.write(report(step))
        now[0] += 8.0
    parts = len(Store(tmp_path).list())
    assert 3600 / LONGEST_FLUSH_SECONDS < parts < 300


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = report(
        7,
        balance_loss=1.5,
        val_loss=3.25,
        expert_load={1: [0.5, 0.25], 12: [0.0, 1.0]},
        router_entropy={1: 0.7, 12: 0.1},
    )
    MetricsWriter(Store(tmp_path), "a").write(written)
    (row,) = MetricsReader(Store(tmp_path)).poll()
    assert row.pop("time") > 1.7e9
    assert row == asdict(written)
    (name,) = Store(tmp_path).list()
    assert pq.read_table(tmp_path / name).column("val_loss").to_pylist() == [3.25]  # anybody can


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, steps, loss in (("t1", [1, 2, 3, 4, 5], 1.0), ("t2", [3, 4], 2.0)):
        writer = MetricsWriter(store, name)
        for step in steps:
            writer.write(report(step, loss=loss))
        writer.flush()
    reader = MetricsReader(store)
    reader.skip_existing()
    assert reader.poll() == []
    assert [(row["step"], row["loss"]) for row in reader.steps()] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    nan = float("nan")
    written = report(1, loss=nan, grad_norm=float("inf"), router_entropy={0: nan, 1: 0.5})
    MetricsWriter(Store(tmp_path), "a").write(written)
    (row,) = MetricsReader(Store(tmp_path)).poll()
    assert (row["loss"], row["grad_norm"], row["tokens"]) == (None, None, 64)
    assert row["router_entropy"] == {0: None, 1: 0.5}
    json.dumps(row, allow_nan=False)
    assert scalars(row)["router_entropy/layer_01"] == 0.5 and "router_entropy/layer_00" not in scalars(row)


def test_what_is_no_part_is_named_once_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    MetricsWriter(store, "a").write(report(1))
    (name,) = store.list()
    whole = store.read_bytes(name)
    store.write_bytes("a-00000002.parquet", whole[: len(whole) // 2])
    store.write_bytes("notes.txt", b"mine")
    pq.write_table(pa.table({"step": ["one"]}), tmp_path / "b-00000001.parquet")
    pq.write_table(
        pa.table({"step": [5], "steps": [9], "tokens": [8], "colour": ["red"]}), tmp_path / "c-00000005.parquet"
    )
    reader = MetricsReader(store)
    with caplog.at_level(logging.WARNING):
        assert [(row["step"], row["tokens"], row["val_loss"]) for row in reader.poll()] == [(1, 64, None), (5, 8, None)]
        assert reader.poll() == []
    assert sorted(message.split(": ")[1].split()[0] for message in caplog.messages) == [
        "a-00000002.parquet",
        "b-00000001.parquet",
        "notes.txt",
    ]
    store.write_bytes("a-00000002.parquet", whole)  # it was being written
    assert [row["step"] for row in reader.poll()] == [1]


def test_what_a_failing_store_handed_out_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    for writer in ("a", "b"):
        MetricsWriter(store, writer).write(report(1 if writer == "a" else 2))
    read_bytes = Store.read_bytes

    def fail(store: Store, path: str) -> bytes:
        if path.startswith("b-"):
            raise StorageError("slow down")
        return read_bytes(store, path)

    reader = MetricsReader(store)
    with monkeypatch.context() as patched, pytest.raises(StorageError):
        patched.setattr(Store, "read_bytes", fail)
        reader.poll()
    assert [row["step"] for row in reader.poll()] == [1, 2]
