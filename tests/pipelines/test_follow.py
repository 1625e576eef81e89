"""What whoever runs a training gets to see of it."""

import errno
from dataclasses import asdict
from pathlib import Path

import pytest
from tensorboardX.record_writer import RecordWriter

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines.follow import TENSORBOARD, duration, followed, progress
from pipelines.metrics import MetricsWriter
from pipelines.stage import Event, StageContext
from tests.pipelines.reports import report
from tests.pipelines.test_event_file import curve


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (11100, "3 h 05 min"), (200_000, "2 d 07 h")],
)
def test_a_time_is_as_fine_as_it_matters(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_report_is_one_line() -> None:
    row = asdict(report(40, loss=3.2141, tokens_per_second=12345.6, mfu=0.417))
    assert progress(row, {}) == "step 40/100  loss 3.214  12,346 tokens/s  MFU 42%  0 s left"
    trouble = {"skipped_steps": 2, "failed_checkpoints": 1}
    assert "MFU 42%  steps skipped: 2  checkpoints not written: 1  0 s left" in progress(row | trouble, {})
    validated = asdict(report(30, val_loss=3.5))
    assert "loss not finite  validation 3.500 at 30  12,346" in progress(row | {"loss": None, "mfu": None}, validated)


def test_a_training_is_told_of_and_put_into_tensorboard(tmp_path: Path) -> None:
    store, run = Store(tmp_path / "artifact"), Store(tmp_path / "run")
    metrics, incarnations = store.child("metrics"), store.child("incarnations")
    said: list[Event] = []
    MetricsWriter(metrics, "t0").write(report(1, val_loss=5.0))
    context = StageContext("pretrain", "", {}, store, run, [], Artifact(store).begin(), said.append)
    with followed(context, metrics, incarnations):
        incarnations.write_json("t1.json", {"resumed_step": 1, "world_size": 2})
        writer = MetricsWriter(metrics, "t1")
        writer.write(report(2))
        writer.write(report(3, val_loss=4.0))
        writer.write(report(4))
        writer.flush()
    assert [event.message for event in said][0] == "resumed from the checkpoint of step 1 on 2 workers"
    assert "validation 5.000 at 1" in said[1].message  # of an earlier incarnation
    assert "validation 4.000 at 3" in said[-1].message and said[-1].fraction == 0.04
    assert said[2].values["val_loss"] == 4.0 and "val_loss" not in said[-1].values
    assert [step for step, _ in curve(run.child(TENSORBOARD), "loss/training")] == [1, 2, 3, 4]


def test_a_full_disk_costs_the_view_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: RecordWriter, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path / "artifact")
    context = StageContext("pretrain", "", {}, store, Store(tmp_path / "run"), [], None, lambda event: None)
    for name in ("write", "flush", "close"):
        monkeypatch.setattr(RecordWriter, name, fail)
    with followed(context, store.child("metrics"), store.child("incarnations")):
        MetricsWriter(store.child("metrics"), "t0").write(report(1))
    assert "No space left on device" in caplog.text
