"""Evidence that Ray costs the training next to nothing: the pretrain stage under Ray Train beside the same loop under
plain torchrun, two ranks each, the same shards, checkpoints and metrics settings, interleaved in one run.

    python -m tests.evidence.ray_share [--rounds N] [--steps N]

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
from pathlib import Path
from statistics import median

LEAST = 0.97
WORLD_SIZE = 2
RECIPE = "pipelines/recipes/quickstart.yaml"
REPOSITORY = Path(__file__).resolve().parents[2]


def overrides(steps: int, seed: int) -> list[str]:
    return [
        f"train.steps={steps}",
        f"train.seed={seed}",
        f"train.checkpoint_every={steps // 2}",
        f"train.workers={WORLD_SIZE}",
        "train.validate_every=0",
        "data.max_bytes=2_000_000",
    ]


def under_ray(store_uri: str, steps: int, seed: int) -> float:
    """Tokens/s of the pretrain stage, as its summary says; each seed is another artifact."""
    from cluster.storage import Store
    from pipelines.recipe import Recipe
    from pipelines.runs import Run
    from pipelines.stages import build_graph

    recipe = Recipe.load(REPOSITORY / RECIPE, overrides(steps, seed))
    store = Store(store_uri)
    run = Run.create(store, recipe.to_yaml(), until="pretrain")
    results = build_graph(recipe, "", keep=False).run(store, run, until="pretrain")
    return results["pretrain"].metadata["tokens_per_second"]


def under_torchrun(store_uri: str, steps: int, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
        command += ["-m", "tests.evidence.ray_share", "--worker", store_uri, str(steps), str(seed), str(answer)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
        return json.loads(answer.read_text())["tokens_per_second"]


def worker(store_uri: str, steps: int, seed: int, answer: str) -> None:
    """One rank under torchrun: the trainer, the loader and the checkpointer, nothing of Ray."""
    import torch
    import torch.distributed as dist

    from cluster.storage import Artifact, Store
    from llama.training.checkpoint import Checkpointer
    from llama.training.config import TrainConfig
    from llama.training.trainer import Trainer
    from pipelines.loader import ShardLoader
    from pipelines.recipe import Recipe
    from pipelines.stages import build_graph

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    recipe = Recipe.load(REPOSITORY / RECIPE, overrides(steps, seed))
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
    parser.add_argument("--worker", nargs=4)
    options = parser.parse_args()
    if options.worker:
        uri, steps, seed, answer = options.worker
        worker(uri, int(steps), int(seed), answer)
        return
    from cluster import session

    ratios = []
    with tempfile.TemporaryDirectory() as folder, session.connect("local", num_cpus=2, dashboard=False):
        under_ray(folder, 2, seed=99)  # makes the shards
        for turn in range(options.rounds):
            arms = [under_ray, under_torchrun]
            rates = {}
            for arm in arms if turn % 2 else reversed(arms):
                rates[arm] = arm(folder, options.steps, turn)
            ratios.append(rates[under_ray] / rates[under_torchrun])
            print(
                f"round {turn + 1}: Ray Train {rates[under_ray]:,.0f} tokens/s, torchrun "
                f"{rates[under_torchrun]:,.0f}, {ratios[-1]:.3f}×",
                flush=True,
            )
    holds = median(ratios) >= LEAST
    print(
        f"{'ok  ' if holds else 'FAIL'}  Ray Train ≥ {LEAST}× torchrun: {median(ratios):.3f}× "
        f"({min(ratios):.3f}–{max(ratios):.3f})"
    )
    sys.exit(not holds)


if __name__ == "__main__":
    main()
