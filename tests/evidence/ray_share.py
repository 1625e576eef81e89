"""Evidence that Ray costs the training next to nothing: the pretrain stage under Ray Train beside the same loop under
plain torchrun, the same shards, checkpoints and metrics settings, interleaved in one run.

    python -m tests.evidence.ray_share [--workers N] [--rounds N] [--steps N]

What Ray's own processes (raylet, GCS, the controller, the driver) take of the machine's cores is measured and shown
beside it: where every core has a rank, the ranks lack at least as much; with a core to spare for them they do not.

Needs the environment of `make setup`, two quiet cores and about fifteen minutes. Exits non-zero when the median ratio
of tokens/s is below the bar.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

LEAST = 0.97
RECIPE = "pipelines/recipes/quickstart.yaml"
REPOSITORY = Path(__file__).resolve().parents[2]


def overrides(workers: int, steps: int, seed: int) -> list[str]:
    return [
        f"train.steps={steps}",
        f"train.seed={seed}",
        f"train.checkpoint_every={steps // 2}",
        f"train.workers={workers}",
        f"train.parallel.ep={workers}",
        "train.validate_every=0",
        "data.max_bytes=2_000_000",
    ]


class Helpers:
    """CPU time of this process and all below it but the training workers, while those are at work."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, Counter[str]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Helpers:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        from cluster import processes

        while not self._stop.wait(3):
            spent, at_work = Counter[str](), False
            for process in processes.tree(processes.this_process()):
                with suppress(processes.gone()):
                    name = (process.cmdline() or [""])[0].split("/")[-1].split(" ")[0]
                    if "RayTrainWorker" in name:
                        at_work = True
                    else:
                        times = process.cpu_times()
                        spent[name] += times.user + times.system
            if at_work:
                self.samples.append((time.monotonic(), spent))

    def cores(self) -> dict[str, float]:
        """By the name of the process, how many cores were busy with it; the first third is left to the start."""
        (began, before), (ended, after) = self.samples[len(self.samples) // 3], self.samples[-1]
        return {name: (after[name] - before[name]) / (ended - began) for name, _ in after.most_common()}


def under_ray(store_uri: str, workers: int, steps: int, seed: int) -> float:
    """Tokens/s of the pretrain stage, as its summary says; each seed is another artifact."""
    from cluster.storage import Store
    from pipelines.drive import drive
    from pipelines.recipe import Recipe
    from pipelines.runs import Run
    from pipelines.stages import build_graph

    recipe = Recipe.load(REPOSITORY / RECIPE, overrides(workers, steps, seed))
    store = Store(store_uri)
    run = Run.create(store, recipe.to_yaml(), until="pretrain")
    results = drive(build_graph(recipe, "", keep=False), store, run, until="pretrain")
    return results["pretrain"].metadata["tokens_per_second"]


def under_torchrun(store_uri: str, workers: int, steps: int, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        command += ["-m", "tests.evidence.ray_share", "--worker", store_uri, str(workers), str(steps), str(seed)]
        command.append(str(answer))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
        return json.loads(answer.read_text())["tokens_per_second"]


def worker(store_uri: str, workers: int, steps: int, seed: int, answer: str) -> None:
    """One rank under torchrun: the trainer, the loader and the checkpointer, nothing of Ray."""
    import torch
    import torch.distributed as dist

    from cluster.artifact import Artifact
    from cluster.storage import Store
    from llama.training.checkpoint import Checkpointer
    from llama.training.config import TrainConfig
    from llama.training.trainer import Trainer
    from pipelines.loader import ShardLoader
    from pipelines.recipe import Recipe
    from pipelines.stages import build_graph

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    recipe = Recipe.load(REPOSITORY / RECIPE, overrides(workers, steps, seed))
    train: TrainConfig = recipe.train
    store = Store(store_uri)
    shards = build_graph(recipe, "", keep=False).artifact(store, "shards")
    checkpointer = Checkpointer(store.child("torchrun", f"{seed}"), Artifact)
    with ShardLoader(
        shards,
        seq_len=train.seq_len,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        rank=rank,
        world_size=world_size,
        seed=train.seed,
    ) as loader:
        summary = Trainer(recipe.model, train, loader, checkpointer).fit()
    if rank == 0:
        Path(answer).write_text(json.dumps({"tokens_per_second": summary.tokens_per_second}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        uri, workers, steps, seed, answer = options.worker
        worker(uri, int(workers), int(steps), int(seed), answer)
        return
    from cluster import session

    ratios, busy = [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder, session.connect("local", num_cpus=2, dashboard=False):
        under_ray(folder, options.workers, 2, seed=99)  # makes the shards
        for turn in range(options.rounds):
            arms = [under_ray, under_torchrun]
            rates: dict[Any, float] = {}
            for arm in arms if turn % 2 else reversed(arms):
                with Helpers() as helpers:
                    rates[arm] = arm(folder, options.workers, options.steps, turn)
                busy.update(helpers.cores() if arm is under_ray else {})
            ratios.append(rates[under_ray] / rates[under_torchrun])
            print(
                f"round {turn + 1}: Ray Train {rates[under_ray]:,.0f} tokens/s, torchrun "
                f"{rates[under_torchrun]:,.0f}, {ratios[-1]:.3f}×",
                flush=True,
            )
    each = ", ".join(f"{name} {cores / options.rounds:.3f}" for name, cores in busy.most_common(6))
    print(f"      cores busy with Ray's own processes and the driver: {busy.total() / options.rounds:.3f} ({each})")
    holds = median(ratios) >= LEAST
    verdict = "ok  " if holds else "FAIL"
    print(
        f"{verdict}  {options.workers} workers, Ray Train ≥ {LEAST}× torchrun: {median(ratios):.3f}× "
        f"({min(ratios):.3f}–{max(ratios):.3f})"
    )
    sys.exit(not holds)


if __name__ == "__main__":
    main()
