"""TensorBoard's event file of a run.

An object store cannot append, so the file grows on this machine's disk and is put whole at intervals. It is a function
of the metrics: a driver that takes a run over, or a training that went back to a checkpoint, begins a new file with the
whole curve, and the older one goes. So the folder always holds one file, without a step that was rolled back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.storage import Store
from pipelines.metrics import MetricsReader

if TYPE_CHECKING:
    from tensorboardX.record_writer import RecordWriter

PUT_SECONDS = 30.0

_TAGS = {
    "loss": "loss/training",
    "val_loss": "loss/validation",
    "balance_loss": "loss/balance",
    "z_loss": "loss/router_z",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/gradient_norm",
    "skipped_steps": "optimizer/skipped_steps",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "checkpoint_seconds": "checkpoints/stall_seconds",
    "failed_checkpoints": "checkpoints/not_written",
    "memory_bytes": "memory/peak_bytes",
    "tokens": "data/tokens",
    "epoch": "data/epoch",
}


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a report TensorBoard plots, by tag; of a layer's load the busiest expert's, 1 being balanced."""
    found = {tag: row[name] for name, tag in _TAGS.items() if row.get(name) is not None}
    for layer, load in (row.get("expert_load") or {}).items():
        found[f"expert_load/layer_{layer:02d}_largest"] = max(load) * len(load)
    for layer, entropy in (row.get("router_entropy") or {}).items():
        if entropy is not None:
            found[f"router_entropy/layer_{layer:02d}"] = entropy
    return found


class EventFile:
    """Of one run; a context manager, which keeps the growing file and removes it.

    Args:
        store: the folder that TensorBoard is pointed at.
        clock: seconds, for the tests.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._records: RecordWriter | None = None
        self._begun = 0
        self._last_step = 0
        self._last_put = float("-inf")
        self._put_took = 0.0

    def __enter__(self) -> EventFile:
        self._folder = tempfile.TemporaryDirectory(prefix="tensorboard-")
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()
        self._folder.cleanup()

    def follow(self, reader: MetricsReader, new: Sequence[Mapping[str, Any]]) -> None:
        """Adds what `reader.poll` has just returned, and puts the file if the interval has passed.

        Raises StorageError; the file is then put with the next reports."""
        if new:
            steps = [self._last_step, *(row["step"] for row in new)]
            if self._records is None or any(after <= before for before, after in pairwise(steps)):
                new = reader.steps()
                self._begin()
            for row in new:
                self._add(row)
        # A file that has grown large is put less often.
        if self._clock() - self._last_put >= max(PUT_SECONDS, 20 * self._put_took):
            self.put()

    def put(self) -> None:
        """Raises StorageError."""
        if self._records is None:
            return
        self._records.flush()
        began = self._clock()
        self._store.upload(self._path, self._path.name)
        for path in self._store.list():
            if path != self._path.name:
                self._store.delete(path)
        self._last_put = self._clock()
        self._put_took = self._last_put - began

    def _begin(self) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter

        self._close()
        # TensorBoard takes the files of a folder by their names.
        self._path = Path(self._folder.name) / f"events.out.tfevents.{time.time():.0f}.{self._begun}"
        self._begun += 1
        self._records = RecordWriter(str(self._path))
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._last_put = float("-inf")

    def _add(self, row: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        assert self._records is not None
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
        event = Event(wall_time=row["time"], step=row["step"], summary=Summary(value=values))
        self._records.write(event.SerializeToString())
        self._last_step = row["step"]

    def _close(self) -> None:
        records, self._records = self._records, None
        if records is not None:
            with suppress(OSError):  # a full disk; the file goes
                records.close()
            self._path.unlink(missing_ok=True)
