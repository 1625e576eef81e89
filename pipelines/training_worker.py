"""One rank of a training under Ray Train: its process group, its data, its trainer, and its line to the cluster.

Nothing that is written for the eye (incarnation record, metrics) may hold the training up or end it: `_Reports` writes
it on a thread of its own. What the cluster wants of the training, `ClusterWatch` notices on a thread of its own.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import ray
import ray.train
import torch
import torch.distributed as dist

from cluster import placement
from cluster.artifact import Artifact
from cluster.process_group import process_group
from cluster.session import node_folder
from cluster.storage import JSON, Store
from llama.config import ModelConfig
from llama.model import LanguageModel
from llama.retry import retried
from llama.training.batch import Batch
from llama.training.checkpoint import Checkpointer
from llama.training.config import TrainConfig
from llama.training.control import Request
from llama.training.mesh import plan_mesh
from llama.training.metrics import StepMetrics, TrainSummary
from llama.training.trainer import Trainer
from llama.training.watchdog import Watchdog
from pipelines.finetune import Start
from pipelines.gauges import TrainGauges
from pipelines.loader import RankLoader, RankSlices
from pipelines.metrics import MetricsWriter
from pipelines.training_folder import CHECKPOINTS, HANGS, INCARNATIONS, METRICS, START

_WATCH_SECONDS = 2.0
_CLOSE_SECONDS = 120.0

_log = logging.getLogger(__name__)


class TrainingData(Protocol):
    """What is trained on: picklable, and opened by every rank."""

    def open(self, slices: RankSlices, seq_len: int, seed: int, cache_dir: Path) -> RankLoader:
        """`cache_dir`: a folder on the node's disk. Raises StorageError, DataError."""
        ...


@dataclass(frozen=True)
class WorkerTask:
    """What a training worker is sent."""

    model: ModelConfig
    train: TrainConfig
    threads: int
    data: TrainingData
    start: Start | None
    """None: training starts from weights drawn by the seed."""
    output: Store
    """The artifact's folder: checkpoints, metrics, incarnations, hangs."""
    incarnation: str
    run: str
    """Its id, for the eye."""
    stage: str
    """Of several trainings in a run each has a name of its own."""
    sizes: placement.WorldSizes
    needs: placement.WorkerNeeds
    known_nodes: frozenset[str]
    """Ids of the nodes that were there when this incarnation was planned: only another is a reason to grow."""


@dataclass(frozen=True)
class Outcome:
    """How an incarnation ended that did not fail."""

    summary: TrainSummary
    preempted: tuple[str, ...]
    """Ids of nodes that are about to be taken away."""


def train_worker(config: Mapping[str, WorkerTask]) -> Outcome:
    """One rank of the training; Ray Train hands rank 0's outcome to the driver."""
    task = config["task"]
    torch.set_num_threads(task.threads)
    rank = ray.train.get_context().get_world_rank()
    with Watchdog(task.train.hang_seconds, partial(_report_hang, task, rank)) as watchdog, process_group() as device:
        nodes = _verify_nodes(task)
        with _Reports(task, watchdog) if rank == 0 else _NoReports() as reports, ClusterWatch(task) as watch:
            summary = _train(task, device, reports, watch, watchdog, nodes)
        return Outcome(summary, watch.preempted)


def _train(
    task: WorkerTask,
    device: torch.device,
    reports: _Reports | _NoReports,
    watch: ClusterWatch,
    watchdog: Watchdog,
    nodes: list[str],
) -> TrainSummary:
    train, rank, world_size = task.train, dist.get_rank(), dist.get_world_size()
    checkpointer = Checkpointer(
        task.output.child(CHECKPOINTS),
        Artifact,
        keep_last=train.keep_last,
        keep_best=train.keep_best,
        keep_every=train.keep_every,
    )

    def open_loader() -> RankLoader:
        slices = RankSlices(train.global_batch, train.micro_batch, rank, world_size)
        return task.data.open(slices, train.seq_len, train.seed, node_folder("shards"))

    with retried(open_loader, "opening the data", sleep=watchdog.sleep) as loader:
        validation: list[Batch] = []
        if train.validate_every:
            read = partial(loader.validation_batches, train.validate_rows)
            validation = retried(read, "reading the validation rows", sleep=watchdog.sleep)
        return Trainer(
            task.model,
            train,
            loader,
            checkpointer,
            start=partial(_load_start, task.start, watchdog) if task.start is not None else None,
            validation=validation,
            on_metrics=reports.step,
            on_resume=lambda step: reports.start(step, nodes),
            control=watch.request,
            watchdog=watchdog,
            device=device,
        ).fit()


def _load_start(start: Start, watchdog: Watchdog, model: LanguageModel) -> None:
    """All ranks go on together: those of a node whose copy is there do not wait in the first step for the others."""
    with watchdog.paused():
        start.load(model)
        dist.barrier()


def _verify_nodes(task: WorkerTask) -> list[str]:
    """Node ids by rank. Raises PlacementError where an expert group crosses nodes."""
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    placement.verify(nodes, plan_mesh(task.train.parallel, len(nodes)).ep)
    return nodes


def _report_hang(task: WorkerTask, rank: int, stacks: str) -> None:
    task.output.child(HANGS, task.incarnation).write_bytes(f"rank-{rank:05d}.txt", stacks.encode())


class ClusterWatch:
    """What the cluster wants of this training; entered by every rank, each with a thread that looks every two seconds.

    Of a node that is about to be taken away Ray Train tells the ranks within five seconds, whoever announced it:
    `ray drain-node`, a cloud's or Kubernetes' SIGTERM to `ray start --block`, the autoscaler. (A signal to a worker
    process alone is no notice; the worker dies of it, which is a failure like others.) For a training that may grow
    rank 0 looks for nodes that have come.
    """

    def __init__(self, task: WorkerTask) -> None:
        self.preempted: tuple[str, ...] = ()
        self._task = task
        self._grows = dist.get_rank() == 0 and dist.get_world_size() < task.sizes.largest
        self._request = Request.GO_ON
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cluster-watch", daemon=True)

    def request(self) -> Request:
        return self._request

    def __enter__(self) -> ClusterWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        # not joined: it may be waiting for a rank whose thread has ended
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(_WATCH_SECONDS):
            try:
                self._look()
            except Exception as error:  # the cluster's state is not at hand; the training does not depend on it
                _log.warning("looking at the cluster failed: %s", error)

    def _look(self) -> None:
        # every rank comes here as often as the others: this call waits for all of them
        notice = ray.train.get_preemption_info()
        if notice is not None:
            self.preempted = tuple(notice.preempted_node_ids)
            self._request = Request.STOP_NOW
        elif self._grows and self._request is Request.GO_ON and self._fits_more():
            self._request = Request.STOP_AT_CHECKPOINT

    def _fits_more(self) -> bool:
        nodes = placement.alive_nodes()
        if all(node.node_id in self._task.known_nodes for node in nodes):
            return False
        room = placement.capacity(nodes, self._task.sizes.ep, self._task.needs)
        return (self._task.sizes.usable(room) or 0) > dist.get_world_size()


class _NoReports:
    """Of the ranks that write none."""

    def start(self, step: int, nodes: list[str]) -> None:
        pass

    def step(self, metrics: StepMetrics) -> None:
        pass

    def __enter__(self) -> _NoReports:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class _Reports:
    """Writes the incarnation's record and its metrics, on a thread; what the store does not take is tried again with
    the next report, and once more for two minutes at the end. The log says once that it fails."""

    def __init__(self, task: WorkerTask, watchdog: Watchdog) -> None:
        self._task = task
        self._watchdog = watchdog
        self._metrics = MetricsWriter(task.output.child(METRICS), task.incarnation)
        self._gauges = TrainGauges(task.run, task.stage)
        self._record: dict[str, JSON] | None = None
        self._reports: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._warned = False
        self._thread = threading.Thread(target=self._write, name="reports", daemon=True)

    def start(self, step: int, nodes: list[str]) -> None:
        record: dict[str, JSON] = {"resumed_step": step, "world_size": len(nodes), "nodes": list(nodes)}
        if self._task.start is not None:
            record[START] = self._task.start.fingerprint
        self._reports.put(partial(self._begin, record))

    def step(self, metrics: StepMetrics) -> None:
        self._reports.put(partial(self._gauges.set, metrics))
        self._reports.put(partial(self._metrics.write, metrics))
        every, next_report = self._task.train.checkpoint_every, self._task.train.log_every
        if every and -metrics.step % every < next_report - metrics.step % next_report:
            self._reports.put(self._metrics.flush)  # a run resumed from its checkpoint will not repeat these lines

    def __enter__(self) -> _Reports:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._reports.put(None)
        with self._watchdog.paused():
            self._thread.join(_CLOSE_SECONDS)

    def _write(self) -> None:
        while (report := self._reports.get()) is not None:
            try:
                report()
                self._flush_record()
            except OSError as error:
                if not self._warned:
                    _log.warning("metrics could not be written, and are kept for later: %s", error)
                self._warned = True
            except Exception:  # a defect of this report; the next ones are told all the same
                _log.exception("a report was left out")
        retried(self._flush_record, "writing the incarnation's record")
        retried(self._metrics.flush, "writing metrics")

    def _begin(self, record: dict[str, JSON]) -> None:
        self._record = record

    def _flush_record(self) -> None:
        if self._record is not None:
            self._task.output.child(INCARNATIONS).write_json(f"{self._task.incarnation}.json", self._record)
            self._record = None
