"""The orchestrator on a real store and a cluster that does what the test says; killed at every step it takes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import StorageError, Store
from pipelines.runs import Run
from pipelines.service.errors import Busy, RequestRefused, UnknownRun, WrongState
from pipelines.service.intake import Accepted, RunRequest, accept
from pipelines.service.loop import Orchestrator
from pipelines.service.queue import QueuePolicy
from pipelines.service.resources import Room
from pipelines.service.submission import Submission
from pipelines.webhook import Event
from tests.pipelines.service.fakes import RECIPE, Clock, FakeCluster, states


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def cluster(store: Store) -> FakeCluster:
    return FakeCluster(store)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(store: Store, cluster: FakeCluster, clock: Clock) -> Orchestrator:
    made = Orchestrator(store, cluster, cluster, clock=clock, queue=QueuePolicy({"user": 1}))
    made.tick()
    return made


def ask(run_id: str, **options: object) -> RunRequest:
    return RunRequest(RECIPE, run_id=run_id, **{"until": "shards", **options})  # type: ignore[arg-type]


def turn(service: Orchestrator, clock: Clock, seconds: float = 3.0) -> None:
    clock.now += seconds
    service.tick()


def test_a_run_from_its_submission_to_its_end(service: Orchestrator, cluster: FakeCluster, clock: Clock) -> None:
    row = service.submit(ask("r", tags={"user": "ana"}, priority=2))
    assert (row.state, row.name, row.priority, dict(row.tags), row.until) == (
        "queued",
        "tiny",
        2,
        {"user": "ana"},
        "shards",
    )
    service.tick()
    assert states(service) == {"r": "starting"} and list(cluster.jobs) == ["r"]
    assert cluster.commands["r"].startswith("python -m pipelines.cli resume r --store file:///")
    cluster.begin("r")
    turn(service, clock)
    assert states(service) == {"r": "running"}
    cluster.end("r")
    turn(service, clock)
    assert states(service) == {"r": "done"}
    turn(service, clock)
    assert len(cluster.jobs) == 1 and service.find("r")[1].submission.outcome == "done"  # type: ignore[union-attr]


def test_what_happens_is_told_once_and_in_order(store: Store, cluster: FakeCluster, clock: Clock) -> None:
    told: list[Event] = []

    def all_told() -> list[tuple[str, str]]:
        return [(event.run_id, event.event) for event in told]

    service = Orchestrator(store, cluster, cluster, clock=clock, on_event=told.append)
    service.tick()
    service.submit(ask("r"))
    turn(service, clock)
    assert all_told() == [("r", "run.queued")], "its job is there, its driver is not"
    cluster.begin("r")
    for _ in range(3):
        turn(service, clock)
    cluster.set("r", "FAILED", "killed")
    for _ in range(2):
        turn(service, clock, 1e13)  # the driver has been silent for long
    service.resume("r")
    turn(service, clock)
    cluster.begin("r-2")
    cluster.end("r-2")  # between two looks
    for _ in range(2):
        turn(service, clock)
    service.submit(ask("s"))
    service.stop("s")
    turn(service, clock)
    once = ["run.queued", "run.started"]
    assert all_told() == [
        *(("r", event) for event in [*once, "run.lost", *once, "run.done"]),
        ("s", "run.queued"),
        ("s", "run.stopped"),
    ]
    assert " ".join(event.state for event in told) == "queued running lost queued running done queued stopped"
    assert [event.started for event in told] == [None, 1e12, 1e12, None, 1e12, 1e12, None, None]
    assert len({event.id for event in told}) == len(told) and {event.name for event in told} == {"tiny"}
    lost = told[2]
    assert lost.queued == 1000.0 and (lost.ended or 0) > 1e13 and "killed" in (lost.error or "")
    assert [event.error for event in told if event is not lost] == [None] * 7


def test_the_next_service_tells_the_end_and_not_the_beginning_again(
    store: Store, cluster: FakeCluster, clock: Clock
) -> None:
    first: list[Event] = []
    second: list[Event] = []
    before = Orchestrator(store, cluster, cluster, clock=clock, on_event=first.append)
    before.tick()
    before.submit(ask("begun"))
    before.submit(ask("not-yet"))
    turn(before, clock)
    cluster.begin("begun")
    turn(before, clock)
    after = Orchestrator(store, cluster, cluster, clock=clock, on_event=second.append)
    turn(after, clock)
    assert second == []
    cluster.begin("not-yet")
    cluster.end("begun", "failed", "no text is left")
    turn(after, clock)
    told = sorted((event.run_id, event.event, event.error) for event in second)
    assert told == [("begun", "run.failed", "no text is left"), ("not-yet", "run.started", None)]
    assert [event.event for event in first] == ["run.queued", "run.queued", "run.started"]


def test_an_end_that_the_store_does_not_take_is_told_when_it_does(
    store: Store, cluster: FakeCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    service = Orchestrator(store, cluster, cluster, clock=clock, on_event=lambda event: told.append(event.event))
    service.tick()
    service.submit(ask("r"))
    turn(service, clock)
    cluster.begin("r")
    cluster.end("r")
    write = Store.write_json

    def fail(self: Store, path: str, value: Any) -> None:
        if path.endswith("submission.json"):
            raise StorageError("the disk is full")
        write(self, path, value)

    with monkeypatch.context() as broken:
        broken.setattr(Store, "write_json", fail)
        turn(service, clock)
        turn(service, clock)
    assert told == ["run.queued", "run.started"]
    turn(service, clock)
    assert told == ["run.queued", "run.started", "run.done"]


def test_the_driver_gets_what_was_asked_for() -> None:
    asked = Submission(keep=True)
    command = asked.driver_command("r", "s3://b/x?a=1&b=2")
    assert command == ("python -m pipelines.cli resume r --store 's3://b/x?a=1&b=2' --keep")


def test_who_waits_is_told_why_and_starts_when_there_is_room(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    cluster.room = Room({"CPU": 2.0}, {"CPU": 1.0})
    service.submit(ask("a"))
    service.submit(ask("b"))
    service.submit(ask("big", overrides=["train.workers=4", "train.global_batch=4"], until="pretrain"))
    service.tick()
    rows = {row.id: row for row in service.rows()}
    assert [rows[name].state for name in ("a", "b", "big")] == ["starting", "queued", "queued"]
    assert rows["b"].waits_for == "waits for 1 CPU: 2 of 2 are in use by a; 1st in the queue"
    assert rows["big"].waits_for == "needs 4 CPUs, the cluster has at most 2"
    assert service.cluster()["waiting"]["b"]["needs"] == {"CPU": 1.0}
    cluster.begin("a")
    cluster.end("a")
    turn(service, clock)
    assert states(service) == {"a": "done", "b": "starting", "big": "queued"}


def test_a_more_urgent_run_that_comes_while_another_is_started_is_next(
    service: Orchestrator, cluster: FakeCluster
) -> None:
    cluster.room = Room({"CPU": 2.0}, {})

    def come(what: str) -> None:
        if what == "submit a":
            service.submit(ask("urgent", priority=9))

    cluster.before = come
    for run_id in ("a", "b"):
        service.submit(ask(run_id))
    service.tick()
    assert states(service) == {"a": "starting", "b": "queued", "urgent": "starting"}


def test_a_queued_run_is_stopped_at_once_and_a_running_one_by_its_job(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    service.submit(ask("a", tags={"user": "ana"}))
    service.submit(ask("b", tags={"user": "ana"}))
    service.tick()
    cluster.begin("a")
    turn(service, clock)
    assert service.stop("b").state == "stopped"
    assert service.stop("a").state == "stopping"
    turn(service, clock)
    turn(service, clock)
    assert cluster.stops == ["a"], "asked once, and again only after a while"
    turn(service, clock, 20)
    assert cluster.stops == ["a", "a"]
    cluster.end("a", "failed", "interrupted")
    cluster.set("a", "STOPPED")
    turn(service, clock)
    assert states(service) == {"a": "stopped", "b": "stopped"}
    for run_id in ("a", "b"):
        with pytest.raises(WrongState, match="is stopped already"):
            service.stop(run_id)
    service.resume("a")
    turn(service, clock)
    assert list(cluster.jobs) == ["a", "a-2"] and states(service) == {"a": "starting", "b": "stopped"}
    with pytest.raises(WrongState, match="goes on by itself"):
        service.resume("a")


def test_a_driver_that_was_killed_is_lost_and_can_be_resumed(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    service.submit(ask("r"))
    service.tick()
    cluster.begin("r")
    cluster.set("r", "FAILED", "Job entrypoint command failed with exit code 137")
    turn(service, clock)
    row, _ = service.find("r")
    assert row.state == "lost" and "exit code 137" in row.error
    service.resume("r")
    turn(service, clock)
    cluster.begin("r-2")
    cluster.end("r-2")
    turn(service, clock)
    assert service.find("r")[0].state == "done" and service.find("r")[0].error == ""
    with pytest.raises(WrongState, match="is done"):
        service.resume("r")


def test_a_run_whose_end_the_store_does_not_take_is_to_be_resumed_later(
    service: Orchestrator, cluster: FakeCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.submit(ask("r"))
    service.tick()
    cluster.set("r", "FAILED")

    def fail(*_: object, **__: object) -> None:
        raise StorageError("the store cannot be reached")

    with monkeypatch.context() as failing:
        failing.setattr(Store, "write_bytes", fail)
        turn(service, clock)
        assert states(service) == {"r": "failed"}
        with pytest.raises(Busy, match="not on record yet; try again"):
            service.resume("r")
    turn(service, clock)
    assert service.resume("r").state == "queued"


def test_a_driver_that_never_began_has_failed_and_says_why(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    service.submit(ask("r"))
    service.tick()
    cluster.set("r", "FAILED", "runtime environment failed")
    turn(service, clock)
    assert [(row.state, row.error) for row in service.rows()] == [
        ("failed", "its driver did not begin: runtime environment failed")
    ]


def test_a_cluster_that_came_anew_gets_the_jobs_that_had_not_begun(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    service.submit(ask("begun"))
    service.submit(ask("not"))
    service.tick()
    cluster.begin("begun")
    cluster.jobs.clear()
    run = Run.open(service.store, "begun")
    run.status.heartbeat = 1.0
    run.save()
    clock.now += 100
    turn(service, clock)
    assert states(service) == {"begun": "lost", "not": "starting"}
    assert list(cluster.jobs) == ["not"]


def test_runs_of_the_command_line_are_listed_and_left_alone(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    run = Run.create(service.store, "name: mine\n", "mine")
    with run.driving():
        service.load()
        turn(service, clock)
        assert states(service) == {"mine": "running"} and not cluster.jobs
        for refused in (service.stop, service.resume, service.delete):
            with pytest.raises(WrongState):
                refused("mine")


def test_a_waiting_run_that_somebody_drives_by_hand_is_not_started(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    cluster.room = Room({"CPU": 0.0}, {})
    service.submit(ask("r"))
    service.tick()
    clock.now = 0.0  # the driver's clock is the machine's
    cluster.room = Room({"CPU": 4.0}, {})
    with Run.open(service.store, "r").driving():
        service.tick()
        assert not cluster.jobs
        assert service.cluster()["waiting"]["r"]["waits_for"] == "somebody drives it without the service"
    service.tick()
    assert states(service) == {"r": "done"} and not cluster.jobs


def test_a_deleted_run_is_gone_and_what_is_under_way_is_not_deleted(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    service.submit(ask("r"))
    with pytest.raises(WrongState, match="stop it first"):
        service.delete("r")
    service.stop("r")
    service.delete("r")
    assert service.rows() == [] and service.store.list("runs") == service.store.list("summaries") == []
    with pytest.raises(UnknownRun):
        service.find("r")
    service.submit(ask("r"))
    service.tick()
    assert list(cluster.jobs) == ["r"], "the name is free again"


def test_a_run_whose_folder_somebody_removed_is_ended_and_not_made_again(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    service.submit(ask("r"))
    service.tick()
    cluster.begin("r")
    turn(service, clock)
    service.store.delete("runs/r")
    turn(service, clock)
    assert cluster.stops == ["r"]
    cluster.set("r", "STOPPED")
    turn(service, clock)
    assert service.rows() == [] and service.store.list("runs") == []


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"until": "training"}, "until", "choose one of ingest"),
        ({"force": ["nothing"]}, "force", "choose one of"),
        ({"from_stage": "nothing"}, "from_stage", "choose one of"),
        ({"keep": True, "until": "export"}, "keep", "starts none"),
        ({"priority": 101}, "priority", "from -100 to 100"),
        ({"tags": {"a": "b=c"}}, "tags", "is no tag"),
        ({"run_id": "../x"}, "run_id", "malformed"),
        ({"recipe": "name: ["}, "recipe", "not valid YAML"),
        ({"recipe": "- a"}, "recipe", "not a mapping"),
        ({"overrides": ["train.stepz=1"]}, "recipe", "train.steps"),
        ({"overrides": ["nonsense"]}, "recipe", "not of the form"),
        ({"overrides": ["data.sources[0].uri=/etc"]}, "data.sources[0].uri", "not in the store"),
        ({"overrides": ["train.start_from=no-such-run"]}, "recipe", "no-such-run"),
    ],
)
def test_a_bad_request_names_the_field_and_leaves_nothing(
    service: Orchestrator, options: dict[str, object], field: str, words: str
) -> None:
    request = RunRequest(**{"recipe": RECIPE, **options})  # type: ignore[arg-type]
    with pytest.raises(RequestRefused, match=words) as caught:
        service.submit(request)
    assert caught.value.field == field and "\n" not in str(caught.value)
    assert service.store.list() == []


def test_an_id_is_taken_once(service: Orchestrator) -> None:
    service.submit(ask("r"))
    with pytest.raises(WrongState, match="'r' exists already"):
        service.submit(ask("r"))
    results: list[str] = []

    def submit() -> None:
        try:
            results.append(service.submit(ask("same")).state)
        except WrongState:
            results.append("refused")

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["queued"] + ["refused"] * 7


def test_a_jobs_api_that_fails_is_told_and_tried_again(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    cluster.error = "the Jobs API failed"
    assert service.submit(ask("r")).state == "queued", "it is kept all the same"
    turn(service, clock)
    assert service.health()["problems"] == {"jobs": "the Jobs API failed"} and not service.health()["ok"]
    assert states(service) == {"r": "queued"}
    cluster.error = ""
    turn(service, clock)
    assert service.health()["ok"] and states(service) == {"r": "starting"}


def test_a_job_that_is_refused_for_good_has_failed(service: Orchestrator, cluster: FakeCluster, clock: Clock) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no such package")

    cluster.submit = refuse  # type: ignore[method-assign, assignment]
    service.submit(ask("r"))
    turn(service, clock)
    assert [(row.state, row.error) for row in service.rows()] == [("failed", "its job was refused: no such package")]


def test_a_store_that_fails_stops_nothing_for_good(
    service: Orchestrator, cluster: FakeCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.submit(ask("r"))

    def full(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Store, "write_json", full)
    turn(service, clock)
    assert not cluster.jobs, "a job whose id is not written is not started"
    assert service.health()["problems"] == {"store": "the disk is full"}
    with pytest.raises(StorageError):
        service.stop("r")
    assert states(service) == {"r": "queued"}
    monkeypatch.undo()
    turn(service, clock)
    assert states(service) == {"r": "starting"} and service.health()["ok"]


def test_another_run_s_job_of_the_same_name_is_not_taken_for_ours(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    cluster.submit("true", "other", "r")
    service.submit(ask("r"))
    turn(service, clock)
    turn(service, clock)
    assert [(job.id, job.run_id) for job in cluster.list()] == [("r", "other"), ("r-2", "r")]


def test_submitting_wakes_the_loop(store: Store, cluster: FakeCluster) -> None:
    started = threading.Event()
    cluster.before = lambda what: started.set() if what.startswith("submitted") else None
    service = Orchestrator(store, cluster, cluster, tick_seconds=30.0)
    service.start()
    try:
        service.submit(ask("r"))
        assert started.wait(10), "it does not wait for the next tick"
    finally:
        service.close()


# -- killed at every step


class Killed(BaseException):
    """kill -9, as far as one thread can play it: nothing after it happens, and nothing is cleaned up."""


def scenario(service: Callable[[], Orchestrator], cluster: FakeCluster, clock: Clock) -> dict[str, str]:
    """Four runs with different fates, under services of which any may be killed. Returns their last states."""
    asked: set[str] = set()
    stopped = resumed = False
    current = service()

    def alive(action: Callable[[], object]) -> None:
        nonlocal current
        try:
            action()
        except Killed:
            current = service()
        except WrongState:
            pass  # it was done before the kill

    for _ in range(60):
        for run_id in ("good", "bad", "stop", "die"):
            if run_id not in asked:
                alive(lambda run_id=run_id: current.submit(ask(run_id)))  # type: ignore[misc]
                asked |= {run_id} if cluster.store.exists(f"runs/{run_id}/submission.json") else set()
        alive(lambda: turn(current, clock))
        for job in cluster.live():
            runs = [each.run_id for each in cluster.live()]
            assert len(runs) == len(set(runs)), f"two jobs of one run: {runs}"
            if job.status == "PENDING":
                cluster.begin(job.id)
            elif job.id in cluster.stops:
                cluster.end(job.id, "failed", "interrupted")
                cluster.set(job.id, "STOPPED")
            elif job.run_id == "good" or job.id == "die-2":
                cluster.end(job.id)
            elif job.run_id == "bad":
                cluster.end(job.id, "failed", "no text is left")
            elif job.run_id == "die":
                cluster.set(job.id, "FAILED", "exit code 137")
        if "stop" in cluster.jobs and not stopped:
            alive(lambda: current.stop("stop"))
            stopped = cluster.store.read_json("runs/stop/submission.json")["stop_asked"] is not None
        if not resumed and states(current).get("die") == "lost":
            alive(lambda: current.resume("die"))
            resumed = cluster.store.read_json("runs/die/submission.json")["outcome"] == ""
        if len(asked) == 4 and resumed and set(states(current).values()) <= {"done", "failed", "stopped"}:
            break
    return states(current)


def test_killed_at_any_step_every_run_ends_as_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    before = Store.write_bytes
    step, kill_at = 0, -1

    def count(what: str) -> None:
        nonlocal step
        step += 1
        if step == kill_at:
            raise Killed(what)

    def write(self: Store, path: str, data: bytes, **options: bool):
        in_service = threading.current_thread().name == "MainThread" and not driving
        if in_service:
            count(f"before {path}")
        entry = before(self, path, data, **options)
        if in_service:
            count(f"after {path}")
        return entry

    accepted: dict[str | None, Accepted] = {}

    def accept_once(request: RunRequest, *rest: Any) -> Accepted:  # it reads a recipe, and changes nothing
        if request.run_id not in accepted:
            accepted[request.run_id] = accept(request, *rest)
        return accepted[request.run_id]

    monkeypatch.setattr("pipelines.service.loop.accept", accept_once)
    driving = False

    def of_driver(method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal driving
            driving = True
            try:
                method(*arguments)
            finally:
                driving = False

        return call

    monkeypatch.setattr(Store, "write_bytes", write)
    monkeypatch.setattr(FakeCluster, "begin", of_driver(FakeCluster.begin))
    monkeypatch.setattr(FakeCluster, "end", of_driver(FakeCluster.end))
    expected = {"good": "done", "bad": "failed", "stop": "stopped", "die": "done"}
    kills = 0
    while True:
        store = Store(tmp_path / str(kills))
        cluster, clock = FakeCluster(store, before=count), Clock()
        step, kill_at = 0, kills if kills else -1

        def service(store=store, cluster=cluster, clock=clock) -> Orchestrator:
            made = Orchestrator(store, cluster, cluster, clock=clock)
            made.load()
            return made

        assert scenario(service, cluster, clock) == expected, f"killed at step {kills}"
        tries = {run_id: [job.id for job in cluster.list() if job.run_id == run_id] for run_id in expected}
        assert tries == {"good": ["good"], "bad": ["bad"], "stop": ["stop"], "die": ["die", "die-2"]}
        if kills == 0:
            total = step
        kills += 1
        if kills > total:
            break
    assert total > 40


def test_a_run_that_the_service_fails_on_is_in_nobodys_way(
    service: Orchestrator, cluster: FakeCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.submit(ask("bad"))
    service.tick()
    service.submit(ask("good"))
    look = service._look
    monkeypatch.setattr(service, "_look", lambda entry: look(entry) if entry.id == "good" else 1 / 0)
    turn(service, clock)
    assert list(cluster.jobs) == ["bad", "good"]
    assert service.health()["problems"] == {
        "run bad": "the service failed on it (ZeroDivisionError); its log says where"
    }


@pytest.mark.parametrize("end", ["SUCCEEDED", "FAILED", "STOPPED", "RUNNING"])
def test_a_new_run_of_a_deleted_ones_id_gets_a_job_of_its_own(
    service: Orchestrator, cluster: FakeCluster, clock: Clock, end: str
) -> None:
    service.submit(ask("r"))
    service.tick()
    cluster.begin("r")
    cluster.end("r")
    cluster.set("r", end)
    turn(service, clock)
    service.delete("r")
    service.submit(ask("r"))
    for _ in range(3):
        turn(service, clock)
    assert list(cluster.jobs) == ["r", "r-2"] and states(service) == {"r": "starting"}
    cluster.begin("r-2")
    cluster.end("r-2")
    turn(service, clock)
    assert states(service) == {"r": "done"}


def test_a_half_made_run_is_taken_over_only_by_the_very_same_request(service: Orchestrator) -> None:
    accepted = accept(ask("r", until="ingest"), service.store, service._recipes, 1.0)
    Run.create(service.store, accepted.recipe_yaml, "r", "ingest")
    with pytest.raises(WrongState, match="exists already"):
        service.submit(ask("r"))
    assert service.submit(ask("r", until="ingest")).until == "ingest"


def test_a_stop_that_comes_before_the_store_was_read_is_to_be_tried_again(
    service: Orchestrator, cluster: FakeCluster, clock: Clock
) -> None:
    service.submit(ask("r"))
    later = Orchestrator(service.store, cluster, cluster, clock=clock)
    with pytest.raises(Busy, match="not read the store yet"):
        later.stop("r")
    later.tick()
    assert later.stop("r").state == "stopping"


def test_before_the_store_was_read_a_list_is_refused_and_not_empty(
    service: Orchestrator, cluster: FakeCluster, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.submit(ask("r"))
    later = Orchestrator(service.store, cluster, cluster, clock=clock)

    def fail(*_: object, **__: object) -> None:
        raise StorageError("the store cannot be reached")

    with monkeypatch.context() as failing:
        failing.setattr(Store, "folders", fail)
        later.tick()
        with pytest.raises(Busy, match="not read the store yet"):
            later.rows()
    later.tick()
    assert states(later) == {"r": "starting"}


def test_a_clock_that_is_set_back_hides_no_news(service: Orchestrator, cluster: FakeCluster, clock: Clock) -> None:
    service.submit(ask("r"))
    service.tick()
    cluster.set("r", "RUNNING")
    turn(service, clock)
    cluster.begin("r")
    turn(service, clock, -500)
    assert states(service) == {"r": "running"}
