"""A stage's work in parts: independent, in parallel on the cluster, and each done once.

A part writes files below the stage's attempt and comes to a small JSON value. When both are durable the part is
recorded beside the artifact (cluster/parts.py). A stage that is killed and started again finds the records, copies
those parts' files into its own attempt, each byte against its checksum, and works on what is missing. Two tries at
once may do the same part; each has its own files, so neither can spoil the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.artifact import Attempt
from cluster.parts import adopt_part, finished_parts, keep_part
from cluster.storage import JSON, FileEntry, Store
from pipelines.ray_map import map_on_cluster
from pipelines.stage import StageContext

Task = TypeVar("Task")


@dataclass(frozen=True)
class Written:
    """What a part wrote, as `open_output` returned it, and what it comes to."""

    entries: tuple[FileEntry, ...]
    result: JSON


@dataclass(frozen=True)
class _Part(Generic[Task]):
    name: str
    task: Task
    attempt: Attempt
    finished: bool


class _Work(Generic[Task]):
    """Does one part on a worker, or takes over what another try has done."""

    def __init__(self, function: Callable[[Task, Store], Written]) -> None:
        self._function = function

    def __call__(self, part: _Part[Task]) -> Written:
        if part.finished and (adopted := adopt_part(part.attempt, part.name)):
            return Written(*adopted)
        written = self._function(part.task, part.attempt.store)
        keep_part(part.attempt, part.name, written.entries, written.result)
        return written


def map_parts(
    context: StageContext,
    function: Callable[[Task, Store], Written],
    tasks: Mapping[str, Task],
    on_result: Callable[[int], None] = lambda finished: None,
    record: bool = True,
) -> dict[str, Any]:
    """`function(task, where to write)` for every task on the cluster; its results by the parts' names, in order.

    Args:
        function: picklable; a pure function of the task and of what it reads. It may be called twice for a task.
        tasks: by name, such as "train/00003": the name must say everything in which tasks of one stage key differ.
        on_result: called with the number of parts done.
        record: whether the files are part of the stage's output. Scratch files are not, and the stage deletes them at
            its end; until then the next try goes on from them all the same.

    Errors as for `map_on_cluster`.
    """
    finished = finished_parts(context.attempt.artifact)
    parts = [_Part(name, task, context.attempt, name in finished) for name, task in tasks.items()]
    if adopted := len(finished & set(tasks)):
        context.emit(f"an earlier try finished {adopted} of {len(parts)} parts; going on from there")
    written = map_on_cluster(_Work(function), parts, on_result)
    results: dict[str, Any] = {}
    for part, each in zip(parts, written, strict=True):
        if record:
            context.record(*each.entries)
        results[part.name] = each.result
    return results
