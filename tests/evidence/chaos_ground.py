"""The cluster of `caravan up` on a real S3 server behind a faulty proxy; ways to kill its parts, and a watch on what is
committed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import processes
from cluster.artifact import Artifact, CorruptArtifact
from cluster.storage import NotFound, Store
from pipelines.service.client import ServiceClient, ServiceRefused, ServiceUnavailable
from tests.conftest import find_free_port
from tests.evidence.faulty_proxy import FaultyProxy, Weather
from tests.swift import running_swift

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = "tests.evidence.chaos_stages"

_COMMAND_SECONDS = 240
_BACK_SECONDS = 240.0
_LOOK_SECONDS = 1.0
_MANIFEST = re.compile(rb"^PUT /[^/ ]+/store/(artifacts/\S+)/manifest\.json[? ]")
_ATTEMPT = re.compile(rb'"attempt": "([^"]+)"')


class Commits:
    """By artifact, in order of the store's answers: the attempts whose manifests it took, told from what goes through a
    proxy."""

    def __init__(self) -> None:
        self.attempts: dict[str, list[str]] = {}
        self._lock = threading.Lock()

    def add(self, artifact: str, attempt: str) -> None:
        with self._lock:
            if attempt not in (known := self.attempts.setdefault(artifact, [])):
                known.append(attempt)

    def tap(self) -> _Connection:
        return _Connection(self)


class _Connection:
    def __init__(self, commits: Commits) -> None:
        self._commits = commits
        self._artifact, self._sent = "", b""

    def asked(self, data: bytes) -> None:
        if re.match(rb"[A-Z]+ /", data):
            found = _MANIFEST.match(data)
            self._artifact, self._sent = found[1].decode() if found else "", b""
        if self._artifact:
            self._sent += data

    def answered(self, data: bytes) -> None:
        if self._artifact and re.search(rb"HTTP/1\.1 2\d\d ", data) and (found := _ATTEMPT.search(self._sent)):
            self._commits.add(self._artifact, found[1].decode())
            self._artifact = ""


class Watch:
    """Looks at the store itself all the time, and reads what has been committed since, byte by byte."""

    def __init__(self, store: Store, commits: Commits) -> None:
        self.damaged: list[str] = []
        self.verified = 0
        self._store, self._commits = store, commits
        self._seen: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_for_ever, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _look_for_ever(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            for path, stat in self._store.stats("artifacts").items():
                if path.endswith("/manifest.json") and self._seen.get(path) != stat:
                    self._seen[path] = stat
                    self._verify(path.removesuffix("/manifest.json"))

    def _verify(self, folder: str) -> None:
        artifact = Artifact(self._store.child(*folder.split("/")))
        try:
            self._commits.add(folder, artifact.verify().attempt)
            self.verified += 1
        except (NotFound, CorruptArtifact) as error:  # an old checkpoint may just have been removed, manifest first
            if artifact.manifest() is not None:
                self.damaged.append(str(error))


@dataclass
class Ground:
    """`uri` goes through the proxy, `store` does not."""

    folder: Path
    environment: dict[str, str]
    proxy: FaultyProxy
    store: Store
    uri: str
    commits: Commits
    port: int
    head: Any = None
    address: str = ""
    old: list[Any] = field(default_factory=list)
    """Processes of heads that were killed: they have ended, or are to end by themselves."""
    up_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while there is no head; a command that found none would start one of its own."""
    _faults: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    # -- the cluster

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
        return subprocess.run(
            line, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=_COMMAND_SECONDS
        )

    def up(self) -> tuple[float, list[str]]:
        """`caravan up`, again until it succeeds; the seconds, and why it did not."""
        refusals: list[str] = []
        began = time.monotonic()
        while True:
            options = ["--store", self.uri, "--allow", self.folder, "--allow-module", STAGES, "--num-cpus", 4]
            ended = self.command("up", "--service-port", self.port, *options, "--json")
            if ended.returncode == 0:
                record = json.loads(ended.stdout)
                self.head, self.address = processes.find(record["pid"]), record["address"]
                return time.monotonic() - began, refusals
            refusals.append(ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else "it said nothing")
            if time.monotonic() - began > _BACK_SECONDS:
                sys.exit(f"caravan up does not succeed any more: {refusals[-1]}")
            time.sleep(1)

    def down(self) -> None:
        self.old += self.members()
        ended = self.command("down")
        if ended.returncode:
            sys.exit(f"caravan down failed: {ended.stderr}")

    def members(self) -> list[Any]:
        return processes.tree(self.head)

    def left(self) -> list[str]:
        """Processes of this cluster, and of those before it, that live: their numbers and names."""
        found = [(each.pid, each.create_time()) for each in self.old]
        living = {pid for pid, started in found if processes.find(pid, started) is not None}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != os.getpid():
                    belongs = self.environment["CARAVAN_HOME"].encode() in (entry / "environ").read_bytes()
                    living |= {int(entry.name)} if belongs and processes.find(int(entry.name)) else set()
        return [f"{pid} {_command_line(processes.find(pid))[:80]}" for pid in sorted(living)]

    def find(self, word: str) -> list[Any]:
        """Processes of the cluster, with that in their command line."""
        return [each for each in self.members() if word in _command_line(each)]

    # -- what breaks

    def kill_service(self) -> str:
        (service,) = self.find("ray::ServiceActor")
        service.kill()
        return f"process {service.pid}"

    def drivers(self) -> list[Any]:
        return [each for each in self.find("pipelines.cli resume") if "python" in each.name()]

    def kill_driver(self, draw: random.Random) -> str:
        driver = draw.choice(self.drivers())
        run_id = driver.cmdline()[driver.cmdline().index("resume") + 1]
        driver.kill()
        return f"of run {run_id}"

    def kill_head(self, whole: bool) -> str:
        """kill -9 of all its processes, or of those that Ray cannot do without; then `caravan up` until it succeeds."""
        with self.up_lock:
            members = self.members()
            victims = [each for each in members if whole or _is_vital(each, self.head)]
            for victim in victims:
                with suppress(processes.gone()):
                    victim.kill()
            self.old += members
            seconds, refusals = self.up()
        why = f" after {len(refusals)} refusals: {refusals[-1][:110]}" if refusals else ""
        return f"{len(victims)} of {len(members)} processes; up again in {seconds:.0f} s{why}"

    def break_store(self, weather: Weather, seconds: float) -> str:
        """From now on for so long, or until the next time; does not wait."""
        self._faults += 1
        number = self._faults

        def mend() -> None:
            if self._faults == number:
                self.proxy.become("fair")

        self.proxy.become(weather)
        threading.Timer(seconds, mend).start()
        return f"{weather} for {seconds:.0f} s"

    def mend_store(self) -> None:
        self._faults += 1
        self.proxy.become("fair")

    def seconds_to_answer(self, limit: float = 90.0) -> float | None:
        """Until the service answers a new connection; None if it does not."""
        began, service = time.monotonic(), ServiceClient(self.url)
        try:
            while time.monotonic() - began < limit:
                with suppress(ServiceUnavailable, ServiceRefused):
                    service.health()
                    return time.monotonic() - began
                time.sleep(0.2)
            return None
        finally:
            service.close()


def _command_line(process: Any) -> str:
    with suppress(processes.gone()):
        return " ".join(process.cmdline()) if process is not None else ""
    return ""


def _is_vital(process: Any, head: Any) -> bool:
    with suppress(processes.gone()):
        return process.pid == head.pid or process.name() in ("gcs_server", "raylet")
    return False


@contextmanager
def chaos_ground(folder: Path, seed: int) -> Iterator[Ground]:
    """Everything up; at the end everything is down, and what is left of it is killed."""
    (folder / "swift").mkdir()
    with running_swift(folder / "swift") as swift:
        commits = Commits()
        proxy = FaultyProxy(swift.ports["proxy"], seed, commits.tap)
        bucket = swift.make_bucket()
        uri = f"s3://{bucket}/store?endpoint_override=127.0.0.1:{proxy.port}&scheme=http"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {
            "CARAVAN_HOME": str(folder / "home"),
            "RAY_TMPDIR": str(folder),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        store = Store(swift.uri(bucket, "store"))
        ground = Ground(folder, environment, proxy, store, uri, commits, find_free_port())
        try:
            ground.up()
            yield ground
        finally:
            for each in ground.left():  # only of what was started here, and only if a claim has failed
                with suppress(ProcessLookupError):
                    os.kill(int(each.split()[0]), 9)
            proxy.close()
