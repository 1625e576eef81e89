"""Checkpoints: asynchronous, committed when whole, loadable into any layout.

    {folder}/step-00000100/        an artifact each: rank files, index.json, and the manifest that makes it count

Tensors are saved by name, sharded ones as DTensors, so torch's distributed checkpoint (DCP) can cut them for another
number of ranks. What is not a tensor (step, schedule, loader position) is JSON in the manifest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.tensor import DTensor

from llama.lora import base_state, trained_state
from llama.training.artifact import Artifact, Files, Manifest
from llama.training.optim import optimizer_tensors
from llama.training.tensor_files import (
    ArtifactReader,
    ArtifactWriter,
    CorruptCheckpoint,
    StoredTensor,
    check_stored,
    read_index,
    read_tensors,
)

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "CorruptCheckpoint",
    "StoreFailed",
    "kept",
    "load_model_weights",
    "training_tensors",
]

log = logging.getLogger(__name__)

FilesT = TypeVar("FilesT", bound=Files)
ResultT = TypeVar("ResultT")

MANIFEST = "manifest.json"
"""What makes an artifact count, in its folder."""

_MODEL = "model."
_OPTIMIZER = "optimizer."
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; says on which ranks and why."""


class StoreFailed(CheckpointError):
    """The store, and nothing that was asked of it, is at fault: another try may succeed."""


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything of a training state that is a tensor, by name, sharing memory: to save, or to load into.

    Of a model with adapters (llama/lora.py) these and nothing else: the weights below them do not change.
    """
    weights = {_MODEL + name: tensor for name, tensor in trained_state(model).items()}
    moments = {_OPTIMIZER + name: tensor for name, tensor in optimizer_tensors(model, optimizer).items()}
    return weights | moments


def load_model_weights(artifact: Artifact, model: nn.Module, *, below_adapters: bool = False) -> dict[str, Any]:
    """Fills a model from a committed checkpoint, whatever layout wrote it; returns its progress.

    Of a sharded model every rank of the default process group fills its shards, together; a plain one needs no group.

    Args:
        below_adapters: fill what lies below the model's adapters, from a checkpoint without any; otherwise the
            checkpoint is one of this model, and of a model with adapters it holds nothing but them.

    Raises:
        FileNotFoundError: nothing is committed there.
        ValueError: the checkpoint is of another architecture.
        CorruptCheckpoint: bytes are missing or wrong.
        CheckpointError: the store failed.
    """
    manifest = artifact.manifest()
    if manifest is None:
        raise FileNotFoundError(f"{artifact}: no committed checkpoint here")
    files = artifact.files
    stored = read_index(files, manifest)
    state = base_state(model) if below_adapters else trained_state(model)
    tensors = {_MODEL + name: tensor for name, tensor in state.items()}
    check_stored(stored, tensors)
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        group = dist.new_group(backend="gloo")
        _load_sharded(files, stored, tensors, group, str(artifact))
        dist.destroy_process_group(group)
    else:
        read_tensors(files, stored, tensors)
    return manifest.metadata


def kept(losses: Mapping[int, float | None], *, keep_last: int, keep_best: int = 0, keep_every: int = 0) -> set[int]:
    """Which checkpoints stay, of those of these steps with their validation losses (None: not measured).

    The latest `keep_last`, and that is one at least; of the measured ones the `keep_best` of lowest loss, of equal ones
    the later; and those whose step `keep_every` divides.
    """
    steps = sorted(losses)
    measured = [(loss, -step) for step, loss in losses.items() if loss is not None]
    best = {-negative for _, negative in sorted(measured)[:keep_best]}
    return {*steps[-keep_last:], *best, *(step for step in steps if keep_every and step % keep_every == 0)}


def _load_sharded(
    files: Files, stored: dict[str, StoredTensor], tensors: dict[str, Tensor], group: dist.ProcessGroup, what: str
) -> None:
    """Raises on every rank what one of them meets."""
    try:
        dcp.load(
            tensors,
            storage_reader=ArtifactReader(files, stored),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, CorruptCheckpoint):
                raise cause from error
        by_store = any(isinstance(cause, OSError) for cause, _ in error.failures.values())
        kind = StoreFailed if by_store else CheckpointError
        raise kind(f"{what} could not be read: {error}") from error


class Checkpointer:
    """Writes and finds the checkpoints of one run. Every rank of the default process group makes one, together.

    Collectives run on a gloo group of its own, because saving happens in a thread beside the training's collectives.

    Args:
        folder: where the checkpoints lie.
        open_artifact: makes an artifact of a folder (`cluster.artifact.Artifact`).
        keep_last, keep_best, keep_every: which committed checkpoints stay (`kept`); the others go once a new one is
            committed. A validation loss is the `val_loss` of the progress that was saved.
    """

    def __init__(
        self,
        folder: FilesT,
        open_artifact: Callable[[FilesT], Artifact],
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        keep_every: int = 0,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"train.keep_last={keep_last} must be at least 1")
        self._folder = folder
        self._open = lambda name: open_artifact(folder.child(name))
        self._kept = partial(kept, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
        self._losses: dict[int, float | None] = {}
        """Of the checkpoints that this process has seen whole, so that each manifest is read once."""
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._agreement = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def artifact(self, step: int) -> Artifact:
        return self._open(f"step-{step:08d}")

    def latest(self) -> int | None:
        """The last step with a whole, committed checkpoint; None if there is none. Rank 0 looks, all ranks are told.

        Files are looked for, not read: `load` may still find wrong bytes.
        """

        def find() -> int | None:
            steps = sorted(self._steps(), reverse=True)
            found = next((step for step in steps if self._is_whole(step)), None)
            if steps and found is None:
                log.warning("checkpoints of steps %s are stored, none of them whole: nothing to resume from", steps)
            return found

        return self._on_first_rank(find)

    def begin(self, step: int, tensors: dict[str, Tensor], progress: dict[str, Any]) -> Future[Any]:
        """Copies the tensors and writes them in the background; no other save may be under way in this group.

        The future ends when the checkpoint is committed, and raises on every rank if one of them could not write.

        Args:
            tensors: as `training_tensors`; may change as soon as this returns.
            progress: JSON, the same on every rank.
        """
        group = self._require_group()
        rng = {f"rng.{dist.get_rank()}": torch.get_rng_state()}
        writer = _RetainingWriter(self, step, {"step": step} | progress)
        pending = dcp.async_save(
            tensors | rng,
            storage_writer=writer,
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )
        assert isinstance(pending, Future)
        return pending

    def agree(self, value: int) -> int:
        """The greatest of the ranks' values, beside a save that is under way; every rank calls this together."""
        greatest = torch.tensor([value])
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=self._agreement)
        return int(greatest)

    def renew_group(self, *, ended: bool) -> None:
        """A group for the saves to come, after one that hangs or broke off in the old; every rank calls this.

        Args:
            ended: no rank is at work in the old group any more, and it is closed. It holds threads, and a connection to
                every rank, of which a store that fails for days would use up all that a process may have.
        """
        old, self._group = self._require_group(), dist.new_group(backend="gloo")
        if ended:
            dist.destroy_process_group(old)

    def load(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fills `tensors` in place from the checkpoint of `step` and returns its progress.

        A rank's random state is restored if the checkpoint was written by at least as many ranks. Bytes that are wrong
        are read once more: they may have become so on their way, and who is told so discards the checkpoint.

        Raises:
            FileNotFoundError: no such checkpoint is committed.
            CorruptCheckpoint: bytes are wrong, on whichever rank; every rank raises it. What was filled so far stays.
            CheckpointError: a tensor is absent or has another shape; StoreFailed: the store did not hand it out.
        """
        try:
            return self._load(step, tensors)
        except CorruptCheckpoint:
            return self._load(step, tensors)

    def _load(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        group = self._require_group()
        files, index, progress = self._on_first_rank(lambda: self._contents(step))
        rng = {key: torch.get_rng_state() for key in (f"rng.{dist.get_rank()}",) if key in index}
        _load_sharded(files, index, tensors | rng, group, f"the checkpoint of step {step}")
        for state in rng.values():
            torch.set_rng_state(state)
        return progress

    def discard(self, step: int, reason: Exception) -> None:
        """Removes the checkpoint of `step`, and says so in the log; rank 0 does, for all ranks."""

        def remove() -> None:
            artifact = self.artifact(step)
            log.warning("%s: discarding the checkpoint of step %d: %s", artifact, step, reason)
            artifact.delete()

        self._on_first_rank(remove)

    def discard_broken(self, step: int) -> None:
        """Removes what is stored of `step` and is no whole checkpoint, so that it can be written again."""
        self._losses.pop(step, None)
        if step in self._steps() and not self._is_whole(step):
            self.artifact(step).delete()

    def retire(self) -> None:
        """Removes the whole checkpoints that are not kept, and remains of failed saves before the latest whole one."""
        steps = self._steps()
        self._losses = {step: loss for step, loss in self._losses.items() if step in steps}
        self._losses |= {step: progress.get("val_loss") for step, progress in self._whole(steps - self._losses.keys())}
        staying = self._kept(self._losses)
        for step in sorted(steps - staying):
            if staying and step < max(staying):
                self.artifact(step).delete()

    def committed(self) -> dict[int, dict[str, Any]]:
        """The progress of every whole checkpoint by step, in order; for a single process."""
        return dict(self._whole(self._steps()))

    def _on_first_rank(self, action: Callable[[], ResultT]) -> ResultT:
        """Acts on rank 0 alone; every rank returns what it returned, or raises what it raised."""
        if self._group is None:
            return action()
        outcome: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _contents(self, step: int) -> tuple[Files, dict[str, StoredTensor], dict[str, Any]]:
        """The files of a checkpoint, its index and its progress."""
        artifact = self.artifact(step)
        manifest = artifact.manifest()
        if manifest is None:
            raise FileNotFoundError(f"{artifact}: no committed checkpoint of step {step}")
        return artifact.files, read_index(artifact.files, manifest), manifest.metadata

    def _require_group(self) -> dist.ProcessGroup:
        if self._group is None:
            raise RuntimeError("saving and loading need torch.distributed; initialise the process group first")
        return self._group

    def _steps(self) -> set[int]:
        """Steps of which anything is stored, committed or not."""
        matches = (_STEP.fullmatch(path.split("/", 1)[0]) for path in self._folder.sizes())
        return {int(match[1]) for match in matches if match}

    def _whole(self, steps: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Those of the steps that have a whole checkpoint, in order, with its progress."""
        for step in sorted(steps):
            manifest = self._whole_manifest(step)
            if manifest is not None:
                yield step, manifest.metadata

    def _is_whole(self, step: int) -> bool:
        return self._whole_manifest(step) is not None

    def _whole_manifest(self, step: int) -> Manifest | None:
        """The manifest if it is committed, and every file of it is there in its full size."""
        artifact = self.artifact(step)
        manifest = self._manifest(artifact, step)
        if manifest is None:
            return None
        sizes = artifact.files.sizes()
        return manifest if all(sizes.get(file.path) == file.size for file in manifest.files) else None

    def _manifest(self, artifact: Artifact, step: int) -> Manifest | None:
        """The manifest; None when there is none, or its bytes are there and are no manifest."""
        try:
            return artifact.manifest()
        except OSError:
            # The store's failure or the manifest's? A store that hands out the bytes is not at fault.
            with self._folder.child(f"step-{step:08d}").open_input(MANIFEST) as source:
                source.read()
        try:
            return artifact.manifest()  # again: the store may have failed for a moment only
        except OSError as error:
            log.warning("the checkpoint of step %d does not count: %s", step, error)
            return None


class _RetainingWriter(ArtifactWriter):
    """Commits, then lets the checkpointer remove what is too old; on the coordinator."""

    def __init__(self, checkpointer: Checkpointer, step: int, metadata: dict[str, Any]) -> None:
        super().__init__(checkpointer.artifact(step), metadata)
        self._checkpointer = checkpointer
        self._step = step

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        self._checkpointer.discard_broken(self._step)
        return super().prepare_global_plan(plans)

    def finish(self, metadata: dcp.Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        try:
            self._checkpointer.retire()
        except OSError as error:
            # The checkpoint is committed; an old one that stays costs room, not correctness.
            log.warning("old checkpoints could not be removed: %s", error)
