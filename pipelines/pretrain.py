"""The pretrain stage: Ray Train around `llama.training`.

    {artifact}/checkpoints/step-00000100/        checkpoints, each an artifact (llama/training/checkpoint.py)
    {artifact}/incarnations/{name}.json          one per start of the workers: resumed step, ranks, nodes
    {artifact}/metrics/{name}-{step}.jsonl       the training curve in parts (pipelines/metrics.py)
    {artifact}/attempts/{attempt}/summary.json   the finished run

The driver runs an outer loop. Each turn is one incarnation: a plan of workers on the nodes that are there, one
`TorchTrainer` of fixed size, and training from the latest committed checkpoint. When workers are lost the next turn
begins; when the code or the configuration is at fault, the loop ends at once, and so it does when a failure of unclear
origin comes back before the next checkpoint. Checkpoints belong to the artifact's key, not to a run: whoever trains the
same thing next, after a killed driver for instance, goes on from them.

The key leaves out how the work is laid out over ranks (workers, parallelism, micro-batches), what is computed twice or
compiled, and when it is reported or saved, so that a run may be resumed on a smaller cluster. The layout changes
results by rounding, and through the micro-step over which the balance loss takes its averages.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import partial
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device

from cluster import placement
from cluster.session import node_folder
from cluster.storage import JSON, Artifact, StorageError, Store
from llama.config import ModelConfig
from llama.training.checkpoint import Checkpointer
from llama.training.config import TrainConfig
from llama.training.mesh import plan_mesh
from llama.training.metrics import StepMetrics, TrainSummary
from llama.training.trainer import Trainer
from pipelines.graph import Stage, StageContext
from pipelines.loader import ShardLoader
from pipelines.metrics import MetricsReader, MetricsWriter
from pipelines.recipe import TrainRecipe
from pipelines.runs import one_line

CHECKPOINTS, METRICS, INCARNATIONS, SUMMARY = "checkpoints", "metrics", "incarnations", "summary.json"

_LAYOUT = {
    "micro_batch",
    "parallel",
    "activation_checkpointing",
    "compile",
    "checkpoint_every",
    "keep_last",
    "log_every",
}
"""Settings of TrainConfig that do not belong to what is trained."""

_OWN_FAULT = (ValueError, TypeError, AttributeError, KeyError, ImportError, AssertionError)
"""Errors that another try would meet again."""

_POLL_SECONDS = 0.5

_log = logging.getLogger(__name__)


class TrainingFailed(RuntimeError):
    """Training ended with an error that no restart could help, or too often; the message is one line."""


@dataclass(frozen=True)
class WorkerTask:
    """What a training worker is sent."""

    model: ModelConfig
    train: TrainConfig
    threads: int
    shards: Artifact
    shuffle_shards: int | None
    cache_bytes: int | None
    output: Store
    """The artifact's folder: checkpoints, metrics, incarnations."""
    attempt: Store
    incarnation: str


def pretrain_stage(model: ModelConfig, train: TrainRecipe) -> Stage:
    """The stage `pretrain`, downstream of `shards`."""
    settings = {item.name: getattr(train, item.name) for item in fields(TrainConfig) if item.name not in _LAYOUT}
    settings["shuffle_shards"] = train.shuffle_shards  # the order of the samples
    return Stage("pretrain", 1, {"model": model, "train": settings}, partial(_pretrain, model, train), ("shards",))


def _pretrain(model: ModelConfig, train: TrainRecipe, context: StageContext) -> dict[str, JSON]:
    settings = TrainConfig(**{item.name: getattr(train, item.name) for item in fields(TrainConfig)})

    def task(incarnation: str) -> WorkerTask:
        return WorkerTask(
            model=model,
            train=settings,
            threads=max(1, int(train.cpus_per_worker)),
            shards=context.inputs["shards"],
            shuffle_shards=train.shuffle_shards,
            cache_bytes=train.cache_bytes,
            output=context.artifact_store,
            attempt=context.attempt.store,
            incarnation=incarnation,
        )

    with _followed(context):
        _train_with_restarts(train, task, partial(_latest_step, context), context.emit)
    summary: dict[str, Any] = context.attempt.store.read_json(SUMMARY)
    return {
        **summary,
        "checkpoint": f"{CHECKPOINTS}/step-{train.steps:08d}",
        "parameters": model.num_parameters(),
        "active_parameters": model.num_active_parameters(),
    }


def _latest_step(context: StageContext) -> int:
    """Step of the last whole checkpoint; 0 without one."""
    return Checkpointer(context.artifact_store.child(CHECKPOINTS), Artifact).latest() or 0


def _train_with_restarts(
    train: TrainRecipe,
    task: Callable[[str], WorkerTask],
    latest_step: Callable[[], int],
    emit: Callable[[str], None],
) -> None:
    """Starts incarnations until one finishes. Raises TrainingFailed."""
    for failures in range(train.max_failures + 1):
        step_before = latest_step()
        try:
            emit(f"starting {train.workers} worker{'s' if train.workers > 1 else ''}")
            _train_once(train, task(f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"))
            return
        except TrainingFailedError as error:
            reason, retryable = _diagnose(error)
            if not (retryable if retryable is not None else latest_step() > step_before):
                raise TrainingFailed(reason) from error
            if failures == train.max_failures:
                used_up = f"train.max_failures={train.max_failures} restarts are used up"
                raise TrainingFailed(f"{reason}; {used_up}") from error
            emit(f"{reason}; restart {failures + 1} of {train.max_failures} from the last committed checkpoint")


def _train_once(train: TrainRecipe, task: WorkerTask) -> None:
    """One incarnation: plan, start, train to the end.

    Raises TrainingFailedError, or PlacementError before it starts.
    """
    ep = plan_mesh(train.parallel, train.workers).ep
    plan = placement.await_plan(train.workers, ep, worker_needs(train), train.wait_for_nodes)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        scaling_config=plan.to_scaling(),
        # Ray's own record of the run; our checkpoints, metrics and summary lie in the store.
        run_config=RunConfig(
            name=task.incarnation,
            storage_path=str(node_folder("train")),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    with _interruptible():
        trainer.fit()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train takes over Ctrl-C, keeps it, and ends the process with a number; here it stays an interruption."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if on_main_thread else None
    try:
        yield
    except SystemExit as error:
        if error.code in (0, 1):  # Ray's; a signal of our own has another number
            raise KeyboardInterrupt from error
        raise
    finally:
        if on_main_thread:
            signal.signal(signal.SIGINT, before)


def worker_needs(train: TrainRecipe) -> placement.WorkerNeeds:
    """What one process of this training asks of Ray."""
    return placement.WorkerNeeds(train.cpus_per_worker, train.gpus_per_worker, train.accelerator_type)


def _diagnose(error: TrainingFailedError) -> tuple[str, bool | None]:
    """One line that says what failed on which rank, and whether another try makes sense.

    None means that the error alone does not tell: another try makes sense if this one had got on.
    """
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return one_line(error), True
    causes = {rank: _root_cause(failure) for rank, failure in error.worker_failures.items()}
    for rank, cause in sorted(causes.items()):
        if isinstance(cause, _OWN_FAULT):
            return f"training failed on rank {rank}: {one_line(cause)}", False
    # When one worker dies its neighbours fail on the broken connection: name a death rather than its echo.
    deaths = {rank: cause for rank, cause in causes.items() if isinstance(cause, RayError)}
    if deaths:
        rank, cause = min(deaths.items())
        return f"worker of rank {rank} was lost: {one_line(cause)}", True
    outside = {rank: cause for rank, cause in causes.items() if isinstance(cause, OSError | dist.DistError)}
    rank, cause = min((outside or causes).items())
    return f"training failed on rank {rank}: {one_line(cause)}", True if outside else None


def _root_cause(failure: BaseException) -> BaseException:
    """What the training function itself raised, out of Ray's wrappers."""
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None)
    return _root_cause(inner) if isinstance(inner, BaseException) and inner is not failure else failure


# --- on the workers -------------------------------------------------------------------------------------------------


def train_worker(config: Mapping[str, WorkerTask]) -> None:
    """One rank of the training; Ray Train has initialised the process group."""
    task = config["task"]
    torch.set_num_threads(task.threads)
    nodes = _verify_nodes(task)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    train = task.train
    checkpointer = Checkpointer(task.output.child(CHECKPOINTS), Artifact, keep_last=train.keep_last)
    metrics = MetricsWriter(task.output.child(METRICS), task.incarnation)

    def on_resume(step: int) -> None:
        if rank == 0:
            record = {"resumed_step": step, "world_size": world_size, "nodes": nodes}
            task.output.child(INCARNATIONS).write_json(f"{task.incarnation}.json", record)

    def on_metrics(step: StepMetrics) -> None:
        if rank == 0:
            metrics.write(asdict(step))
            if train.checkpoint_every and step.step % train.checkpoint_every == 0:
                metrics.flush()  # a run resumed from this step's checkpoint will not repeat these lines

    device = get_device()
    assert isinstance(device, torch.device)
    with ShardLoader(
        task.shards,
        seq_len=train.seq_len,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        rank=rank,
        world_size=world_size,
        seed=train.seed,
        shuffle_shards=task.shuffle_shards,
        cache_dir=node_folder("shards"),
        cache_bytes=task.cache_bytes,
    ) as loader:
        trainer = Trainer(
            task.model, train, loader, checkpointer, on_metrics=on_metrics, on_resume=on_resume, device=device
        )
        summary: TrainSummary = trainer.fit()
    if rank == 0:
        metrics.flush()
        task.attempt.write_json(SUMMARY, asdict(summary))


def _verify_nodes(task: WorkerTask) -> list[str]:
    """Node ids by rank. Raises PlacementError where an expert group crosses nodes."""
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    placement.verify(nodes, plan_mesh(task.train.parallel, len(nodes)).ep)
    return nodes


# --- watching -------------------------------------------------------------------------------------------------------


@contextmanager
def _followed(context: StageContext) -> Iterator[None]:
    """Reports the training's progress, as the store tells it, while the block runs."""
    store = context.artifact_store
    reader = MetricsReader(store.child(METRICS))
    reader.skip_existing()
    seen = set(store.list(INCARNATIONS))
    stop = threading.Event()

    def report() -> None:
        for path in store.list(INCARNATIONS):
            if path not in seen:
                seen.add(path)
                _report_start(store.read_json(path), context)
        for step in reader.poll():
            _report_step(step, context)

    def try_report() -> None:
        try:
            report()
        except StorageError as error:  # it is only the view that suffers
            _log.warning("the training's progress could not be read: %s", error)

    def follow() -> None:
        while not stop.wait(_POLL_SECONDS):
            try_report()

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    try_report()


def _report_start(incarnation: Mapping[str, Any], context: StageContext) -> None:
    step, world_size = incarnation["resumed_step"], incarnation["world_size"]
    start = f"resumed from the checkpoint of step {step}" if step else "started"
    context.emit(f"{start} on {world_size} worker{'s' if world_size > 1 else ''}")


def _report_step(step: Mapping[str, Any], context: StageContext) -> None:
    left = (step["steps"] - step["step"]) * (step["tokens"] / step["step"]) / max(step["tokens_per_second"], 1e-9)
    loss = "not finite" if step["loss"] is None else f"{step['loss']:.3f}"
    rate = f"{step['tokens_per_second']:,.0f} tokens/s"
    context.emit(
        f"step {step['step']}/{step['steps']}  loss {loss}  {rate}  {left:.0f} s left",
        fraction=step["step"] / step["steps"],
        values={
            key: step[key] for key in ("step", "loss", "tokens_per_second", "learning_rate") if step[key] is not None
        },
    )
