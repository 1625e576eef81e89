"""Driving a run in this process: what is tried at once, again, anew, or not at all."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.storage import StorageError, Store
from pipelines.drive import drive
from pipelines.execution import WorkerLost
from pipelines.garbage import collect
from pipelines.generations import make_anew, read_generations
from pipelines.graph import Graph
from pipelines.retention import Policy
from pipelines.runs import Run, StageStatus
from pipelines.stage import Event, GraphError, Stage, Tries


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def new_run(store):
    return Run.create(store, "name: x\n")


def writes(text, upstream=()):
    def run(context):
        context.attempt.store.write_bytes("out", text().encode())
        return {}

    return run


def test_branches_are_tried_at_the_same_time(store):
    meet = threading.Barrier(2, timeout=20)

    def together(context):
        meet.wait()  # breaks if the other does not come
        context.attempt.store.write_bytes("out", b"met")
        return {}

    stages = [
        Stage("a", 1, {}, writes(lambda: "a")),
        Stage("left", 1, {}, together, ("a",)),
        Stage("right", 1, {}, together, ("a",)),
        Stage("end", 1, {}, writes(lambda: "end"), ("left", "right")),
    ]
    results = drive(Graph(stages), store, new_run(store))
    assert [result.state for result in results.values()] == ["done"] * 4


def test_a_try_that_fails_is_repeated_and_the_status_says_so(store):
    tried, seen = [], []
    run = new_run(store)

    def flaky(context):
        tried.append(context.attempt.name)
        if len(tried) < 3:
            raise OSError(f"not yet {len(tried)}")
        context.attempt.store.write_bytes("out", b"at last")
        return {}

    def watch(event: Event) -> None:
        seen.append((event.kind, event.message))

    graph = Graph([Stage("a", 1, {}, flaky, tries=Tries(retries=2, wait=0.01))])
    assert drive(graph, store, run, on_event=watch)["a"].artifact.files.read_bytes("out") == b"at last"
    assert len(set(tried)) == 3, "each in a folder of its own"
    assert seen == [
        ("running", ""),
        ("progress", "not yet 1; another try in 0 s"),
        ("running", ""),
        ("progress", "not yet 2; another try in 0 s"),
        ("running", ""),
        ("done", ""),
    ]
    assert Run.open(store, run.id).status.stages["a"].error == ""


class LosesFirst:
    """An executor whose workers are lost at first."""

    end_seconds = 1.0

    def __init__(self, losses):
        self.losses = losses

    def capacity(self):
        return None

    def check(self, work):
        pass

    def execute(self, work, on_event, end):
        if self.losses:
            self.losses -= 1
            raise WorkerLost("the node went away")
        return work.perform(on_event)


def test_a_lost_worker_is_replaced_though_no_retries_are_asked_for(store):
    graph = Graph([Stage("a", 1, {}, writes(lambda: "a"), tries=Tries(wait=0.01))])
    assert drive(graph, store, new_run(store), executor=LosesFirst(2))["a"].state == "done"
    graph = Graph([Stage("a", 2, {}, writes(lambda: "a"), tries=Tries(wait=0.01))])
    with pytest.raises(WorkerLost, match="the node went away"):
        drive(graph, store, new_run(store), executor=LosesFirst(99))


class Endless:
    """An executor whose tries go on until they are told to end."""

    end_seconds = 5.0
    ended = 0

    def capacity(self):
        return None

    def check(self, work):
        pass

    def execute(self, work, on_event, end):
        on_event(Event(work.stage.name, "running"))
        assert end.wait(20)
        self.ended += 1
        raise RuntimeError("as told")


def test_a_try_that_takes_too_long_is_ended_and_repeated(store):
    executor, run = Endless(), new_run(store)
    graph = Graph([Stage("slow", 1, {}, writes(lambda: ""), tries=Tries(retries=1, wait=0.01, timeout=0.05))])
    with pytest.raises(RuntimeError, match=r"stage 'slow' was ended after 0.05 s; raise stages.slow.timeout"):
        drive(graph, store, run, executor=executor)
    assert executor.ended == 2
    assert Run.open(store, run.id).status.stages["slow"].error.startswith("stage 'slow' was ended")


def test_an_interrupted_driver_ends_its_tries(store):
    executor, run = Endless(), new_run(store)

    def interrupt(event: Event) -> None:
        if event.kind == "running":
            raise KeyboardInterrupt

    graph = Graph([Stage("a", 1, {}, writes(lambda: "")), Stage("b", 1, {}, writes(lambda: ""), ("a",))])
    with pytest.raises(KeyboardInterrupt):
        drive(graph, store, run, executor=executor, on_event=interrupt)
    assert executor.ended == 1
    status = Run.open(store, run.id).status
    assert (status.state, status.error) == ("failed", "interrupted")
    ended = {name: (stage.state, stage.error) for name, stage in status.stages.items()}
    assert ended == {"a": ("failed", "interrupted"), "b": ("pending", "")}


class Finishes(Endless):
    """An executor whose tries, told to end, have just come to their end."""

    def execute(self, work, on_event, end):
        on_event(Event(work.stage.name, "running"))
        assert end.wait(20)
        return work.perform(lambda event: None)


def test_the_status_of_an_interrupted_stage_is_never_wrong(store):
    executor, run = Finishes(), new_run(store)

    def interrupt(event: Event) -> None:
        if event.kind == "running":
            raise KeyboardInterrupt

    def interrupt_twice(event: Event) -> None:
        if event.kind in ("running", "done"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(Graph([Stage("a", 1, {}, writes(lambda: ""))]), store, run, executor=executor, on_event=interrupt)
    status = Run.open(store, run.id).status
    assert (status.state, status.error) == ("failed", "interrupted")
    assert (status.stages["a"].state, status.stages["a"].error) == ("done", ""), "it is committed"

    run, graph = new_run(store), Graph([Stage("a", 2, {}, writes(lambda: "")), Stage("b", 1, {}, writes(lambda: ""))])
    with pytest.raises(KeyboardInterrupt):
        drive(graph, store, run, executor=executor, on_event=interrupt_twice)
    stages = Run.open(store, run.id).status.stages
    assert sorted(stage.state for stage in stages.values()) == ["done", "failed"], "never running"


def test_a_time_out_needs_more_than_a_thread(store):
    graph = Graph([Stage("a", 1, {}, writes(lambda: ""), tries=Tries(timeout=5))])
    with pytest.raises(GraphError, match="'a' has a time-out, which needs a process of its own"):
        drive(graph, store, new_run(store))


def test_a_status_that_cannot_be_written_costs_no_work(store, monkeypatch, caplog):
    run = new_run(store)

    def fail_then_heal(context):
        monkeypatch.setattr(run, "save", fails)
        context.attempt.store.write_bytes("out", b"whole")
        return {}

    def fails():
        raise StorageError("the disk is full")

    results = drive(Graph([Stage("a", 1, {}, fail_then_heal)]), store, run)
    assert results["a"].artifact.verify().files[0].path == "out"
    assert "was not written: the disk is full" in caplog.text


def test_of_two_runs_that_need_a_stage_one_makes_it_while_the_other_waits(store):
    made, said, begun, go_on = [], [], threading.Event(), threading.Event()

    def slow(context):
        made.append(context.run_id)
        begun.set()
        assert go_on.wait(30)
        context.attempt.store.write_bytes("out", b"whole")
        return {"by": context.run_id}

    def watch(event: Event) -> None:
        said.append(event.message)
        go_on.set()

    graph = Graph([Stage("a", 1, {}, slow)])
    first, second = new_run(store), new_run(store)
    with ThreadPoolExecutor(1) as pool:
        earlier = pool.submit(drive, graph, store, first)
        assert begun.wait(30)
        later = drive(graph, store, second, on_event=watch)["a"]
        assert earlier.result()["a"].metadata == later.metadata == {"by": first.id}
    assert later.state == "skipped" and made == [first.id]
    assert said[0].startswith(f"waits for run {first.id} on ")
    assert not store.list(f"artifacts/a/{graph.keys['a']}/claims")


def test_a_run_that_waits_for_another_can_be_interrupted(store):
    begun, go_on = threading.Event(), threading.Event()

    def slow(context):
        begun.set()
        assert go_on.wait(30)
        return {}

    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    graph, second = Graph([Stage("a", 1, {}, slow)]), new_run(store)
    with ThreadPoolExecutor(1) as pool:
        earlier = pool.submit(drive, graph, store, new_run(store))
        assert begun.wait(30)
        with pytest.raises(KeyboardInterrupt):
            drive(graph, store, second, on_event=interrupt, executor=Endless())
        go_on.set()
        assert earlier.result()["a"].state == "done"
    assert Run.open(store, second.id).status.stages["a"].error == "interrupted"


def abc(made):
    """a → b → c, and d beside them; each counts what it makes."""

    def stage(name, *upstream):
        def run(context):
            made.append(name)
            context.attempt.store.write_bytes("out", str(len(made)).encode())
            return {}

        return Stage(name, 1, {}, run, upstream)

    return Graph([stage("a"), stage("b", "a"), stage("c", "b"), stage("d")])


def test_from_a_stage_on(store):
    made = []
    with pytest.raises(GraphError, match="stage 'b' needs 'a', of which nothing is committed; run 'a' first"):
        drive(abc(made), store, new_run(store), from_stage="b")
    drive(abc(made), store, new_run(store), until="a")
    drive(abc(made), store, new_run(store), from_stage="b", until="b")
    assert made == ["a", "b"]
    drive(abc(made), store, new_run(store), from_stage="b")
    assert made == ["a", "b", "c"]
    with pytest.raises(GraphError, match="'a' does not follow 'c'"):
        drive(abc(made), store, new_run(store), from_stage="c", until="a")
    with pytest.raises(GraphError, match="no stage 'x'"):
        drive(abc(made), store, new_run(store), from_stage="x")


def test_nothing_of_a_killed_driver_s_turn_is_running_any_more(store):
    run = new_run(store)
    run.status.stages = {"a": StageStatus("done"), "b": StageStatus("running"), "d": StageStatus("failed")}
    drive(abc([]), store, run, until="a")
    states = {name: stage.state for name, stage in Run.open(store, run.id).status.stages.items()}
    assert states == {"a": "done", "b": "pending", "d": "failed"}


def test_what_a_run_starts_from_is_not_removed_under_it(store, monkeypatch):
    def collects(context):
        report = collect(store, Policy(keep_last=0))
        assert report.dropped_runs and not report.removed
        context.attempt.store.write_bytes("out", context.inputs["a"].files.read_bytes("out"))
        return {}

    monkeypatch.setattr("pipelines.garbage.ABANDONED_S", 0)
    graph = Graph([Stage("a", 1, {}, writes(lambda: "a")), Stage("b", 1, {}, collects, ("a",))])
    drive(graph, store, new_run(store), until="a")
    run = new_run(store)
    assert drive(graph, store, run, from_stage="b")["b"].artifact.files.read_bytes("out") == b"a"
    assert Run.open(store, run.id).status.inputs == {"a": graph.keys["a"]}


def test_made_anew_is_a_generation_that_all_share_from_then_on(store):
    made = []
    first = drive(abc(made), store, new_run(store))
    made.clear()
    ahead = make_anew(abc(made), ["b"], store, None)
    assert read_generations(store) == {}, "a look ahead leaves nothing"
    anew = make_anew(abc(made), ["b"], store, "r2")
    assert anew.keys == ahead.keys
    assert {name for name in anew.keys if anew.keys[name] != abc(made).keys[name]} == {"b", "c"}
    again = drive(anew, store, new_run(store))
    assert made == ["b", "c"]
    assert again["b"].artifact.files.read_bytes("out") != first["b"].artifact.files.read_bytes("out")
    assert first["b"].artifact.verify(), "the earlier one is whole still"

    later = Graph(list(abc(made).stages.values()), read_generations(store))
    assert later.keys == anew.keys
    both = make_anew(later, ["a", "b"], store, "r3")
    assert len(read_generations(store)) == 3
    assert both.keys["c"] not in (anew.keys["c"], abc(made).keys["c"])
    assert Graph(list(abc(made).stages.values()), read_generations(store)).keys == both.keys


def test_damage_to_a_generation_is_told(store):
    store.write_bytes("generations/0123.json", b'{"generation": "two"}')
    with pytest.raises(ValueError, match=r"generations/0123.json is damaged; delete it"):
        read_generations(store)
