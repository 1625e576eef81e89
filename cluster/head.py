"""A local Ray head that outlives the command that started it: `up`, `down`, and the note that joins them.

The note is `$CARAVAN_HOME/cluster.json`. A process is known by its number and its start time together, so a note that
was left behind never ends a stranger.
"""

import hashlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

from cluster import processes
from cluster.storage import NotFound, Store

logger = logging.getLogger(__name__)

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the entrypoint of a submitted job."""
JOB_ID = "CARAVAN_JOB"
"""Set for the entrypoint of a submitted job: its id (cluster/jobs.py)."""

_RECORD = "cluster.json"
_START_SECONDS = 120.0
_STOP_SECONDS = 40.0  # `ray start` first drains the node, for at most 30 seconds


class ClusterError(RuntimeError):
    """A cluster could not be reached, started or ended. The message names the address and the remedy."""


@dataclass(frozen=True)
class ClusterRecord:
    """What `up` notes about the head it started. `started` is the process's start, in seconds since the epoch.

    `service_url` is where a service for runs answers on that cluster, and `service_token_file` holds the token for it;
    None if there is none.
    """

    pid: int
    started: float
    address: str
    dashboard_url: str
    service_url: str | None = None
    service_token_file: str | None = None


def up(
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    port: int | None = None,
    dashboard_port: int | None = None,
) -> ClusterRecord:
    """Start a Ray head on loopback that outlives this process, with a dashboard and its Jobs API; `down` ends it.

    Ports that are not given are chosen free. It is noted in `$CARAVAN_HOME/cluster.json`, its output goes to
    `head.log` beside that. Raises ClusterError: a port is taken, a cluster is up already, or Ray does not start; then
    nothing is left running.
    """
    with _locked_home() as home, _sigterm_raises():
        earlier = _read_record()
        if earlier is not None and _is_alive(earlier):
            raise ClusterError(
                f"a cluster is up already at {earlier.address} (pid {earlier.pid}); end it: caravan down"
            )
        if earlier is not None:
            logger.warning("%s; its record is removed", _had_ended(earlier))
            Store(home).delete(_RECORD)
        ports = _choose_ports(port, dashboard_port)
        prepare_environment(loopback=True)
        processes.this_process()  # imports ray now, and not between the start and its record
        log_path = home / "head.log"
        child: subprocess.Popen[bytes] | None = None
        try:
            child = _launch(ports, num_cpus, num_gpus, log_path)
            process = processes.find(child.pid)
            if process is None:
                raise _did_not_start(log_path)
            url = f"http://127.0.0.1:{ports['dashboard-port']}"
            record = ClusterRecord(child.pid, process.create_time(), f"127.0.0.1:{ports['port']}", url)
            # noted before it is ready: should this process be killed, `down` finds the head
            Store(home).write_json(_RECORD, asdict(record))
            _await_dashboard(child, url, log_path)
        except BaseException:
            if child is not None and (process := processes.find(child.pid)) is not None:
                processes.end_tree(process, _STOP_SECONDS)
            Store(home).delete(_RECORD)
            raise
    return record


def down() -> ClusterRecord:
    """End the cluster of `up`, and return once none of its processes is left.

    Raises ClusterError if there is none; the record of one that had ended by itself is then removed.
    """
    with _locked_home() as home:
        record = _read_record()
        if record is None:
            raise ClusterError(f"no cluster is up (nothing is noted in {home / _RECORD})")
        process = processes.find(record.pid, record.started)
        if process is not None:
            _end_workers(process)
            processes.end_tree(process, _STOP_SECONDS)
        Store(home).delete(_RECORD)
        if process is None:
            raise ClusterError(f"no cluster is up: {_had_ended(record)}; its record is removed")
    return record


def note_service(record: ClusterRecord, url: str, token_file: str | None) -> ClusterRecord:
    """Note in the record of a running head where a service for runs answers. Raises ClusterError if the head has gone
    meanwhile."""
    with _locked_home() as home:
        current = _read_record()
        if current != record:
            raise ClusterError(f"the cluster at {record.address} is not the one of `caravan up` any more")
        noted = replace(record, service_url=url, service_token_file=token_file)
        Store(home).write_json(_RECORD, asdict(noted))
    return noted


def _launch(
    ports: dict[str, int], num_cpus: int | None, num_gpus: int | None, log_path: Path
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    command += [f"--{name}={number}" for name, number in ports.items()]
    command += [f"--temp-dir={temporary_folder()}"]
    command += [f"--num-cpus={num_cpus}"] if num_cpus is not None else []
    command += [f"--num-gpus={num_gpus}"] if num_gpus is not None else []
    # RAY_ADDRESS would make `ray start --head` look for a cluster instead of being one, and both overrule whom the
    # cluster's own processes ask
    elsewhere = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", JOB_CONFIG)
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    # a job's `python` is this one, whether or not its environment is activated
    environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment["TMPDIR"] = scratch_folder()
    with open(log_path, "wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
        )


def _end_workers(head: Any) -> None:
    """Kills the cluster's workers: its raylet would wait half a minute for idle ones to end by themselves."""
    for process in processes.tree(head):
        with suppress(processes.gone()):
            if process.name().startswith("ray::"):
                process.kill()


def recorded() -> ClusterRecord | None:
    """The cluster of `up`, if it is alive. It may still be starting."""
    record = _read_record()
    return record if record is not None and _is_alive(record) else None


def left_behind() -> ClusterRecord | None:
    """The record of a cluster of `up` that has ended by itself, until `down` or `up` removes it."""
    record = _read_record()
    return record if record is not None and not _is_alive(record) else None


def _read_record() -> ClusterRecord | None:
    home = Store(caravan_home())
    try:
        return ClusterRecord(**home.read_json(_RECORD))
    except NotFound:
        return None
    except (ValueError, TypeError) as error:
        raise ClusterError(f"{home}/{_RECORD} is not a record of `caravan up`; delete it ({error})") from error


def _is_alive(record: ClusterRecord) -> bool:
    return processes.find(record.pid, record.started) is not None


def _had_ended(record: ClusterRecord) -> str:
    return f"the cluster at {record.address} (pid {record.pid}) had ended already"


def caravan_home() -> Path:
    """Where this user's running cluster is noted: $CARAVAN_HOME, else ./.caravan."""
    return Path(os.environ.get("CARAVAN_HOME") or ".caravan").absolute()


def make_home() -> Path:
    """The home folder, there. Neither git nor a job's working directory takes what lies in it, which may be much."""
    home = caravan_home()
    home.mkdir(parents=True, exist_ok=True)
    ignored = home / ".gitignore"
    if not ignored.exists():
        ignored.write_text("*\n")
    return home


def prepare_environment(loopback: bool) -> None:
    """Settings that Ray reads from the environment; what the user has set stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not loopback:
        return
    # left unset, Ray writes ~/.ray/auth_token, and later clusters silently demand it
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # otherwise Ray replaces 127.0.0.1 by the network card's address and listens on every interface
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # after 5 seconds Serve kills the proxy that it waits for, and a deployment with it: too soon on a busy machine
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    if "ray" in sys.modules:  # it was imported before, and read the setting then
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] not in (
            "0",
            "false",
            "False",
        )


@contextmanager
def _locked_home() -> Iterator[Path]:
    """The home folder, held by one `up` or `down` at a time."""
    home = make_home()
    with open(home / "cluster.lock", "w") as lock:
        flock(lock, LOCK_EX)
        yield home


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises SystemExit in the block, so that it cleans up. Only the main thread may handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _choose_ports(port: int | None, dashboard_port: int | None) -> dict[str, int]:
    """Every port that would otherwise be a fixed one, by the name of its `ray start` option."""
    wanted = {"port": port, "dashboard-port": dashboard_port}
    wanted |= {"ray-client-server-port": None, "dashboard-agent-listen-port": None}
    held: dict[str, socket.socket] = {}
    try:
        for name, number in wanted.items():
            try:
                held[name] = socket.create_server(("127.0.0.1", number or 0))
            except (OSError, OverflowError) as error:
                raise ClusterError(
                    f"{name.replace('-', '_')}={number} cannot be used on 127.0.0.1 ({error}); choose another, or none"
                ) from error
        return {name: server.getsockname()[1] for name, server in held.items()}
    finally:
        for server in held.values():
            server.close()


def temporary_folder() -> Path:
    """Below Ray's own: Ray would otherwise note this cluster there as the machine's current one. And one for each home
    of each user: Ray starts a job's driver on the cluster that was noted last in the folder, be it another."""
    whose = hashlib.sha256(b"%d %s" % (os.getuid(), os.fsencode(caravan_home()))).hexdigest()[:8]
    # short: sockets lie below, of whose paths Ray takes up 68 bytes and the system allows 107
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", f"c{whose}")


def scratch_folder() -> str:
    """Where the processes of a cluster put what they would leave in the machine's temporary folder."""
    folder = temporary_folder() / "tmp"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{folder} cannot be made ({error.strerror}); set RAY_TMPDIR to a folder of yours"
        raise ClusterError(f"Ray did not start: {reason}") from error
    return str(folder)


def answers(url: str) -> bool:
    """Whether a Ray dashboard answers at `url` now."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between us and a cluster
    try:
        with opener.open(f"{url}/api/version", timeout=5) as reply:
            return "ray_version" in json.load(reply)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return False


def _await_dashboard(child: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not answers(url):
        if child.poll() is not None or time.monotonic() > deadline:
            raise _did_not_start(log_path)
        time.sleep(0.2)


def _did_not_start(log_path: Path) -> ClusterError:
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    return ClusterError(f"Ray did not start: {lines[-1] if lines else 'it said nothing'}; see {log_path}")
