"""A training as a sequence of incarnations: plan, start workers of a fixed number, train until it ends or must change.

Every incarnation begins from the last committed checkpoint, on the nodes that are there:

    ended with         what follows
    all steps done     the end
    a failure          the next incarnation, on what is left; so many times in a row at most
    no room at all     another try, with fewer workers if fewer will do; it counts as a failure when the fewest found
                       none for `wait_for_nodes`
    a notice           a checkpoint at once; the next incarnation does without the nodes that will be taken away
    a node that came   the next incarnation, with more workers, from the next checkpoint that is due

One fixed-size `TorchTrainer` each: a label list that is given to Ray Train keeps asking for a lost node, and Ray does
not know which numbers of workers the mesh and the batch allow.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

import torch.distributed as dist
from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError, FailureConfig, PreemptionError, RunConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer

from cluster import placement
from cluster.process_group import OwnProcessGroup
from cluster.session import node_folder
from llama.training.checkpoint import CheckpointError
from pipelines.recipe import TrainRecipe
from pipelines.runs import one_line
from pipelines.training_worker import Outcome, WorkerTask, train_worker

_OWN_FAULT = (ValueError, TypeError, AttributeError, KeyError, ImportError, AssertionError)
"""Errors that another try would meet again."""

_OUTSIDE = (OSError, dist.DistError, CheckpointError)
"""Errors of the store and the network, which may work at another time."""

_NO_ROOM = "WorkerGroupStartupTimeoutError"
"""Ray's error, which has no public name, for a start that waited a minute for its resources."""

_clock = time.monotonic


class TrainingFailed(RuntimeError):
    """Training ended with an error that no restart could help, or too often; the message is one line."""


class MakeTask(Protocol):
    def __call__(self, incarnation: str, known_nodes: frozenset[str]) -> WorkerTask: ...


class Records(Protocol):
    """What the store tells of the training, between incarnations."""

    def latest_step(self) -> int:
        """Of the last whole checkpoint; 0 without one."""
        ...

    def hang(self, incarnation: str) -> str | None:
        """Says on which ranks an incarnation hung, and where the stacks lie; None if it did not."""
        ...


@dataclass(frozen=True)
class _Failure:
    """Why an incarnation failed: one line."""

    reason: str
    retryable: bool | None = True
    """None: the error alone does not tell; another try makes sense if this one had got on."""
    counts: bool = True
    """False: nothing of the training's own failed."""
    preempted: tuple[str, ...] = ()
    no_room: bool = False


def train_in_incarnations(
    train: TrainRecipe,
    sizes: placement.WorldSizes,
    task: MakeTask,
    records: Records,
    emit: Callable[[str], None],
) -> Outcome:
    """Starts incarnations until one has done all steps; returns how that ended.

    Raises TrainingFailed, or PlacementError when the nodes hold no plan (any more).
    """
    failures, lost, most = 0, frozenset[str](), sizes.largest
    crowded_since: float | None = None
    while True:
        step_before = records.latest_step()
        plan, known_nodes = _plan(train, sizes, lost, most)
        most = sizes.largest
        emit(f"starting {plan.workers} worker{'s' if plan.workers > 1 else ''}")
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
        try:
            outcome = _train_once(plan, task(name, known_nodes))
        except TrainingFailedError as error:
            failure = _diagnose(error)
            lost |= frozenset(failure.preempted)
            counts = failure.counts
            if failure.no_room:  # somebody else may hold it; fewer workers might fit beside that
                most = plan.workers - 1
                crowded_since = _clock() if crowded_since is None else crowded_since
                over = _clock() - crowded_since >= train.wait_for_nodes
                counts = over and sizes.usable(most) is None
            else:
                crowded_since = None
            if not counts:
                emit(f"{failure.reason}; planning anew")
                continue
            reason = records.hang(name) or failure.reason
            progressed = records.latest_step() > step_before
            if not (failure.retryable if failure.retryable is not None else progressed):
                raise TrainingFailed(reason) from error
            failures = 0 if progressed else failures
            if failures == train.max_failures:
                used_up = f"train.max_failures={train.max_failures} restarts are used up"
                raise TrainingFailed(f"{reason}; {used_up}") from error
            failures += 1
            emit(f"{reason}; restart {failures} of {train.max_failures} from the last committed checkpoint")
            continue
        if outcome.summary.finished:
            return outcome
        failures, lost, crowded_since = 0, lost | frozenset(outcome.preempted), None
        why = "a node will be taken away" if outcome.preempted else "there is room for more workers"
        emit(f"stopped at step {outcome.summary.step}: {why}")


def _plan(
    train: TrainRecipe, sizes: placement.WorldSizes, lost: frozenset[str], most: int
) -> tuple[placement.PlacementPlan, frozenset[str]]:
    """A plan of at most `most` workers, if so few can train, and the nodes that were there before it was made."""
    if most < sizes.largest and sizes.usable(most) is not None:
        sizes = replace(sizes, largest=most)
    known_nodes = frozenset(node.node_id for node in placement.alive_nodes())
    gone = lost | placement.unreachable_nodes()
    return placement.await_plan(sizes, train.worker_needs, train.wait_for_nodes, gone), known_nodes


def _train_once(plan: placement.PlacementPlan, task: WorkerTask) -> Outcome:
    """One incarnation. Raises TrainingFailedError."""
    # ray.train shows type checkers its older API, in which nothing is returned and fewer failures are told apart
    failure_config = FailureConfig(
        max_failures=0,
        # A start that finds no room, for a node of the plan is lost perhaps, is not repeated: it is planned anew.
        controller_failure_limit=0,  # type: ignore[call-arg]
        max_preemption_failures=0,  # type: ignore[call-arg]
    )
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]
        train_loop_config={"task": task},
        torch_config=OwnProcessGroup(),
        scaling_config=plan.to_scaling(),
        # Ray's own record of the run; our checkpoints, metrics and summary lie in the store.
        run_config=RunConfig(
            name=task.incarnation, storage_path=str(node_folder("train")), failure_config=failure_config
        ),
    )
    with _interruptible():
        outcome = trainer.fit().return_value  # type: ignore[attr-defined]
    assert isinstance(outcome, Outcome)
    return outcome


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


def _diagnose(error: TrainingFailedError) -> _Failure:
    """What failed, and on which rank."""
    if isinstance(error, PreemptionError):
        nodes = tuple(error.preemption_info.preempted_node_ids)
        return _Failure("a node was taken away before the checkpoint was written", counts=False, preempted=nodes)
    if isinstance(error, ControllerError) and type(error.controller_failure).__name__ == _NO_ROOM:
        room = "the workers found no room to start in, for something else holds it; end that, or lower train.workers"
        return _Failure(room, no_room=True)
    if isinstance(error, ControllerError):
        return _Failure(f"the workers could not be started: {one_line(error.controller_failure)}")
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return _Failure(one_line(error))
    causes = {rank: _root_cause(failure) for rank, failure in error.worker_failures.items()}
    for rank, cause in sorted(causes.items()):
        if isinstance(cause, _OWN_FAULT):
            return _Failure(f"training failed on rank {rank}: {one_line(cause)}", False)
    # When one worker dies its neighbours fail on the broken connection: name a death rather than its echo.
    deaths = {rank: cause for rank, cause in causes.items() if isinstance(cause, RayError)}
    if deaths:
        rank, cause = min(deaths.items())
        announced = any(isinstance(cause, RayActorError) and cause.preempted for cause in deaths.values())
        return _Failure(f"worker of rank {rank} was lost: {one_line(cause)}", counts=not announced)
    outside = {rank: cause for rank, cause in causes.items() if isinstance(cause, _OUTSIDE)}
    rank, cause = min((outside or causes).items())
    return _Failure(f"training failed on rank {rank}: {one_line(cause)}", True if outside else None)


def _root_cause(failure: BaseException) -> BaseException:
    """What the training function itself raised, out of Ray's wrappers."""
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None)
    return _root_cause(inner) if isinstance(inner, BaseException) and inner is not failure else failure
