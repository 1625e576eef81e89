"""What a checkpoint costs the training: the same steps without any, with one that is written beside them, and with one
that they wait for, interleaved in one run.

A turn is `every` steps. Who saves begins it with a checkpoint and does not end it before that is committed, so the
whole of its cost lies within, and the rounds together are one training with a checkpoint every so many steps. Each
contestant is a process of its own on one rank, with a store of its own below the same URI.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.bench.harness import MIN_ROUNDS, BenchError, Contestant, Ratio, interleave, ratio, serve
from llama.model import Transformer
from llama.presets import PRESETS
from llama.training.batch import Batch
from llama.training.checkpoint import Checkpointer, training_tensors
from llama.training.config import TrainConfig
from llama.training.memory import reuse_freed_memory
from llama.training.mesh import build_mesh, process_group
from llama.training.optim import build_optimizer
from llama.training.parallel import apply_parallel, init_sharded_weights
from llama.training.precision import fast_cpu_matmul
from llama.training.step import TrainStep
from pipelines.bench.turns import Say, Turns

NONE, ASYNCHRONOUS, SYNCHRONOUS = "none", "asynchronous", "synchronous"
CONTESTANTS = (NONE, ASYNCHRONOUS, SYNCHRONOUS)


@dataclass(frozen=True)
class CheckpointBench:
    """What is measured.

    Raises:
        BenchError: a setting is out of range; names field, value and remedy.
    """

    model: str = "small"
    batch: int = 1
    seq_len: int = 512
    every: int = 20
    """Steps of a turn, with one checkpoint or none."""
    rounds: int = 10
    threads: int = 1
    store: str = ""
    """Folder or URI; a folder on this machine's disk if left out."""

    def __post_init__(self) -> None:
        if self.model not in PRESETS:
            raise BenchError(f"model={self.model!r} is not one of {', '.join(PRESETS)}")
        for name in ("batch", "seq_len", "every", "rounds", "threads"):
            if getattr(self, name) < (least := MIN_ROUNDS if name == "rounds" else 1):
                raise BenchError(f"{name}={getattr(self, name)} must be at least {least}")
        longest = PRESETS[self.model].max_seq_len
        if self.seq_len > longest:
            raise BenchError(f"seq_len={self.seq_len} is longer than {self.model}'s max_seq_len={longest}")


@dataclass(frozen=True)
class Row:
    """One contestant's result; seconds are medians over the rounds."""

    name: str
    seconds: float
    """Of a turn."""
    stall_seconds: float | None
    """Of a turn, in which no step was taken: for the copy, and for the end of the save; None without checkpoints."""
    cost: Ratio | None
    """Time over that without checkpoints."""


@dataclass(frozen=True)
class CheckpointReport:
    bench: CheckpointBench
    megabytes: float
    """Of one checkpoint, 10⁶ bytes each."""
    rows: list[Row]


def measure(bench: CheckpointBench, say: Say = lambda message: None) -> CheckpointReport:
    """Runs the comparison. Raises BenchError if a contestant fails."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with _store(bench) as store, ExitStack() as stack:
        contestants = {
            name: stack.enter_context(Contestant(name, _arguments(bench, name, store), "pipelines.bench.checkpoint"))
            for name in CONTESTANTS
        }

        def turn(name: str) -> None:
            answers[name].append(contestants[name].turn())

        turns = {name: Turns(name, partial(turn, name), bench.rounds, say) for name in CONTESTANTS}
        seconds = interleave(turns, bench.rounds)
        megabytes = contestants[NONE].ready["megabytes"]
    rows = []
    for name in CONTESTANTS:
        saves = name != NONE
        stall = median(answer["stall_seconds"] for answer in answers[name][1:]) if saves else None
        cost = ratio(seconds[NONE], seconds[name]) if saves else None
        rows.append(Row(name, median(seconds[name]), stall, cost))
    return CheckpointReport(bench, megabytes, rows)


@contextmanager
def _store(bench: CheckpointBench) -> Iterator[Store]:
    """Where the checkpoints go; nothing is left there."""
    if bench.store:
        store = Store(bench.store).child(f"bench-{os.getpid()}")
        try:
            yield store
        finally:
            for name in CONTESTANTS:
                store.delete(name)
        return
    folder = tempfile.mkdtemp()
    try:
        yield Store(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _arguments(bench: CheckpointBench, name: str, store: Store) -> list[str]:
    settings = {**asdict(bench), "store": store.child(name).uri, "only": name}
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def _compete(bench: CheckpointBench, name: str) -> None:
    """One contestant's process."""
    torch.set_num_threads(bench.threads)
    with process_group(), fast_cpu_matmul(), reuse_freed_memory():
        config = TrainConfig(
            steps=sys.maxsize,
            global_batch=bench.batch,
            micro_batch=bench.batch,
            seq_len=bench.seq_len,
            precision="bf16",
        )
        with torch.device("meta"):
            model = Transformer(PRESETS[bench.model])
        apply_parallel(model, build_mesh(config.parallel, 1, "cpu"), config.precision)
        init_sharded_weights(model, config.seed, torch.device("cpu"))
        optimizer = build_optimizer(model, config.optimizer)
        step = TrainStep(model, optimizer, config, torch.device("cpu"))
        checkpointer = Checkpointer(Store(bench.store), Artifact, keep_last=1)
        generator = torch.Generator().manual_seed(0)
        taken = 0

        def turn() -> dict[str, float]:
            nonlocal taken
            stall, pending = 0.0, None
            if name != NONE:
                began = time.perf_counter()
                tensors = training_tensors(model, optimizer)
                pending = checkpointer.begin(taken, tensors, {})
                if name == SYNCHRONOUS:
                    pending.result()
                stall += time.perf_counter() - began
            for _ in range(bench.every):
                tokens = torch.randint(model.config.vocab_size, (bench.batch, bench.seq_len + 1), generator=generator)
                step([Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())], taken)
                taken += 1
            began = time.perf_counter()
            if pending is not None:
                pending.result()
            return {"stall_seconds": stall + time.perf_counter() - began}

        size = sum(tensor.nbytes for tensor in training_tensors(model, optimizer).values())
        serve({"megabytes": size / 1e6}, turn)


def as_text(report: CheckpointReport) -> str:
    """The table for a terminal."""
    bench = report.bench
    lines = [
        f"{bench.model}, bf16, batch {bench.batch} × {bench.seq_len} tokens, {bench.threads} thread(s); {bench.rounds} "
        f"rounds of {bench.every} steps; a checkpoint has {report.megabytes:.0f} MB",
        f"{'checkpoint':14}{'seconds':>9}{'of them stalled':>17}   time over that without",
    ]
    for row in report.rows:
        stall = "" if row.stall_seconds is None else f"{row.stall_seconds:.2f}"
        cost = "1" if row.cost is None else f"{row.cost.median:.3f}× ({row.cost.low:.3f}–{row.cost.high:.3f})"
        lines.append(f"{row.name:14}{row.seconds:9.2f}{stall:>17}   {cost}")
    return "\n".join(lines)


def as_json(report: CheckpointReport) -> dict[str, Any]:
    """Plain data."""
    return asdict(report)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=CONTESTANTS, required=True)
    for name, default in asdict(CheckpointBench()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args())
    only = options.pop("only")
    _compete(CheckpointBench(**options), only)


if __name__ == "__main__":
    _main()
