"""Work in parts goes on from what an earlier try finished."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.artifact import Artifact
from cluster.parts import finished_parts
from cluster.storage import Store
from pipelines.drive import drive as drive_run
from pipelines.graph import Graph
from pipelines.parts import Written, map_parts
from pipelines.runs import Run
from pipelines.stage import Event, Stage, StageContext
from tests.pipelines.data_stages import in_this_process


@dataclass
class Work:
    """A stage over five parts that writes each one's number, and fails once before a given one."""

    fail_at: int | None = None
    done: list[str] = field(default_factory=list)

    def part(self, task: int, output: Store) -> Written:
        if task == self.fail_at:
            raise RuntimeError("the power went")
        self.done.append(str(task))
        return Written((output.write_bytes(f"parts-of-it/{task}", f"content {task}".encode()),), {"number": task})

    def stage(self) -> Stage:
        def run(context: StageContext) -> dict[str, Any]:
            results = map_parts(context, self.part, {f"p/{number}": number for number in range(5)})
            return {"numbers": [result["number"] for result in results.values()]}

        return Stage("work", 1, {}, run)


def drive(work: Work, store: Store, events: list[Event] | None = None) -> Artifact:
    graph = Graph([work.stage()])
    with in_this_process():
        drive_run(graph, store, Run.create(store, "name: test\n"), on_event=(events or []).append)
    return graph.artifact(store, "work")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def contents(artifact: Artifact) -> dict[str, bytes]:
    return {file.path: artifact.files.read_bytes(file.path) for file in artifact.verify().files}


def test_a_stage_that_failed_goes_on_from_its_finished_parts(store):
    work = Work(fail_at=3)
    with pytest.raises(RuntimeError, match="the power went"):
        drive(work, store)
    assert work.done == ["0", "1", "2"]
    events: list[Event] = [Event("", "progress")]
    artifact = drive(again := Work(), store, events)
    assert again.done == ["3", "4"]
    assert any("finished 3 of 5 parts" in event.message for event in events)
    assert contents(artifact) == contents(drive(Work(), Store(store.local_path("other") or "")))
    assert artifact.manifest().metadata == {"numbers": [0, 1, 2, 3, 4]}
    assert not finished_parts(artifact) and len({path.split("/")[1] for path in artifact.store.list("attempts")}) == 1


def test_a_part_with_a_wrong_byte_is_done_anew(store):
    with pytest.raises(RuntimeError):
        drive(Work(fail_at=3), store)
    artifact = Graph([Work().stage()]).artifact(store, "work")
    (path,) = [path for path in artifact.store.list("attempts") if path.endswith("/1")]
    artifact.store.write_bytes(path, b"kontent 1")
    drive(again := Work(), store)
    assert again.done == ["1", "3", "4"]
    assert contents(artifact)["parts-of-it/1"] == b"content 1"


def test_a_stage_that_fails_before_any_part_leaves_no_files(store):
    with pytest.raises(RuntimeError):
        drive(Work(fail_at=0), store)
    assert Graph([Work().stage()]).artifact(store, "work").store.list() == []
