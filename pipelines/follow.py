"""Watching a training through the store: its news and its progress for whoever runs it, and TensorBoard's file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.storage import Store
from llama.retry import retried
from pipelines.event_file import EventFile
from pipelines.metrics import MetricsReader
from pipelines.stage import StageContext

TENSORBOARD = "tensorboard"
"""Folder in the run's."""

_POLL_SECONDS = 1.0

_log = logging.getLogger(__name__)


@contextmanager
def followed(context: StageContext, metrics: Store, incarnations: Store) -> Iterator[None]:
    """Reports the training's progress, as these folders tell it, while the block runs."""
    reader = MetricsReader(metrics)
    retried(reader.skip_existing, "reading the training's progress")
    seen = set(retried(incarnations.list, "reading the training's progress"))
    validation: dict[str, Any] = next((row for row in reversed(reader.steps()) if row["val_loss"] is not None), {})
    stop = threading.Event()

    def report(events: EventFile) -> None:
        nonlocal validation
        for path in incarnations.list():
            if path not in seen:
                seen.add(path)
                context.emit(_start(incarnations.read_json(path)))
        new = reader.poll()
        for row in new:
            if row["val_loss"] is not None:
                validation = row
            context.emit(progress(row, validation), fraction=row["step"] / row["steps"], values=_values(row))
        events.follow(reader, new)

    def try_to(action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:  # the store, or this machine's disk: it is only the view that suffers
            _log.warning("the training's progress could not be read or shown: %s", error)

    def follow() -> None:
        while not stop.wait(_POLL_SECONDS):
            try_to(report, events)

    _, _, label = context.stage.partition("@")  # of several trainings in a run each is a run of TensorBoard's
    with EventFile(context.run_dir.child(TENSORBOARD, *filter(None, [label]))) as events:
        thread = threading.Thread(target=follow, name="training-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            try_to(report, events)
            try_to(events.put)


def _start(incarnation: Mapping[str, Any]) -> str:
    step, world_size = incarnation["resumed_step"], incarnation["world_size"]
    start = f"resumed from the checkpoint of step {step}" if step else "started"
    return f"{start} on {world_size} worker{'s' if world_size > 1 else ''}"


def progress(row: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """A report in one line, with the last one that was validated, if there is one."""
    parts = [f"step {row['step']}/{row['steps']}", f"loss {_loss(row['loss'])}"]
    if validation:
        parts.append(f"validation {_loss(validation['val_loss'])} at {validation['step']}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    for name, what in (("skipped_steps", "steps skipped"), ("failed_checkpoints", "checkpoints not written")):
        if row[name]:
            parts.append(f"{what}: {row[name]}")
    left = (row["steps"] - row["step"]) * (row["tokens"] / row["step"]) / max(row["tokens_per_second"], 1e-9)
    parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 04 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    names = ("step", "loss", "val_loss", "tokens_per_second", "mfu", "learning_rate")
    return {name: row[name] for name in names if row[name] is not None}
