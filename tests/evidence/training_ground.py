"""A fake cluster of several nodes, checkpoints on a real S3 server, and a small training to disturb.

The head holds the driver and no worker, so that a node with workers can be lost. Every other node has two slots and an
address of its own, by which Ray Train tells nodes apart.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from cluster import processes  # noqa: E402
from cluster.artifact import Artifact  # noqa: E402
from cluster.head import prepare_environment  # noqa: E402
from cluster.storage import StorageError, Store  # noqa: E402
from pipelines.metrics import MetricsReader  # noqa: E402
from tests.evidence.faulty_proxy import FaultyProxy  # noqa: E402
from tests.swift import Swift, running_swift  # noqa: E402

STEPS, EVERY, GLOBAL_BATCH = 120, 10, 8
LONGEST_SECONDS = 400
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"sources": [{"uri": ""}], "validation_fraction": 0.1, "min_document_chars": 8},
    "tokenizer": {"vocab_size": 320},
    "model": {
        "dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_seq_len": 64,
        "moe": {"num_experts": 4, "expert_hidden_dim": 64},
    },
    "train": {
        "workers": 2,
        "cpus_per_worker": 1,
        "parallel": {"ep": 2},
        "steps": STEPS,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": 2,
        "seq_len": 32,
        "checkpoint_every": EVERY,
        "log_every": 1,
        "wait_for_nodes": 60,
        "max_failures": 3,
    },
}


def caravan(arguments: list[str], environment: dict[str, str], log: Path, before: Callable[[], None] | None) -> None:
    """The command, in a process that has imported it already and called `before`; its output goes to a file."""
    os.environ.update(environment)
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from pipelines.cli import app

    if before is not None:
        before()
    app(arguments)


@dataclass
class Ground:
    """The cluster, the store and the runs on them."""

    folder: Path
    swift: Swift
    cluster: Any
    nodes: list[Any]
    proxy: FaultyProxy
    bucket: str
    disk: Path | None
    """Where Ray's session lies, if it is a small disk of its own."""
    runs: int = 0

    def __post_init__(self) -> None:
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["pipelines.cli", "pipelines.stages", "pipelines.progress", "ray.train"])
        self.store = Store(self.swift.uri(self.bucket, "store"))
        self.proxied = f"s3://{self.bucket}/store?endpoint_override=127.0.0.1:{self.proxy.port}&scheme=http"

    # -- runs

    def start(self, until: str = "pretrain", before: Callable[[], None] | None = None, **train: Any) -> BaseProcess:
        self.runs += 1
        settings = [part for key, value in train.items() for part in ("--set", f"train.{key}={value}")]
        arguments = ["run", str(self.folder / "recipe.yaml"), "--store", self.proxied, "--until", until, *settings]
        environment = {"RAY_ADDRESS": self.cluster.address, "CARAVAN_HOME": str(self.folder / "home")}
        process = self._processes.Process(target=caravan, args=(arguments, environment, self.log, before), daemon=True)
        process.start()
        return process

    @property
    def log(self) -> Path:
        return self.folder / f"run-{self.runs:03d}.log"

    def finish(self, process: BaseProcess) -> bool:
        """Whether the run ended well, in time."""
        process.join(LONGEST_SECONDS)
        if process.exitcode != 0:
            said = self.log.read_text(errors="replace")[-3000:] if self.log.exists() else "nothing was said"
            print(f"      exit code {process.exitcode}:\n{said}", flush=True)
            if process.is_alive():
                process.kill()
                process.join()
        return process.exitcode == 0

    def forget(self) -> None:
        self.store.delete("artifacts/pretrain")

    # -- what the store tells

    def training(self) -> Store | None:
        """The folder of the one training; None before anything of it is stored."""
        keys = {path.split("/")[2] for path in self.store.list("artifacts/pretrain")}
        return self.store.child("artifacts", "pretrain", *keys) if keys else None

    def curve(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self._metrics().steps()}

    def steps_by_start(self) -> dict[str, list[int]]:
        """The steps on record of each incarnation, in order."""
        return {name: [row["step"] for row in rows] for name, rows in self._metrics().by_writer().items()}

    def _metrics(self) -> MetricsReader:
        folder = self.training()
        assert folder is not None
        reader = MetricsReader(folder.child("metrics"))
        reader.poll()
        return reader

    def starts(self) -> list[dict[str, Any]]:
        folder = self.training()
        if folder is None:
            return []
        return [folder.read_json(path) | {"name": Path(path).stem} for path in folder.list("incarnations")]

    def committed(self) -> list[int]:
        folder = self.training()
        paths = folder.list("checkpoints") if folder else []
        return sorted(int(found[1]) for path in paths if (found := re.search(r"step-(\d+)/manifest\.json$", path)))

    def unreadable(self) -> list[str]:
        """Listed checkpoints whose files are not what their manifest says."""
        folder, bad = self.training(), []
        for step in self.committed():
            assert folder is not None
            try:
                Artifact(folder.child("checkpoints", f"step-{step:08d}")).verify()
            except StorageError as error:
                bad.append(f"step {step}: {error}")
        return bad

    # -- processes

    def workers(self, node: Any = None) -> list[int]:
        """Training workers at work, of one node or of all."""
        roots = [processes.find(pid) for pid in (_raylet(node) if node else _raylets(self.nodes))]
        members = {member.pid: member for root in roots if root is not None for member in processes.tree(root)}
        found = []
        for pid, member in members.items():
            with suppress(processes.gone()):
                if "RayTrainWorker" in " ".join(member.cmdline()):
                    found.append(pid)
        return sorted(found)

    def node_of_workers(self) -> Any:
        """A node on which workers are at work."""
        return next((node for node in self.nodes if self.workers(node)), None)

    def add_node(self) -> Any:
        number = 2 + self._next_address()
        node = self.cluster.add_node(num_cpus=2, node_ip_address=f"127.0.0.{number}", object_store_memory=80 * 2**20)
        self.nodes.append(node)
        return node

    def lose_node(self, node: Any) -> None:
        """kill -9 of everything on it."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def _next_address(self) -> int:
        used = {int(node.node_ip_address.rpartition(".")[2]) for node in self.nodes}
        return next(number for number in range(250) if number + 2 not in used)


def _raylet(node: Any) -> list[int]:
    return [info.process.pid for info in node.all_processes.get("raylet", [])]


def _raylets(nodes: list[Any]) -> list[int]:
    return [pid for node in nodes for pid in _raylet(node)]


@contextmanager
def training_ground(folder: Path, nodes: int = 2, disk: Path | None = None) -> Iterator[Ground]:
    """Everything up, with the data stages done. `disk`: a folder for Ray's session."""
    prepare_environment(loopback=True)
    os.environ.update(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5", OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY))
    import ray
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    (folder / "swift").mkdir(parents=True)
    with running_swift(folder / "swift") as swift:
        _write_corpus(folder)
        head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        if disk is not None:
            head["temp_dir"] = str(disk)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        proxy = FaultyProxy(swift.ports["proxy"])
        ground = Ground(folder, swift, cluster, [], proxy, swift.make_bucket(), disk)
        try:
            for _ in range(nodes):
                ground.add_node()
            if not ground.finish(ground.start(until="shards")):
                sys.exit("the data could not be prepared")
            yield ground
        finally:
            members = [
                member
                for node in (cluster.head_node, *ground.nodes)
                for pid in _raylet(node)
                if (root := processes.find(pid))
                for member in processes.tree(root)
            ]
            proxy.close()
            ray.shutdown()
            cluster.shutdown()
            processes.await_end(members, grace=10)


def _write_corpus(folder: Path) -> None:
    draw = random.Random(0)
    (folder / "corpus").mkdir()
    for number in range(60):
        names = [f"{draw.choice('abcdefgh')}{draw.randrange(30)}" for _ in range(12)]
        lines = (f"def {a}({b}):\n    return {b} + {number}\n" for a in names for b in names[:3])
        (folder / "corpus" / f"{number}.txt").write_text("\n".join(lines))
    recipe = {**RECIPE, "data": {**RECIPE["data"], "sources": [{"uri": str(folder / "corpus")}]}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def wait_until(condition: Any, seconds: float, process: BaseProcess | None = None) -> Any:
    """What `condition` gives once that is true; None after so many seconds, or when the process has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (process is None or process.is_alive()):
        with suppress(StorageError):
            if found := condition():
                return found
        time.sleep(0.05)
    return None
