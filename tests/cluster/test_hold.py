"""What an endpoint serves is held in the store for as long as it is served."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster import hold
from cluster.artifact import Artifact
from cluster.condemn import Marker
from cluster.serve import control
from cluster.serve.errors import DeployFailed
from cluster.serve.settings import AppArgs
from cluster.storage import StorageError, Store

URL = "http://127.0.0.1:8265"


@pytest.fixture
def exports(tmp_path: Path) -> list[Artifact]:
    found = []
    for name in ("old", "new"):
        artifact = Artifact(Store(tmp_path / name))
        attempt = artifact.begin()
        attempt.store.write_bytes("config.json", b"{}")
        attempt.commit({})
        found.append(artifact)
    return found


def held(artifact: Artifact) -> bool:
    return bool(artifact.store.list(hold.FOLDER))


def test_a_hold_says_who_and_is_taken_back_by_who_took_it(exports):
    hold.take(exports[0].store.uri, URL)
    (path,) = exports[0].store.list(hold.FOLDER)
    assert URL in exports[0].store.read_json(path)["holder"]
    hold.release(exports[0].store.uri, "http://10.0.0.2:8265")
    assert held(exports[0])
    hold.release(exports[0].store.uri, URL)
    hold.release(exports[0].store.uri, URL)
    assert not held(exports[0]) and exports[0].verify()


def test_every_machine_has_a_loopback_of_its_own(exports, monkeypatch):
    for host in ("a", "b"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        hold.take(exports[0].store.uri, URL)
        hold.take(exports[0].store.uri, "http://10.0.0.2:8265")
    assert len(exports[0].store.list(hold.FOLDER)) == 3


def test_what_is_no_committed_artifact_is_not_held(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    hold.take(str(tmp_path), URL)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_hold_waits_for_who_may_be_removing_the_artifact(exports, monkeypatch, caplog):
    marker = Marker(exports[0], "gc 1", None)
    withdraw = {"sleep": lambda seconds: marker.withdraw()}
    monkeypatch.setattr(hold.settled, "__kwdefaults__", {**hold.settled.__kwdefaults__, **withdraw})
    hold.take(exports[0].store.uri, URL)
    assert "waits for gc 1" in caplog.text and held(exports[0])


def test_a_store_that_takes_no_hold_does_not_keep_it_from_being_served(exports, monkeypatch, caplog):
    def refuse(*args: object, **options: object) -> None:
        raise StorageError("it is read-only")

    monkeypatch.setattr(Store, "write_json", refuse)
    hold.take(exports[0].store.uri, URL)
    assert "may be removed as unused: it is read-only" in caplog.text


class Client:
    """Stands for Serve's REST interface, and does what it is told at once."""

    def __init__(self) -> None:
        self.apps: dict[str, Any] = {}

    def details(self) -> dict[str, Any]:
        engine = {"engine": {"target_num_replicas": 1}}
        apps = {name: {"deployed_app_config": app, "deployments": engine} for name, app in self.apps.items()}
        return {"http_options": {"host": "127.0.0.1", "port": 8123}, "applications": apps}

    def declare(self, apps: dict[str, Any], http_options: dict[str, Any]) -> None:
        self.apps = apps

    def remove_all(self) -> None:
        self.apps = {}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr(control, "_connect", lambda url: client)
    monkeypatch.setattr(control, "_wait_until_serving", lambda *args: None)
    monkeypatch.setattr(control, "check_port", lambda *args: None)
    monkeypatch.setattr(control, "check_replaceable", lambda *args: None)
    return client


def deploy(artifact: Artifact) -> None:
    control.deploy(AppArgs(model=artifact.store.uri), replicas=1, dashboard_url=URL)


def test_what_is_served_is_held_and_nothing_else(exports, client):
    old, new = exports
    deploy(old)
    assert held(old)
    deploy(old)
    assert held(old), "it is served still"
    deploy(new)
    assert (held(old), held(new)) == (False, True)
    control.update(old.store.uri, dashboard_url=URL)
    assert (held(old), held(new)) == (True, False)
    control.undeploy(dashboard_url=URL)
    assert (held(old), held(new)) == (False, False)


def test_a_deployment_that_fails_lets_go(exports, client, monkeypatch):
    old, new = exports

    def fail(*args: object) -> None:
        raise DeployFailed("no")

    with monkeypatch.context() as failing:
        failing.setattr(control, "_wait_until_serving", fail)
        with pytest.raises(DeployFailed):
            deploy(old)
        assert not held(old) and client.apps == {}
    deploy(old)
    monkeypatch.setattr(control, "_wait_until_serving", fail)
    with pytest.raises(DeployFailed, match="back to the weights"):
        control.update(new.store.uri, dashboard_url=URL)
    assert (held(old), held(new)) == (True, False)
    with pytest.raises(DeployFailed):
        deploy(new)
    assert held(old) and held(new), "it is not known which of them the replicas have"


def test_an_endpoint_whose_model_has_gone_can_be_removed(exports, client):
    deploy(exports[0])
    shutil.rmtree(exports[0].store.local_path())
    control.undeploy(dashboard_url=URL)
    assert client.apps == {}
