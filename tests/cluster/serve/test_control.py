"""Deploying: what can be refused before anything starts. The rest is in test_serving."""

import json
import socket

import pytest
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeApplicationSchema

from cluster.serve import control
from cluster.serve.checks import check_port_free, check_room
from cluster.serve.declaration import declaration, declared_args, declared_engine, with_model, without_autoscaling
from cluster.serve.errors import DeployFailed, NoRoom, PortTaken, ServeError, telling_line
from cluster.serve.settings import AppArgs, BuildArgs, EngineOptions
from cluster.serve.view import Endpoint


def test_a_taken_port_is_reported(unused_port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} on 127.0.0.1 is taken"):
            check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", unused_port)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_dashboard_that_does_not_answer_is_reported_in_one_line(unused_port):
    with pytest.raises(ServeError, match="does not answer") as caught:
        control.status(dashboard_url=f"http://127.0.0.1:{unused_port}")
    assert "\n" not in str(caught.value)


def test_a_cluster_without_a_dashboard_is_reported():
    with pytest.raises(ServeError, match="no dashboard"):
        control.check_can_deploy("", 8000, replace=True)


class _Client:
    """Stands for Serve's REST interface with one application, ours or none."""

    def __init__(self, *apps: str) -> None:
        self.apps = list(apps)

    def details(self) -> dict:
        http = {"host": "127.0.0.1", "port": 8123}
        return {"http_options": http, "proxies": {"node": {}}, "applications": {name: {} for name in self.apps}}

    def declare(self, apps: dict, http_options: dict) -> None:
        self.apps = list(apps)

    def remove_all(self) -> None:
        self.apps = []


def test_an_endpoint_that_may_not_be_replaced_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(control, "_connect", lambda url: _Client("caravan"))
    with pytest.raises(ServeError, match=r"http://127\.0\.0\.1:8123 already; caravan undeploy"):
        control.check_can_deploy("http://x", 8123, replace=False)
    control.check_can_deploy("http://x", 8123, replace=True)
    with pytest.raises(PortTaken):
        control.check_can_deploy("http://x", 8124, replace=True)
    monkeypatch.setattr(control, "_connect", lambda url: _Client("another"))
    control.check_can_deploy("http://x", 8123, replace=False)


@pytest.mark.parametrize("removal_fails", [False, True])
def test_an_interrupted_deployment_of_a_new_application_is_removed(monkeypatch, removal_fails):
    client = _Client()

    def interrupt(*_) -> None:
        assert client.apps == ["caravan"]
        if removal_fails:
            client.remove_all = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        raise KeyboardInterrupt

    monkeypatch.setattr(control, "_connect", lambda url: client)
    monkeypatch.setattr(control, "_wait_until_serving", interrupt)
    with pytest.raises(KeyboardInterrupt):
        control.deploy(AppArgs(model="m"), replicas=1, dashboard_url="http://elsewhere:8265", port=8123)
    assert client.apps == (["caravan"] if removal_fails else [])


def test_scaling_to_nothing_is_refused():
    with pytest.raises(ValueError, match="replicas=0"):
        control.scale(0, dashboard_url="http://127.0.0.1:1")


def test_replicas_that_there_is_no_room_for_are_not_asked_for_any_longer(monkeypatch):
    asked: list[int] = []

    class Client:
        def details(self) -> dict:
            engine = {"target_num_replicas": 2, "message": "no room", "replicas": []}
            app = {"status": "DEPLOYING", "message": "", "deployments": {"engine": engine}}
            return {"http_options": {"host": "127.0.0.1", "port": 8123}, "applications": {"caravan": app}}

        def scale(self, app: str, deployment: str, replicas: int) -> None:
            asked.append(replicas)

    monkeypatch.setattr(control, "_connect", lambda url: Client())
    with pytest.raises(DeployFailed, match="0 of 50 replicas run .*no room.*; back to 2 replicas"):
        control.scale(50, dashboard_url="http://x", timeout_s=0)
    assert asked == [50, 2]


def test_a_declaration_that_serve_acts_on_late_does_not_undo_the_number_that_was_asked_for(monkeypatch):
    app = declaration(
        ARGS.model_copy(update={"min_replicas": 1, "max_replicas": 9}), EngineOptions(model="/m"), replicas=1
    )
    target = 1

    class Client:
        declared = app

        def details(self) -> dict:
            engine = {"target_num_replicas": target, "message": "", "replicas": []}
            ours = {"status": "RUNNING", "deployments": {"engine": engine}, "deployed_app_config": self.declared}
            return {"http_options": {"host": "127.0.0.1", "port": 8123}, "applications": {"caravan": ours}}

        def declare(self, apps: dict, http_options: dict) -> None:
            self.declared = apps["caravan"]

        def scale(self, app: str, deployment: str, replicas: int) -> None:
            nonlocal target
            target = replicas

    client = Client()

    def act(*_) -> None:
        nonlocal target
        target = client.declared["deployments"][0]["num_replicas"]

    monkeypatch.setattr(control, "_connect", lambda url: client)
    monkeypatch.setattr(control, "_wait_until_serving", act)
    assert control.scale(3, dashboard_url="http://x") and target == 3


def test_a_port_that_another_cluster_answers_on_as_well_is_refused(monkeypatch):
    endpoint = Endpoint("http://127.0.0.1:8123", "x")
    answers = [[{"replica": "ours"}], None, [{"replica": "ours"}], [{"replica": "theirs"}]]
    monkeypatch.setattr(control, "followed", lambda endpoint: answers.pop(0) if answers else None)
    with pytest.raises(DeployFailed, match="another endpoint answers at http://127.0.0.1:8123"):
        control._check_port_is_ours(endpoint, {"ours", "new"})
    control._check_port_is_ours(endpoint, {"ours"})


ARGS = AppArgs(model="/m", threads=3, ingresses=2, api_keys="/keys", cors_origins=("https://x",), max_wait_s=2.5)


def test_a_declaration_holds_all_that_was_set():
    app = json.loads(json.dumps(declaration(ARGS, EngineOptions(model="/n", revision=3), replicas=4)))
    assert declared_args(app) == ARGS and declared_engine(app) == EngineOptions(model="/n", revision=3)
    assert [deployment["num_replicas"] for deployment in app["deployments"]] == [4, 2]


@pytest.mark.parametrize(
    "changed",
    [
        {"ingresses": 5},
        {"api_keys": None},
        {"cors_origins": ()},
        {"max_wait_s": None},
        {"min_replicas": 1, "max_replicas": 9},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_may_change_while_processes_run_is_not_in_the_arguments_that_restart_them(changed):
    """Serve's own function says which declarations are the same code."""
    engine = EngineOptions(model="/m")
    before = declaration(ARGS, engine, replicas=2)
    after = declaration(ARGS.model_copy(update=changed), engine.model_copy(update={"model": "/n"}), replicas=7)
    assert before != after and _code_version(before) == _code_version(after)
    threads = declaration(ARGS.model_copy(update={"threads": 1}), engine, replicas=2)
    assert _code_version(before) != _code_version(threads)


def _code_version(app: dict) -> str:
    return get_app_code_version(ServeApplicationSchema.model_validate(app))


def test_new_weights_are_a_new_revision_even_where_the_old_ones_lay():
    app = declaration(ARGS, EngineOptions(model="/m"), replicas=2)
    again = with_model(app, "/m", replicas=3)
    assert declared_engine(again) == EngineOptions(model="/m", revision=1)
    assert declared_args(again) == ARGS and again["deployments"][0]["num_replicas"] == 3


def test_a_fixed_number_ends_autoscaling_and_nothing_else():
    bounds = {"min_replicas": 1, "max_replicas": 9}
    engine = EngineOptions(model="/m", revision=5)
    app = declaration(ARGS.model_copy(update=bounds), engine, replicas=2)
    assert without_autoscaling(app, replicas=2) == declaration(ARGS, engine, replicas=2)
    assert without_autoscaling(declaration(ARGS, engine, replicas=2), replicas=2) is None


def test_replicas_that_no_node_can_hold_are_refused():
    args = BuildArgs(model="m", cpus_per_replica=3, gpus_per_replica=1, accelerator_type="H200")
    big = {"CPU": 8.0, "GPU": 8.0, "accelerator_type:H200": 1.0}
    other = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
    check_room(args, 4, [big, other, big])
    with pytest.raises(NoRoom, match="replicas=5 of 3 CPU, 1 GPU of type H200 each do not fit; the cluster holds 4"):
        check_room(args, 5, [big, other, big])
    check_room(BuildArgs(model="m", cpus_per_replica=0.1), 10, [{"CPU": 1.0}])
    with pytest.raises(NoRoom, match="holds 0"):
        check_room(BuildArgs(model="m"), 1, [{"CPU": 0.5}, {"CPU": 0.5}])


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "Deploying failed:\nTraceback (most recent call last):\n  File x\nModelNotFound: no model at y\n\n",
            "ModelNotFound: no model at y",
        ),
        (
            "Request failed: Traceback (most recent call last):\n  File a\n    f()\n    ^^^\nActorDiedError: it died.\n"
            "\tclass_name: Proxy\nThe actor never ran.\n.",
            "ActorDiedError: it died.",
        ),
        ("Request failed: no such route\n.", "Request failed: no such route"),
        ("\n.\n", ""),
    ],
)
def test_of_a_traceback_the_exception_is_what_the_user_sees(message, line):
    assert telling_line(message) == line
