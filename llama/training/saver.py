"""When checkpoints are written, and what happens when one cannot be: training goes on, and the next one is tried.

Saves run in the background, each in step on all ranks. Whether one has ended is therefore a question for all of them:
they answer it together, in a group that no save uses, and whatever follows is the same everywhere.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, wait
from enum import IntEnum
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from llama.retry import PAUSES
from llama.training.checkpoint import Checkpointer, CheckpointError
from llama.training.watchdog import Watchdog

PATIENCE_SECONDS = 30.0
"""How long a checkpoint that is due waits for the one before it, the training with it, before it is left out."""
LIMIT_SECONDS = 600.0
"""After which a save that has not ended is given up. The store's own time-outs (cluster/location.py) come first."""
HURRIED_PAUSES = PAUSES[:3]
"""Between the tries of a checkpoint for which little time is left."""

log = logging.getLogger(__name__)


class _Fate(IntEnum):
    """Of a save, over all ranks the greatest."""

    COMMITTED = 0
    FAILED = 1
    PENDING = 2
    HUNG = 3


class Saver:
    """Saves through a checkpointer, one checkpoint at a time; every rank makes one, and calls it together.

    A save that was given up keeps a copy of its tensors until it ends; if it does end, its checkpoint counts.

    Args:
        watchdog: is told that a wait is one on purpose.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        watchdog: Watchdog,
        *,
        patience: float = PATIENCE_SECONDS,
        limit: float = LIMIT_SECONDS,
    ) -> None:
        self.failed = 0
        """Checkpoints that were due and not committed, as far as that is known."""
        self._checkpointer = checkpointer
        self._watchdog = watchdog
        self._patience = patience
        self._limit = limit
        self._pending: Future[Any] | None = None
        self._step = 0
        self._began = 0.0
        self._error = ""

    def save(self, step: int, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Begins a checkpoint; leaves it out if the one before is still being written after the patience is over."""
        if self._settle(self._patience) is _Fate.PENDING:
            self.failed += 1
            self._say(f"the checkpoint of step {step} is left out: that of step {self._step} is still being written")
            return
        self._begin(step, tensors, progress)

    def save_now(
        self, step: int, tensors: dict[str, Tensor], progress: dict[str, Any], pauses: tuple[float, ...] = ()
    ) -> bool:
        """Commits a checkpoint, tried again after each of the pauses; returns whether it did."""
        self._settle(self._limit)
        before = self.failed
        for pause in (*pauses, None):
            self._begin(step, tensors, progress)
            if self._settle(self._limit) is _Fate.COMMITTED:
                self.failed = before
                return True
            if pause is not None:
                self._watchdog.sleep(pause)
        self.failed = before + 1
        return False

    def save_or_fail(self, step: int, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """`save_now`, with two minutes of pauses between the tries. Raises CheckpointError if none succeeds."""
        if not self.save_now(step, tensors, progress, PAUSES):
            raise CheckpointError(f"the last checkpoint, of step {step}, could not be written: {self._error}")

    def _begin(self, step: int, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        self._step, self._began = step, time.monotonic()
        self._pending = self._checkpointer.begin(step, tensors, progress)

    def _settle(self, seconds: float) -> _Fate:
        """What became of the save under way, waited for so long; only of one that is PENDING more will be heard."""
        if self._pending is None:
            return _Fate.COMMITTED
        fate = _Fate(self._checkpointer.agree(self._await(self._pending, seconds)))
        if fate is _Fate.PENDING:
            return fate
        self._pending = None
        if fate is not _Fate.COMMITTED:
            self.failed += 1
            reason = f"given up after {self._limit:g} s" if fate is _Fate.HUNG else self._error
            self._error = reason or "it failed on another rank"
            self._say(f"the checkpoint of step {self._step} was not written: {self._error}")
            self._checkpointer.renew_group(ended=fate is _Fate.FAILED)
        return fate

    def _await(self, pending: Future[Any], seconds: float) -> _Fate:
        """As this rank sees it."""
        deadline = min(time.monotonic() + seconds, self._began + self._limit)
        while not pending.done() and (left := deadline - time.monotonic()) > 0:
            wait([pending], min(left, 1.0))
            self._watchdog.beat()
        if not pending.done():
            return _Fate.HUNG if time.monotonic() >= self._began + self._limit else _Fate.PENDING
        error = pending.exception()
        self._error = "" if error is None else _reason(error)
        return _Fate.COMMITTED if error is None else _Fate.FAILED

    def _say(self, message: str) -> None:
        if dist.get_rank() == 0:
            log.warning("%s", message)


def _reason(error: BaseException) -> str:
    """Of a save that failed on several ranks, what the first of them says: the others often only echo it."""
    failures = getattr(error, "failures", None)
    if not isinstance(error, CheckpointException) or not failures:
        return str(error)
    rank, (cause, _) = min(failures.items())
    return f"rank {rank}: {cause}"
