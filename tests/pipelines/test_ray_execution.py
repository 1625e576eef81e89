"""Stages as Ray tasks, on one local cluster: what they say, what they cost, and that whatever ends, ends whole."""

import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest
import ray

from cluster import processes, session
from cluster.storage import StorageError, Store
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.ray_execution import OnRay
from pipelines.runs import Run
from pipelines.seq2seq import build_seq2seq_graph
from pipelines.stage import Resources, Stage, Tries
from pipelines.stage_options import StageOptions
from pipelines.translate import PREDICTIONS
from pipelines.user_stage import user_stages
from tests.pipelines.seq2seq_run import tiny

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    """On a cluster whose workers also get a module of the user's."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "shipped_stage.py").write_text("def where(context, config):\n    return {'file': __file__, **config}\n")
    sys.path.append(str(folder))
    with session.connect("local", num_cpus=2, dashboard=False, modules=["shipped_stage"]), OnRay() as executor:
        sys.path.remove(str(folder))
        yield executor


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def run_stage(store, executor, function, on_event=lambda event: None, **options):
    graph = Graph([Stage("work", 1, {}, function, **options)])
    return drive(graph, store, Run.create(store, "name: x\n"), executor=executor, on_event=on_event)["work"]


def test_a_stage_runs_elsewhere_with_what_it_asks_for_and_is_heard(store, executor, caplog):
    caplog.set_level(logging.WARNING)

    def work(context):
        logging.getLogger("pipelines.somewhere").warning("mind the %s", "gap")
        for number in range(3):
            context.emit(f"part {number}", fraction=number / 3, values={"number": number})
        context.attempt.store.write_bytes("out", b"whole")
        return {"pid": os.getpid(), "resources": ray.get_runtime_context().get_assigned_resources()}

    events = []
    result = run_stage(store, executor, work, events.append, resources=Resources(1.5))
    assert result.metadata["pid"] != os.getpid()
    assert result.metadata["resources"]["CPU"] == 1.5
    assert result.artifact.verify().files[0].path == "out"
    assert [(event.kind, event.message) for event in events] == [
        ("running", ""),
        *(("progress", f"part {number}") for number in range(3)),
        ("done", ""),
    ]
    assert events[3].values == {"number": 2}
    assert "mind the gap" in caplog.text


def test_a_stage_of_the_users_runs_on_workers_from_the_module_that_was_shipped(store, executor, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        (tmp_path / "shipped_stage.py").write_text("def where(context, config): ...\n")
        (stage,) = user_stages({"mine": StageOptions(uses="shipped_stage:where", config={"a": 1}, always=True)})
    results = drive(Graph([stage]), store, Run.create(store, "name: x\n"), executor=executor)
    file = results["mine"].metadata["file"]
    assert file.endswith("shipped_stage.py") and "runtime_resources" in file, "Ray's copy"
    assert results["mine"].metadata["a"] == 1


class Awkward(Exception):
    """Cannot be made from its arguments as pickle would."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_comes_back_as_itself_with_where_it_was_raised(store, executor):
    def breaks(context):
        context.attempt.store.write_bytes("half", b"x")
        raise StorageError("the disk is full\nand more")

    def breaks_awkwardly(context):
        raise Awkward("one", "two")

    with pytest.raises(StorageError, match="the disk is full") as caught:
        run_stage(store, executor, breaks)
    assert "in breaks" in caught.value.__notes__[0]
    (errors,) = [path for path in store.list("runs") if "/errors/" in path]
    assert b"in breaks" in store.read_bytes(errors)
    assert [path for path in store.list("artifacts") if "half" in path] == []
    with pytest.raises(RuntimeError, match="Awkward: one and two") as caught:
        run_stage(store, executor, breaks_awkwardly)
    assert "in breaks_awkwardly" in caught.value.__notes__[0]


def test_an_error_of_a_class_that_only_the_worker_has(store, executor, tmp_path):
    (tmp_path / "only_there.py").write_text("class Broken(Exception): pass\n")
    folder = str(tmp_path)

    def breaks(context):
        sys.path.append(folder)
        raise __import__("only_there").Broken("one thing")

    with pytest.raises(RuntimeError, match="^Broken: one thing") as caught:
        run_stage(store, executor, breaks)
    assert "in breaks" in caught.value.__notes__[0]


def test_a_stage_that_leaves_has_failed_and_is_no_lost_worker(store, executor):
    def leaves(context):
        context.run_dir.write_bytes(f"try-{context.attempt.name}", b"")
        sys.exit("no such word")

    with pytest.raises(RuntimeError, match=r"the stage called sys.exit\('no such word'\)") as caught:
        run_stage(store, executor, leaves)
    assert "in leaves" in caught.value.__notes__[0]
    assert len([path for path in store.list("runs") if "/try-" in path]) == 1, "not repeated"


def test_a_stage_for_which_there_is_no_room_says_so(store, executor, monkeypatch):
    monkeypatch.setattr("pipelines.ray_execution._ROOM_SECONDS", 0.5)
    said = []

    def watch(event):
        said.append((event.kind, event.message))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(store, executor, lambda context: {}, watch, resources=Resources(1, 3, accelerator_type="H200"))
    ((kind, message), *_) = said
    assert kind == "progress"
    assert message.startswith(
        "waits for a node with 1 CPU, 3 GPU to spare (H200); all nodes together have 2 CPU, 0 GPU"
    )


def test_what_a_stage_says_is_heard_though_the_inbox_is_lost_meanwhile(store, executor, tmp_path):
    go_on, said = tmp_path / "go-on", []

    def work(context):
        context.emit("one")
        while not go_on.exists():
            time.sleep(0.02)
        context.emit("two")
        context.emit("three", fraction=1.0)
        context.attempt.store.write_bytes("out", b"whole")
        return {}

    def watch(event):
        said.append(event.message)
        if event.message == "one":
            ray.kill(own._inbox, no_restart=False)
            go_on.touch()

    with OnRay() as own:
        run_stage(store, own, work, watch)
    assert "three" in said


def test_a_killed_worker_is_replaced(store, executor):
    def work(context):
        if not context.run_dir.exists("killed"):
            context.run_dir.write_bytes("killed", b"")
            context.attempt.store.write_bytes("half", b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        context.attempt.store.write_bytes("out", b"whole")
        return {}

    said = []
    result = run_stage(store, executor, work, said.append, tries=Tries(wait=0.1))
    assert [file.path for file in result.artifact.verify().files] == ["out"]
    (loss,) = [event.message for event in said if event.kind == "progress"]
    assert loss.startswith("the worker of stage 'work' was lost: ") and loss.endswith("another try in 0 s")


def sleeper(folder):
    """A stage that starts another task, tells both pids, and would go on for ever."""

    @ray.remote(num_cpus=0)
    def child():
        (folder / f"child-{os.getpid()}").touch()
        time.sleep(1000)

    def work(context):
        child.remote()
        (folder / f"stage-{os.getpid()}").touch()
        try:
            while True:
                time.sleep(0.05)
        finally:
            (folder / "cleared").touch()

    return work


def pids(folder):
    deadline = time.monotonic() + 60
    while len(found := [path for path in folder.iterdir() if "-" in path.name]) < 2:
        assert time.monotonic() < deadline, "the stage and its child have not begun"
        time.sleep(0.05)
    return [processes.find(int(path.name.split("-")[1])) for path in found]


def test_a_time_out_interrupts_the_stage_and_ends_what_it_started(store, executor, tmp_path):
    tries = Tries(timeout=2.0)
    with pytest.raises(RuntimeError, match="was ended after 2 s"):
        run_stage(store, executor, sleeper(tmp_path), tries=tries)
    assert (tmp_path / "cleared").exists()
    members = [process for process in pids(tmp_path) if process is not None]
    deadline = time.monotonic() + 30
    while still := [p for p in members if p.is_running() and (tmp_path / f"child-{p.pid}").exists()]:
        assert time.monotonic() < deadline, f"{still} outlived the stage that started it"
        time.sleep(0.1)


def test_a_stage_that_will_not_end_is_killed(store, executor, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.ray_execution.END_SECONDS", 0.5)

    def stubborn(context):
        (tmp_path / f"stage-{os.getpid()}").touch()
        while True:
            try:
                time.sleep(0.01)
            except KeyboardInterrupt:
                (tmp_path / "asked").touch()

    with pytest.raises(RuntimeError, match="was ended after 1 s"):
        run_stage(store, executor, stubborn, tries=Tries(timeout=1.0))
    assert (tmp_path / "asked").exists()
    (path,) = tmp_path.glob("stage-*")
    deadline = time.monotonic() + 20
    while (process := processes.find(int(path.name.split("-")[1]))) and process.is_running():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_stages_at_once_on_two_workers(store, executor, tmp_path):
    def meets(other):
        def work(context):
            (tmp_path / context.stage).touch()
            deadline = time.monotonic() + 60
            while not (tmp_path / other).exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            context.attempt.store.write_bytes("out", context.stage.encode())
            return {"pid": os.getpid()}

        return work

    stages = [Stage("left", 1, {}, meets("right")), Stage("right", 1, {}, meets("left"))]
    results = drive(Graph(stages), store, Run.create(store, "name: x\n"), executor=executor)
    assert len({result.metadata["pid"] for result in results.values()}) == 2


def test_closing_ends_what_is_tried_and_leaves_no_thread(store, executor):
    def threads():
        return {thread for thread in threading.enumerate() if thread.name.startswith("stage-")}

    before, interrupted = threads(), []

    def interrupt(signum, frame):
        interrupted.append(signum)
        raise KeyboardInterrupt

    def twice(event):
        if event.kind == "running":
            signal.setitimer(signal.ITIMER_REAL, 0.5)  # for the second, while the driver waits for the stage's end
            raise KeyboardInterrupt

    def stubborn(context):
        while True:
            with suppress(KeyboardInterrupt):
                time.sleep(0.01)

    run, former = Run.create(store, "name: x\n"), signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), OnRay() as own:
            drive(Graph([Stage("work", 1, {}, stubborn)]), store, run, executor=own, on_event=twice)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert interrupted
    deadline = time.monotonic() + 20
    while still := threads() - before:
        assert time.monotonic() < deadline, still
        time.sleep(0.05)
    status = Run.open(store, run.id).status
    assert (status.state, status.stages["work"].state) == ("failed", "failed")


def test_an_encoder_decoders_recipe_goes_from_pairs_to_figures_and_on(store, executor):
    recipe = tiny("train.workers=2", "train.micro_batch=4", "train.validate_every=4")
    graph = build_seq2seq_graph(recipe)
    first = drive(graph, store, Run.create(store, recipe.to_yaml()), until="pretrain", executor=executor)
    assert first["pretrain"].metadata["step"] == 4 and first["pretrain"].metadata["val_loss"] > 0
    assert first["pretrain"].metadata["parameters"] == recipe.model.num_parameters()
    results = drive(graph, store, Run.create(store, recipe.to_yaml()), executor=executor)
    assert [result.state for result in results.values()] == ["skipped", "skipped", "done"]
    figures, files = results["evaluate"].metadata, results["evaluate"].artifact.files
    assert files.read_json("evaluation.json") == figures and figures["pairs"] == 30
    lines = [json.loads(line) for line in files.read_bytes(PREDICTIONS).splitlines()]
    assert len(lines) == 30
    assert figures["exact_match"] == sum(line["target"] == line["predicted"] for line in lines) / 30
