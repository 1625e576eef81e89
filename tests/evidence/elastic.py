"""Evidence that a training shrinks, grows and heeds notices, and trains on every sample exactly once all the same.

    python tests/evidence/elastic.py [--part elastic|drain]

    elastic   four workers on two nodes lose one, go on with two, get a node back and end with four
    drain     a node is drained (`ray drain-node`, what a notice becomes): a checkpoint at once, then without it

Every rank writes down a hash of each row that its loader hands out. In the committed trajectory, which is of every step
the version that the later ones build on, the rows of each step must be those that one process alone reads for that
step, each once; steps that were rolled back are counted apart. A few minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import xxhash  # noqa: E402

from cluster.artifact import Artifact  # noqa: E402
from pipelines.loader import ShardLoader  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402
from tests.evidence.training_ground import GLOBAL_BATCH, RECIPE, Ground, training_ground, wait_until  # noqa: E402

STEPS = 400
SECONDS = 240
Rows = Counter[str]


# -- on the workers


class RecordingLoader(ShardLoader):
    """Writes a line for each micro-batch that is handed out: its step, and the hashes of its rows."""

    record: Path

    def load_state_dict(self, state: dict[str, int]) -> None:
        super().load_state_dict(state)
        self.resumed = state["samples_consumed"] // GLOBAL_BATCH

    def __next__(self) -> Any:
        number = self.__dict__.setdefault("handed_out", 0)
        self.handed_out = number + 1
        batch = super().__next__()
        step = self.__dict__.get("resumed", 0) + number // self._micro_batches + 1
        with open(self.record, "a") as file:
            print(step, *hashes(batch), file=file)
        return batch


def hashes(batch: Any) -> list[str]:
    return [xxhash.xxh3_64_hexdigest(row.numpy().tobytes()) for row in batch.inputs]


def recording_worker(folder: Path, config: Mapping[str, Any]) -> Any:
    import ray.train

    from pipelines import training_worker

    rank = ray.train.get_context().get_world_rank()
    RecordingLoader.record = folder / f"{config['task'].incarnation}-{rank}"
    training_worker.ShardLoader = RecordingLoader  # type: ignore[misc]
    return training_worker.train_worker(config)


def record_in(folder: Path) -> None:
    """In the driver: its workers record."""
    from pipelines import incarnations

    incarnations.train_worker = partial(recording_worker, folder)  # type: ignore[assignment]


# -- what was recorded


def read_records(folder: Path) -> dict[str, dict[int, Rows]]:
    """By incarnation and step the rows that all ranks together drew."""
    found: dict[str, dict[int, Rows]] = {}
    for path in sorted(folder.iterdir()):
        steps = found.setdefault(path.name.rpartition("-")[0], {})
        for line in path.read_text().splitlines():
            step, *rows = line.split()
            steps.setdefault(int(step), Counter()).update(rows)
    return found


def committed(records: dict[str, dict[int, Rows]]) -> tuple[dict[int, Rows], int]:
    """Of every step the version that stands, and how many steps were rolled back."""
    trajectory: dict[int, Rows] = {}
    rolled_back = 0
    for _, steps in sorted(records.items()):
        first = min(steps)
        rolled_back += sum(step >= first for step in trajectory)
        trajectory = {step: rows for step, rows in trajectory.items() if step < first} | steps
    return trajectory, rolled_back


def one_process(ground: Ground) -> dict[int, Rows]:
    """By step the rows that a loader of one rank hands out."""
    shards = {"/".join(path.split("/")[:3]) for path in ground.store.list("artifacts/shards")}
    train = RECIPE["train"]
    with ShardLoader(
        Artifact(ground.store.child(*shards.pop().split("/"))),
        seq_len=train["seq_len"],
        global_batch=GLOBAL_BATCH,
        micro_batch=GLOBAL_BATCH,
        cache_dir=ground.folder / "cache",
    ) as loader:
        return {step: Counter(hashes(next(loader))) for step in range(1, STEPS + 1)}


# -- the two parts


def begin(ground: Ground, **train: Any) -> tuple[Any, Path]:
    folder = ground.folder / "records"
    folder.mkdir()
    from tests.evidence import elastic  # by its own name, under which the workers find it too

    process = ground.start(before=partial(elastic.record_in, folder), steps=STEPS, **train)
    if not wait_until(lambda: len(ground.committed()) > 1, SECONDS, process):
        sys.exit(f"no training began:\n{ground.log.read_text(errors='replace')}")
    return process, folder


def conclude(ground: Ground, process: Any, folder: Path, worlds: list[int], claims: Claims) -> None:
    finished = ground.finish(process)
    claims.check("the run finished", finished, finished)
    starts = ground.starts()
    found = [start["world_size"] for start in starts]
    claims.check(f"workers of the incarnations: {worlds}", found, found == worlds)
    print(f"      resumed at {[start['resumed_step'] for start in starts]}", flush=True)
    trajectory, rolled_back = committed(read_records(folder))
    expected = one_process(ground)
    same = sum(trajectory.get(step) == rows for step, rows in expected.items())
    claims.check("steps whose rows are those that one process reads", f"{same} of {STEPS}", same == STEPS)
    claims.check("steps in the trajectory", len(trajectory), trajectory.keys() == expected.keys())
    total = sum((rows for rows in trajectory.values()), Counter())
    claims.check("samples in it, each once", total.total(), total == sum(expected.values(), Counter()))
    print(f"      rolled back: {rolled_back} steps", flush=True)
    claims.check("listed checkpoints that cannot be read", ground.unreadable() or 0, not ground.unreadable())


def shrink_and_grow(ground: Ground, claims: Claims) -> None:
    process, folder = begin(ground, workers="[2,4]")
    moment = time.monotonic()
    ground.lose_node(ground.node_of_workers())
    wait_until(lambda: len(ground.starts()) == 2, SECONDS, process)
    print(f"      {time.monotonic() - moment:.1f} s from the loss of a node to training without it", flush=True)
    before = max(ground.committed())
    wait_until(lambda: max(ground.committed()) > before, SECONDS, process)
    moment = time.monotonic()
    ground.add_node()
    wait_until(lambda: len(ground.starts()) == 3, SECONDS, process)
    print(f"      {time.monotonic() - moment:.1f} s from a node's coming to training with it", flush=True)
    conclude(ground, process, folder, [4, 2, 4], claims)


def drain(ground: Ground, claims: Claims) -> None:
    process, folder = begin(ground, workers="[2,4]")
    node = ground.node_of_workers()
    moment = time.monotonic()
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", ground.cluster.address]
    command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "evidence", "--deadline-remaining-seconds", "120"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(ground.starts()) == 2, SECONDS, process)
    print(f"      {time.monotonic() - moment:.1f} s from the notice to training without the node", flush=True)
    conclude(ground, process, folder, [4, 2], claims)
    _, lost = committed(read_records(folder))
    claims.check("steps lost to the notice", lost, lost == 0)
    nodes = set(ground.starts()[1]["nodes"])
    claims.check("the drained node is not used again", node.node_id not in nodes, node.node_id not in nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"elastic": shrink_and_grow, "drain": drain}
    parser.add_argument("--part", choices=parts, default="elastic")
    arguments = parser.parse_args()
    claims, began = Claims(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="caravan-elastic-") as folder, training_ground(Path(folder)) as ground:
        parts[arguments.part](ground, claims)
        print(ground.log.read_text(errors="replace")[-3000:], flush=True)
    claims.check("minutes", f"{(time.monotonic() - began) / 60:.1f}", time.monotonic() - began <= 25 * 60)
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
