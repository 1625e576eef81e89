"""Evidence that the service runs as an application of Ray Serve, as it does on a cluster.

    python tests/evidence/service_on_serve.py

On a local cluster behind Serve's proxy: nobody gets in without the token; a run is submitted over the API and is done;
the console opens with the token, and its WebSocket with the pass and from its own page alone; the replica's process is
killed, and the one that Serve puts in its place has every run.

Needs the environment of `make setup` and about a minute and a half. Exits non-zero when a claim fails.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from pipelines.service.client import ServiceClient, ServiceRefused, ServiceUnavailable  # noqa: E402
from pipelines.service.passes import COOKIE  # noqa: E402
from tests.evidence.service_runs import check, recipe  # noqa: E402

TOKEN = "a-token-for-the-service"
SECONDS = 120.0

DEPLOY = """
import sys
from ray import serve
from cluster import session
from pipelines.service.app import build
from pipelines.service.settings import ServiceSettings

address, port, store, token, folder = sys.argv[1:]
with session.connect(address):
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(build(ServiceSettings(store=store, token_file=token, allow=(folder,))), name="service")
"""


def main() -> int:
    claims: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="caravan-evidence-") as name:
        folder = Path(name)
        (folder / "corpus0").mkdir()
        for number in range(40):
            text = f"def f{number}(x):\n    return x + {number}\n" * 5
            (folder / "corpus0" / f"{number}.txt").write_text(text)
        token = folder / "token"
        token.touch(0o600)
        token.write_text(TOKEN)
        variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        variables |= {"CARAVAN_HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)}

        def run(*line: object) -> str:
            command = [sys.executable, *map(str, line)]
            return subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout

        record = json.loads(run("-m", "pipelines.cli", "up", "--num-cpus", 2, "--no-service", "--json"))
        try:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            run("-c", DEPLOY, record["address"], port, folder / "store", token, folder)
            show(f"http://127.0.0.1:{port}", folder, claims)
        finally:
            run("-m", "pipelines.cli", "down")
    return 0 if all(claims) else 1


def show(url: str, folder: Path, claims: list[bool]) -> None:
    refused = [httpx.get(f"{url}{path}").status_code for path in ("/api/runs", "/api/cluster", "/console/", "/")]
    check(claims, f"without the token: {refused}", refused == [401, 401, 303, 303])
    service = ServiceClient(url, TOKEN)
    service.submit({"run_id": "r", "recipe": recipe(folder, 0, fails=False), "until": "tokenizer"})
    state = service.await_state("r", frozenset(("done", "failed", "lost")), SECONDS)["state"]
    check(claims, f"a run over the API: {state}", state == "done")
    with httpx.Client(base_url=url) as browser:
        browser.post("/console/login", data={"token": TOKEN})
        page = browser.get("/console/runs/r")
        check(claims, "the console opens with the token", page.status_code == 200 and "Run r" in page.text)
        cookie = f"{COOKIE}={browser.cookies[COOKIE]}"
    opens = [reaches(url, cookie, url), reaches(url, cookie, "http://evil.example"), reaches(url, "", url)]
    check(claims, f"its WebSocket: own page, another's, without the pass: {opens}", opens == [True, False, False])
    pids = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_replica(pid, folder)]
    os.kill(pids[0], signal.SIGKILL)
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        time.sleep(0.5)
        try:
            listed = [run["id"] for run in service.runs({})["runs"]]
            break
        except (ServiceRefused, ServiceUnavailable):
            listed = []
    check(claims, f"killed, and back after {time.monotonic() - began:.0f} s with its runs: {listed}", listed == ["r"])
    service.close()


def reaches(url: str, cookie: str, origin: str) -> bool:
    address = url.replace("http", "ws", 1) + "/console/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    try:
        with connect(address, origin=origin, additional_headers={"Cookie": cookie}, proxy=None) as opened:  # type: ignore[arg-type]
            return str(opened.recv(timeout=20)).startswith("0")
    except (WebSocketException, TimeoutError, OSError):
        return False


def is_replica(pid: int, folder: Path) -> bool:
    """Whether that is the service's replica of the cluster that this script started."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
        home = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return b"ServeReplica:service:runs" in title and str(folder).encode() in home


if __name__ == "__main__":
    sys.exit(main())
