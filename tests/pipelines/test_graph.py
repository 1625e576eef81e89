import random
import time
from dataclasses import dataclass, replace
from enum import Enum

import pytest
from pydantic import BaseModel

from cluster.artifact import Artifact, CorruptArtifact
from cluster.lease import Claim
from cluster.storage import StorageError, Store
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.runs import Run
from pipelines.stage import Event, GraphError, Stage
from pipelines.stage_key import canonical


class Work:
    """Stages that write one file each, and a record of which ran."""

    def __init__(self, store):
        self.store = store
        self.ran = []

    def stage(self, name, upstream=(), config=0, **options):
        def run(context):
            self.ran.append(name)
            inputs = {up: artifact.files.read_bytes("out").decode() for up, artifact in context.inputs.items()}
            context.attempt.store.write_bytes("out", f"{name}({config})".encode())
            return {"inputs": inputs, "config": config}

        return Stage(name, 1, {"value": config}, run, tuple(upstream), **options)

    def run(self, stages, **options):
        """Names of the stages that ran, in order."""
        self.ran = []
        self.results = drive(Graph(stages), self.store, Run.create(self.store, "name: x\n"), **options)
        return self.ran


@pytest.fixture
def work(tmp_path):
    return Work(Store(tmp_path / "store"))


def descendants(edges, name):
    found = {name}
    for child, upstream in edges.items():  # in topological order
        if found & set(upstream):
            found.add(child)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_reruns_exactly_what_a_change_touches(work, seed):
    generator = random.Random(seed)
    names = [f"s{number}" for number in range(generator.randint(2, 7))]
    edges = {n: generator.sample(names[:i], generator.randint(0, min(i, 3))) for i, n in enumerate(names)}
    configs = dict.fromkeys(names, 0)

    def stages(values):
        made = [work.stage(name, edges[name], values[name]) for name in names]
        generator.shuffle(made)
        return made

    assert sorted(work.run(stages(configs))) == names
    assert all(work.ran.index(up) < work.ran.index(name) for name in names for up in edges[name])
    assert work.run(stages(configs)) == []
    assert {result.state for result in work.results.values()} == {"skipped"}

    changed = generator.choice(names)
    new = configs | {changed: 1}
    assert set(work.run(stages(new))) == descendants(edges, changed)
    for name in names:
        assert work.results[name].metadata["inputs"] == {up: f"{up}({new[up]})" for up in edges[name]}
    assert work.run(stages(new)) == []
    assert work.run(stages(configs)) == []  # the first artifacts are still there


def test_version_and_name_are_part_of_the_key(work):
    stage = work.stage("a")
    keys = {Graph([s]).keys[s.name] for s in (stage, replace(stage, version=2), replace(stage, name="b"))}
    assert len(keys) == 3


def test_a_failure_is_recorded_and_the_next_run_goes_on_from_there(work):
    def broken(context):
        context.attempt.store.write_bytes("half", b"written")
        raise OSError("the disk caught fire\nin the server room")

    stages = [work.stage("a"), Stage("b", 1, {"value": 0}, broken, ("a",)), work.stage("c", ["b"])]
    run = Run.create(work.store, "name: x\n")
    events: list[Event] = []
    with pytest.raises(OSError, match="disk"):
        drive(Graph(stages), work.store, run, on_event=events.append)

    status = Run.open(work.store, run.id).status
    assert status.state == "failed" and status.error == "the disk caught fire"
    assert {name: stage.state for name, stage in status.stages.items()} == {"a": "done", "b": "failed", "c": "pending"}
    assert status.stages["b"].error == "the disk caught fire"
    traceback = run.directory.read_bytes("errors/b.txt").decode()
    assert "in broken" in traceback and "in the server room" in traceback
    assert [(event.stage, event.kind) for event in events] == [
        ("a", "running"),
        ("a", "done"),
        ("b", "running"),
        ("b", "failed"),
    ]
    assert work.store.list("artifacts/b") == []

    repaired = [work.stage("a"), work.stage("b", ["a"]), work.stage("c", ["b"])]
    assert Graph(repaired).keys == Graph(stages).keys
    work.ran = []
    drive(Graph(repaired), work.store, Run.open(work.store, run.id))
    assert work.ran == ["b", "c"]
    assert Run.open(work.store, run.id).status.state == "done"


def test_a_rival_that_commits_first_wins(work, monkeypatch):
    def no_leases(store, holder):
        raise StorageError("none here")

    monkeypatch.setattr(Claim, "enter", no_leases)  # it would wait for the other

    def slow(context):
        context.attempt.store.write_bytes("out", b"slow")
        work.run([work.stage("a"), work.stage("b", ["a"])])  # a whole other run of the same graph
        return {"inputs": {}, "config": "slow"}

    stage = work.stage("a")
    results = drive(Graph([replace(stage, run=slow), work.stage("b", ["a"])]), work.store, Run.create(work.store, ""))
    assert results["a"].metadata["config"] == 0
    assert results["a"].artifact.files.read_bytes("out") == b"a(0)"
    assert results["b"].state == "skipped"
    results["a"].artifact.verify()


def test_status_can_be_read_while_a_stage_runs(work):
    run = Run.create(work.store, "name: x\n")
    seen = []

    def look(context):
        context.emit("half way", fraction=0.5, values={"loss": 1.5})
        while (status := Run.open(work.store, run.id).status).stages["look"].state == "pending":
            time.sleep(0.01)
        seen.append(status)
        context.attempt.store.write_bytes("out", b"seen")
        return {}

    events: list[Event] = []
    stages = [work.stage("a"), Stage("look", 1, {}, look, ("a",)), work.stage("z", ["look"])]
    drive(Graph(stages), work.store, run, on_event=events.append)
    (status,) = seen
    assert status.state == "running" and not status.is_lost()
    assert [stage.state for stage in status.stages.values()] == ["done", "running", "pending"]
    assert status.stages["look"].key == Graph(stages).keys["look"]
    progress = [event for event in events if event.kind == "progress"]
    assert progress == [Event("look", "progress", "half way", 0.5, {"loss": 1.5})]
    after = Run.open(work.store, run.id).status.stages["look"]
    assert after.progress == "half way" and after.ended >= after.started


def test_always_stages_run_every_time_and_leave_no_artifact(work):
    deployed = []

    def deploy(context):
        with pytest.raises(GraphError, match="no artifact"):
            context.attempt  # noqa: B018
        deployed.append(context.inputs["a"].files.read_bytes("out"))
        return {"url": "here"}

    stages = [work.stage("a"), Stage("deploy", 1, {}, deploy, ("a",), always=True)]
    for _ in range(2):
        work.run(stages)
    assert deployed == [b"a(0)", b"a(0)"]
    assert work.results["deploy"].metadata == {"url": "here"} and work.results["deploy"].artifact is None
    assert not any(path.startswith("artifacts/deploy") for path in work.store.list())


def test_until_runs_a_stage_and_what_it_needs(work):
    stages = [work.stage("a"), work.stage("b", ["a"]), work.stage("side"), work.stage("c", ["b", "side"])]
    assert work.run(stages, until="b") == ["a", "b"]
    with pytest.raises(GraphError, match="there is no stage 'd'; choose one of a, b, side, c"):
        work.run(stages, until="d")


def test_recorded_entries_are_what_the_artifact_consists_of(work):
    def run(context):
        context.attempt.store.write_bytes("scratch", b"not part of it")
        context.record(context.attempt.store.write_bytes("out", b"part of it"))
        return {}

    artifact = drive(Graph([Stage("a", 1, {}, run)]), work.store, Run.create(work.store, ""))["a"].artifact
    assert [file.path for file in artifact.manifest().files] == ["out"]


def test_an_unreadable_manifest_stops_the_run(work):
    stages = [work.stage("a")]
    work.run(stages)
    work.results["a"].artifact.store.write_bytes("manifest.json", b'{"half')
    with pytest.raises(CorruptArtifact, match="delete the artifact"):
        work.run(stages)
    assert work.ran == []
    Artifact(work.results["a"].artifact.store).delete()
    assert work.run(stages) == ["a"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"a": ["b"], "b": ["a"]}, "the stages a, b wait for each other"),
        ({"a": ["x"]}, "stage 'a' needs 'x', which is not in the graph"),
    ],
)
def test_bad_graphs(work, shape, message):
    with pytest.raises(GraphError, match=message):
        Graph([work.stage(name, upstream) for name, upstream in shape.items()])


def test_more_bad_graphs(work):
    with pytest.raises(GraphError, match="two stages are named 'a'"):
        Graph([work.stage("a"), work.stage("a")])
    with pytest.raises(GraphError, match="needs 'd', which always runs"):
        Graph([work.stage("d", always=True), work.stage("a", ["d"])])


class Color(Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    rate: float
    color: Color = Color.RED


class Outer(BaseModel):
    inner: Inner
    names: tuple[str, ...]


def test_canonical_form_of_a_configuration():
    plain = {"inner": {"rate": 0.5, "color": "red"}, "names": ["a", "b"]}
    assert canonical(Outer(inner=Inner(0.5), names=("a", "b"))) == plain
    with pytest.raises(GraphError, match=r"config\.inner\.rate=nan is not a finite number"):
        canonical({"inner": Inner(float("nan"))})
    with pytest.raises(GraphError, match=r"config\.x\[1\] is a set"):
        canonical({"x": [1, {2}]})
    with pytest.raises(GraphError, match="only strings"):
        canonical({1: 2})


def test_a_watcher_that_fails_does_not_take_the_run_with_it(work):
    def watch(event):
        raise RuntimeError("the screen broke")

    run = Run.create(work.store, "name: x\n")
    drive(Graph([work.stage("a")]), work.store, run, on_event=watch)
    assert Run.open(work.store, run.id).status.state == "done"


def test_stages_of_one_kind_differ_by_what_follows_the_at_sign(work):
    """They make artifacts of their kind, under the keys that a graph without the others gives them, and see what they
    follow by its kind."""
    one, two = work.stage("b@one", ["a"]), replace(work.stage("b@two", ["a"]), config={"value": 9})
    end = work.stage("c@two", ["b@two"])
    graph = Graph([work.stage("a"), one, two, end])
    plain = Graph([work.stage("a"), replace(two, name="b"), replace(end, name="c", upstream=("b",))])
    assert graph.keys["c@two"] == plain.keys["c"] and graph.keys["b@one"] != graph.keys["b@two"]
    assert graph.artifact(work.store, "b@two").store.uri == plain.artifact(work.store, "b").store.uri
    work.run([work.stage("a"), one, two, end])
    assert list(work.results["c@two"].metadata["inputs"]) == ["b"]
    assert work.run([work.stage("a"), replace(one, name="b"), work.stage("c", ["b"])]) == ["c"]
    with pytest.raises(GraphError, match="follows two stages of one kind"):
        Graph([work.stage("a"), one, two, work.stage("d", ["b@one", "b@two"])])
