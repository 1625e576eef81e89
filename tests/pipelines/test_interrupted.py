"""Whatever ends a stage that works in parts, at whatever moment: the next try commits what an undisturbed one does.

A `Fault` counts the operations of the stage's artifact on its store and strikes at one of them, so a test goes through
all moments of a stage, on a disk and on a store of objects.
"""

import errno
import io
import os
import random
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from cluster.artifact import Artifact
from cluster.filesystem import TEMPORARY_PREFIX, FileSystem, LocalFiles, ObjectFiles, Sink
from cluster.lease import Claim
from cluster.storage import StorageError, Store
from llama.retry import retried
from pipelines.data_config import DedupConfig, NearDuplicateConfig
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.parts import Written, map_parts
from pipelines.runs import Run
from pipelines.stage import Stage, StageContext
from tests.pipelines.data_stages import data_config, data_graph, in_this_process, write_corpus


class Killed(BaseException):
    """The process is no more: nothing that it would do after this is done."""


@dataclass
class Fault:
    """Calls `strike` before the operation number `at` that writes, reads, lists or deletes below `artifacts`."""

    at: int = -1
    strike: Callable[[], object] = lambda: None
    operations: int = 0
    dead: bool = False

    def kill(self) -> None:
        self.dead = True
        raise Killed

    def operation(self, key: str) -> None:
        if self.dead:
            raise Killed
        if "/artifacts/" in key:
            self.operations += 1
            if self.operations == self.at + 1:
                self.strike()


@dataclass
class FaultySink:
    sink: Sink
    key: str
    fault: Fault

    def write(self, data: memoryview) -> None:
        self.sink.write(data)

    def commit(self) -> None:
        self.fault.operation(self.key)
        self.sink.commit()

    def abort(self) -> None:
        if not self.fault.dead:
            self.sink.abort()


@dataclass
class FaultyFiles:
    files: FileSystem
    fault: Fault = field(default_factory=Fault)

    def is_file(self, key: str) -> bool:
        return self.files.is_file(key)

    def open_input(self, key: str) -> Any:
        self.fault.operation(key)
        return self.files.open_input(key)

    def create(self, key: str, exclusive: bool = False) -> FaultySink:
        self.fault.operation(key)
        return FaultySink(self.files.create(key, exclusive), key, self.fault)

    def stats(self, key: str) -> Any:
        self.fault.operation(key)
        return self.files.stats(key)

    def delete(self, key: str) -> None:
        self.fault.operation(key)
        self.files.delete(key)


class Upload(io.BytesIO):
    """An object on its way: it replaces the one before when it is closed, as a whole."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            whole = self._path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            whole.write_bytes(self.getvalue())
            whole.replace(self._path)
        super().close()


class Bucket:
    """A folder as pyarrow shows an object store: no exclusive writes, and none of a disk's privileges."""

    def __init__(self, folder: Path) -> None:
        files = pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())
        self.open_input_file, self.delete_file, self.delete_dir = (
            files.open_input_file,
            files.delete_file,
            files.delete_dir,
        )
        self._files, self._folder = files, folder

    def open_output_stream(self, key: str, compression: None) -> Upload:
        return Upload(self._folder / key)

    def get_file_info(self, wanted: Any) -> Any:
        found = self._files.get_file_info(wanted)
        return found if isinstance(wanted, str) else [info for info in found if TEMPORARY_PREFIX not in info.path]


@dataclass
class Place:
    """A project's store, which a driver that may fail and one that does not can both use."""

    folder: Path
    objects: bool

    def store(self, fault: Fault | None = None) -> Store:
        files: FileSystem = ObjectFiles(Bucket(self.folder)) if self.objects else LocalFiles()
        store = Store("s3://bucket/store?endpoint_override=localhost:1" if self.objects else self.folder)
        store._filesystem = FaultyFiles(files, fault or Fault())
        return store

    def drive(self, graph: Graph, fault: Fault | None = None) -> None:
        store = self.store(fault)
        drive(graph, store, Run.create(store, "name: test\n"))

    def drive_until_killed(self, graph: Graph, moment: int) -> bool:
        """False if it ends before that."""
        fault = Fault(moment)
        fault.strike = fault.kill
        with suppress(Killed):
            self.drive(graph, fault)
        return fault.dead

    def committed(self, graph: Graph, name: str = "work") -> Artifact:
        return graph.artifact(self.store(), name)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Tasks in this process, and no waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(Claim, "enter", refuse)  # a lease would keep the rivals apart
    with in_this_process():
        yield


def refuse(*_: object) -> None:
    raise StorageError("no leases here")


@pytest.fixture(params=["disk", "objects"])
def new_place(request, tmp_path, monkeypatch) -> Callable[[], Place]:
    monkeypatch.setattr("pipelines.stage.retried", partial(retried, sleep=lambda seconds: None))

    def make() -> Place:
        made.append(Place(tmp_path / str(len(made)), request.param == "objects"))
        made[-1].folder.mkdir()
        return made[-1]

    made: list[Place] = []
    return make


def write_two(task: int, output: Store) -> Written:
    entries = [output.write_bytes(f"of-it/{task}-{file}", f"{task}.{file} ".encode() * 50) for file in range(2)]
    return Written(tuple(entries), {"task": task, "paths": [entry.path for entry in entries]})


def write_scratch(task: int, output: Store) -> Written:
    return Written((output.write_bytes(f"scratch/{task}", str(task).encode()),), task)


def work(context: StageContext) -> dict[str, Any]:
    """All that stages do with parts: scratch that is read back, files, some of them not wanted in the end, one more."""
    output = context.attempt.store
    map_parts(context, write_scratch, {f"scratch/{number}": number for number in range(2)}, record=False)
    numbers = [int(output.read_bytes(f"scratch/{number}")) for number in range(2)]
    results = map_parts(context, write_two, {f"part/{number}": number for number in (*numbers, 2)})
    results |= map_parts(context, write_two, {"part/3-limited": 3})
    context.forget(set(results.pop("part/2")["paths"]))
    output.delete("scratch")
    context.record(output.write_bytes("summary", b"in the end"))
    return {"results": results}


GRAPH = Graph([Stage("work", 1, {}, work)])


def content(artifact: Artifact) -> tuple[Any, ...]:
    manifest = artifact.verify()
    return manifest.files, manifest.metadata


@pytest.fixture
def expected(new_place) -> tuple[Any, ...]:
    place = new_place()
    place.drive(GRAPH)
    return content(place.committed(GRAPH))


def moments(new_place: Callable[[], Place]) -> range:
    """The operations of an undisturbed stage."""
    fault = Fault()
    new_place().drive(GRAPH, fault)
    assert 40 < fault.operations < 120
    return range(fault.operations)


def tries(artifact: Artifact) -> set[str]:
    return {path.split("/")[1] for path in artifact.store.list("attempts")}


def test_killed_at_any_moment(new_place, expected):
    for moment in moments(new_place):
        place = new_place()
        place.drive_until_killed(GRAPH, moment)
        committed = place.committed(GRAPH).committed
        place.drive(GRAPH)
        artifact = place.committed(GRAPH)
        assert content(artifact) == expected, moment
        if not place.objects and not committed:
            assert tries(artifact) == {artifact.manifest().attempt}
            assert not artifact.store.list("parts")


def test_a_full_disk_at_any_moment(new_place, expected):
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    failed = 0
    for moment in moments(new_place):
        place = new_place()
        try:
            place.drive(GRAPH, Fault(moment, fail))
        except StorageError as error:
            assert "the disk is full" in str(error)
            failed += 1
        place.drive(GRAPH)
        assert content(place.committed(GRAPH)) == expected, moment
    assert failed > 30


def test_a_rival_does_all_of_it_at_any_moment(new_place, expected):
    """As if the first had been frozen: it ends well, whatever is left of what it wrote."""
    for moment in moments(new_place):
        place = new_place()
        place.drive(GRAPH, Fault(moment, partial(place.drive, GRAPH)))
        artifact = place.committed(GRAPH)
        assert content(artifact) == expected, moment
        if not place.objects:
            assert tries(artifact) == {artifact.manifest().attempt}


def test_a_rival_is_killed_while_the_first_goes_on(new_place, expected):
    """The first takes over what the rival, which took over from the first, had finished."""
    draw = random.Random(0)
    every = moments(new_place)
    for _ in range(40):
        place = new_place()
        place.drive(GRAPH, Fault(draw.choice(every), partial(place.drive_until_killed, GRAPH, draw.choice(every))))
        assert content(place.committed(GRAPH)) == expected


def test_rivals_at_once(new_place, expected):
    for _ in range(10):
        place = new_place()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(place.drive, [GRAPH] * 3))
        assert content(place.committed(GRAPH)) == expected


DAMAGES: tuple[Callable[[bytes], bytes], ...] = (
    lambda data: data[:-1],
    lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:] if len(data) > 30 else b"?",
    lambda data: b"",
)


def test_damage_to_any_file_of_a_killed_try_is_not_taken_over(tmp_path, expected):
    """Killed at the last moment at which nothing is committed; a file is cut, has a wrong bit, or is empty."""
    killed = Place(tmp_path / "killed", objects=False)
    for moment in reversed(moments(lambda: Place(tmp_path / "whole", objects=False))):
        shutil.rmtree(killed.folder, ignore_errors=True)
        killed.drive_until_killed(GRAPH, moment)
        if not killed.committed(GRAPH).committed:
            break
    paths = killed.committed(GRAPH).store.list()
    assert len([path for path in paths if path.startswith("parts/")]) == 6
    for index, path in enumerate(paths):
        for number, damage in enumerate(DAMAGES):
            place = Place(tmp_path / f"{index}-{number}", objects=False)
            shutil.copytree(killed.folder, place.folder)
            store = place.committed(GRAPH).store
            store.write_bytes(path, damage(store.read_bytes(path)))
            place.drive(GRAPH)
            assert content(place.committed(GRAPH)) == expected, path


def test_the_data_stages_killed_again_and_again(tmp_path):
    write_corpus(tmp_path / "corpus", documents=60)
    near = DedupConfig(near=NearDuplicateConfig())
    graph = data_graph(data_config(tmp_path / "corpus", max_bytes=150_000, dedup=near))
    undisturbed, place = Place(tmp_path / "whole", objects=False), Place(tmp_path / "killed", objects=False)
    counter = Fault()
    undisturbed.drive(graph, counter)
    draw = random.Random(0)
    kills = sum(place.drive_until_killed(graph, draw.randrange(counter.operations // 4)) for _ in range(8))
    assert kills >= 4
    place.drive(graph)
    for stage in ("ingest", "dedup", "tokenizer", "shards"):
        assert content(place.committed(graph, stage)) == content(undisturbed.committed(graph, stage))
