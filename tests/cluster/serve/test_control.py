"""Deploying: what can be refused before anything starts. The rest is in test_serving."""

import socket

import pytest

from cluster.serve import control
from cluster.serve.errors import last_line
from cluster.serve.settings import AppArgs


def test_a_taken_port_is_reported(unused_port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(control.PortTaken, match=f"port {port} on 127.0.0.1 is taken"):
            control._check_port_free("127.0.0.1", port)
    control._check_port_free("127.0.0.1", unused_port)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_dashboard_that_does_not_answer_is_reported_in_one_line(unused_port):
    with pytest.raises(control.ServeError, match="does not answer") as caught:
        control.status(dashboard_url=f"http://127.0.0.1:{unused_port}")
    assert "\n" not in str(caught.value)


def test_a_cluster_without_a_dashboard_is_reported():
    with pytest.raises(control.ServeError, match="no dashboard"):
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

    def delete_applications(self) -> None:
        self.apps = []


def test_an_endpoint_that_may_not_be_replaced_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(control, "_connect", lambda url: _Client("caravan"))
    with pytest.raises(control.ServeError, match=r"http://127\.0\.0\.1:8123 already; caravan undeploy"):
        control.check_can_deploy("http://x", 8123, replace=False)
    control.check_can_deploy("http://x", 8123, replace=True)
    with pytest.raises(control.PortTaken):
        control.check_can_deploy("http://x", 8124, replace=True)
    monkeypatch.setattr(control, "_connect", lambda url: _Client("another"))
    control.check_can_deploy("http://x", 8123, replace=False)


@pytest.mark.parametrize("removal_fails", [False, True])
def test_an_interrupted_deployment_of_a_new_application_is_removed(monkeypatch, removal_fails):
    client = _Client()

    def interrupt(*_) -> None:
        assert client.apps == ["caravan"]
        if removal_fails:
            client.delete_applications = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
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
    with pytest.raises(control.DeployFailed, match="0 of 50 replicas run .*no room.*; back to 2 replicas"):
        control.scale(50, dashboard_url="http://x", timeout_s=0)
    assert asked == [50, 2]


def test_a_port_that_another_cluster_answers_on_as_well_is_refused(monkeypatch):
    endpoint = control.Endpoint("http://127.0.0.1:8123", "x")
    answers = [[{"replica": "ours"}], None, [{"replica": "ours"}], [{"replica": "theirs"}]]
    monkeypatch.setattr(control, "_routing", lambda endpoint: answers.pop(0) if answers else None)
    with pytest.raises(control.DeployFailed, match="another endpoint answers at http://127.0.0.1:8123"):
        control._check_port_is_ours(endpoint, {"ours", "new"})
    control._check_port_is_ours(endpoint, {"ours"})


def test_only_the_number_of_replicas_may_change_without_a_restart():
    app = {"name": "x", "runtime_env": {}, "args": {"model": "m", "replicas": 1}}
    assert control._differ_in_replicas_only(app, {**app, "args": {"model": "m", "replicas": 9}})
    assert not control._differ_in_replicas_only(app, {**app, "args": {"model": "n", "replicas": 1}})
    assert not control._differ_in_replicas_only(app, {**app, "runtime_env": {"py_modules": ["gcs://x.zip"]}})
    assert not control._differ_in_replicas_only(None, app)


def test_of_a_traceback_the_exception_is_what_the_user_sees():
    message = "Deploying failed:\nTraceback (most recent call last):\n  File x\nModelNotFound: no model at y\n\n"
    assert last_line(message) == "ModelNotFound: no model at y"
