"""A rank that hangs leaves its stacks behind and ends; one that works or waits on purpose does not."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import llama.training.watchdog as watchdog_module
from llama.training.trainer import Trainer
from llama.training.watchdog import Watchdog, all_stacks
from tests.distributed import RankError, run_ranks
from tests.llama.training.helpers import DENSE, Samples, train_config


def test_who_beats_is_left_alone() -> None:
    barked: list[str] = []
    with Watchdog(0.3, barked.append, leave=lambda: barked.append("left")) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.beat()
        watchdog.sleep(0.6)
        with watchdog.paused():
            time.sleep(0.6)
        time.sleep(0.1)
    with Watchdog(0, barked.append):
        time.sleep(0.05)
    assert barked == []


def test_who_does_not_is_ended_even_if_its_report_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.training.watchdog._REPORT_SECONDS", 0.2)
    monkeypatch.setattr("llama.training.watchdog._GRACE_SECONDS", 0.1)
    left, reports = threading.Event(), []

    def report(stacks: str) -> None:
        reports.append(stacks)
        time.sleep(5)

    with Watchdog(0.2, report, leave=left.set):
        assert left.wait(3)
    assert "no step ended for 0.2 s" in reports[0] and "left.wait(3)" in reports[0]


def test_stacks_are_of_all_threads() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="someone-else")
    thread.start()
    stacks = all_stacks()
    done.set()
    thread.join()
    assert stacks.startswith("thread MainThread") and "all_stacks()" in stacks
    assert "thread someone-else" in stacks


@pytest.mark.integration
def test_who_holds_the_interpreters_lock_is_ended_too() -> None:
    code = """
import llama.training.watchdog as w, ctypes
w._REPORT_SECONDS = w._GRACE_SECONDS = 0.2
with w.Watchdog(0.3):
    ctypes.PyDLL(None).sleep(20)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15)
    assert ended.returncode == 1 and "Timeout" in ended.stderr and "line 5" in ended.stderr


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    barked: list[str] = []
    jumps, monotonic = [0.0], time.monotonic
    monkeypatch.setattr("llama.training.watchdog.time.monotonic", lambda: monotonic() + jumps[0])
    with Watchdog(1.0, barked.append, leave=lambda: barked.append("left")):
        time.sleep(0.2)
        jumps[0] = 100.0
        time.sleep(0.5)
        assert barked == []
        monkeypatch.setattr("llama.training.watchdog._GRACE_SECONDS", 0.0)
        time.sleep(1.0)
    assert len(barked) == 2, "the rest of the second does"


def hang(rank: int, world_size: int, folder: str) -> None:
    """Rank 1's data comes for one step and then not any more; rank 0 waits for it in a collective."""
    config = train_config(steps=5)

    class Stuck(Samples):
        def __iter__(self):
            batches = super().__iter__()
            for _ in range(config.accumulation_steps(world_size)):
                yield next(batches)
            if rank == 1:
                time.sleep(60)
            yield from batches

    path = Path(folder) / f"rank-{rank}.txt"
    watchdog_module._GRACE_SECONDS = 1.5
    with Watchdog(2.0, path.write_text) as watchdog:
        Trainer(DENSE, config, Stuck(config, DENSE.vocab_size, rank, world_size), watchdog=watchdog).fit()


@pytest.mark.integration
def test_all_ranks_of_a_training_that_hangs_report_where(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="died without a word"):
        run_ranks(hang, 2, str(tmp_path))
    waiting, sleeping = ((tmp_path / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert "time.sleep(60)" in sleeping and "time.sleep(60)" not in waiting
    assert "step.py" in waiting, "rank 0 is in a collective of its step"
