"""The service on a real cluster, as a user has it: `caravan up`, runs over HTTP, and its process killed in between."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import processes
from pipelines.service.client import ServiceClient, ServiceRefused
from pipelines.service.submission import OVER
from pipelines.webhook import SIGNATURE, verify
from tests.pipelines.commands import type_here
from tests.pipelines.service.fakes import RECIPE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).resolve().parents[3]
TOKEN = "only-for-this-test-0123456789"


@dataclass
class Place:
    """A user's folder, the environment of the commands there, and the service of `caravan up`."""

    folder: Path
    environment: dict[str, str]
    client: ServiceClient | None = None
    told: list[dict[str, Any]] = field(default_factory=list)
    """What its webhook got."""

    def run(self, *arguments: object) -> str:
        command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
        ended = subprocess.run(
            command, cwd=REPOSITORY, env=self.environment, capture_output=True, text=True, timeout=180
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def ask(self, *arguments: object, code: int = 0) -> str:
        return type_here(self.folder / "home", *arguments, code=code)

    def head(self) -> Any:
        record = json.loads((self.folder / "home" / "cluster.json").read_text())
        return processes.find(record["pid"])

    def service_pid(self) -> int | None:
        for member in processes.tree(self.head()):
            with suppress(processes.gone()):
                if "ServiceActor" in " ".join(member.cmdline()):
                    return member.pid
        return None

    def recipe(self, name: str, uri: str | None = None) -> dict[str, Any]:
        source = {"uri": uri or str(self.folder / "corpus")}
        data = {"sources": [source], "validation_fraction": 0.1, "min_document_chars": 8}
        return {**RECIPE, "name": name, "data": data}


@contextmanager
def other_clusters() -> Iterator[None]:
    """Processes by which Ray would know two more clusters on this machine: others', or what is left of a killed one."""
    line = ["raylet", "-c", "import time; time.sleep(600)"]
    looks = [subprocess.Popen([*line, f"--gcs-address=127.0.0.1:{port}"], executable=sys.executable) for port in (1, 2)]
    try:
        yield
    finally:
        for process in looks:
            process.kill()
            process.wait()


@contextmanager
def receiver(told: list[dict[str, Any]], secret: bytes) -> Iterator[str]:
    """Keeps what was signed with the secret; the URL."""

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            verify(secret, self.headers[SIGNATURE], body, time.time())
            told.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.05,))
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/told"
        finally:
            server.shutdown()
            serving.join()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "corpus").mkdir()
    for number in range(60):
        (folder / "corpus" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 5)
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    made = Place(folder, {**environment, "CARAVAN_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"})
    options = ["--num-cpus", 2, "--allow", folder / "corpus", "--token-file", token, "--cap", "user=1"]
    with other_clusters(), receiver(made.told, TOKEN.encode()) as url:
        options += ["--webhook", url, "--webhook-secret-file", token, "--webhook-loopback-http"]
        made.environment["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:1"
        record = json.loads(made.run("up", *options, "--json"))
        del made.environment["RAY_API_SERVER_ADDRESS"]
        head = made.head()
        try:
            made.client = ServiceClient(record["service_url"], TOKEN)
            yield made
            made.client.close()
        finally:
            members = processes.tree(head)
            made.run("down")
            assert processes.await_end(members, grace=10) == 0, "the cluster left processes behind"


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} s for {what}")


def states(client: ServiceClient) -> dict[str, str]:
    return {run["id"]: run["state"] for run in client.runs({})["runs"]}


def test_runs_end_as_they_should_though_the_service_is_killed(place: Place) -> None:
    client = place.client
    assert client is not None
    health = client.health()
    assert health["ok"] and health["store"] == (place.folder / "home" / "store").as_uri()
    for run_id, tags in (("one", {"user": "ana"}), ("two", {"user": "bo"}), ("three", {"user": "ana"})):
        body = {"recipe": place.recipe(run_id), "until": "ingest", "run_id": run_id, "tags": tags}
        assert client.submit(body)["state"] == "queued"
    client.submit({"recipe": place.recipe("four"), "until": "ingest", "run_id": "four", "tags": {"user": "bo"}})
    waits = wait_for(lambda: client.run("three")["waits_for"], "the queue's word")
    assert waits.startswith("waits for a place: user ana has 1 of 1 runs")

    first = wait_for(place.service_pid, "the service's process")
    processes.find(first).kill()
    wait_for(lambda: place.service_pid() not in (None, first), "another process of the service")
    assert client.stop("four")["state"] in ("stopped", "stopping"), "the client waits until it is back"

    wait_for(lambda: set(states(client).values()) <= OVER, "the end of all runs")
    assert states(client) == {"one": "done", "two": "done", "three": "done", "four": "stopped"}
    assert [client.run(run_id)["submission"]["tries"] for run_id in ("one", "two", "three")] == [1, 1, 1]
    assert "ingest" in "".join(client.logs("one"))
    assert client.cluster()["capacity"] == {"CPU": 2.0, "GPU": 0.0}
    artifact = client.artifacts("one")[0]
    assert (artifact["stage"], artifact["committed"]) == ("ingest", True) and artifact["size"] > 0


def test_the_commands_go_through_the_service(place: Place) -> None:
    recipe = place.folder / "recipe.yaml"
    recipe.write_text(json.dumps(place.recipe("five")))
    submitted = json.loads(
        place.run("submit", recipe, "--until", "ingest", "--run-id", "five", "--tag", "user=ana", "--json")
    )
    assert (submitted["run_id"], submitted["state"]) == ("five", "queued")
    client = place.client
    assert client is not None
    wait_for(lambda: client.run("five")["state"] == "starting", "its job")
    assert client.stop("five")["state"] == "stopping"
    assert "run five is stopped" in place.ask("stop", "five")
    again = json.loads(place.run("resume", "five", "--json"))
    assert again == submitted, "it is queued again, and not driven here"
    assert json.loads(place.ask("show", "five", "--json"))["state"] in ("queued", "starting", "running")
    wait_for(lambda: client.run("five")["state"] == "done", "its end")
    wait_for(lambda: [each for each in place.told if each["event"] == "run.done" and each["run_id"] == "five"], "word")
    events = [each["event"] for each in place.told if each["run_id"] == "five"]
    assert [event for event in events if event != "run.started"] == [
        *("run.queued", "run.stopped"),
        *("run.queued", "run.done"),
    ]
    assert events[-2:] == ["run.started", "run.done"]
    listed = json.loads(place.ask("runs", "--tag", "user=ana", "--sort", "id", "--ascending", "--json"))
    assert [run["id"] for run in listed["runs"]] == ["five", "one", "three"]
    place.ask("delete", "five")
    with pytest.raises(ServiceRefused, match="no run 'five'"):
        client.run("five")
    recipe.write_text(json.dumps(place.recipe("six", "/etc/hostname")))
    assert "data.sources[0].uri" in place.ask("submit", recipe, "--until", "ingest", code=1)


def test_a_stranger_is_refused(place: Place) -> None:
    assert place.client is not None
    stranger = ServiceClient(place.client.url)
    assert stranger.health() == {"service": "caravan", "ok": True}
    with pytest.raises(ServiceRefused, match="token is needed"):
        stranger.runs({})
    stranger.close()
