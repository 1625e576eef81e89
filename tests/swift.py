"""A real S3 service for tests: a one-node OpenStack Swift with its s3api, on loopback, ended with its fixture.

Swift lives in a virtual environment of its own, made once under $CARAVAN_TEST_CACHE (default `.cache/swift` in the
repository). If it cannot be installed, the tests that need it fail with the reason; with CARAVAN_OFFLINE=1 they are
skipped instead.
"""

import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest

REQUIREMENTS = (
    "swift==2.38.3",
    "PyECLib==1.8.0",
    # what these two need
    "certifi==2026.10.18",
    "cffi==2.1.1",
    "charset-normalizer==3.5.2",
    "cryptography==50.0.2",
    "dnspython==2.9.2",
    "eventlet==0.41.3",
    "greenlet==3.5.6",
    "idna==3.20",
    "lxml==6.1.3",
    "PasteDeploy==3.1.0",
    "pycparser==3.12",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "xattr==1.3.0",
)
ACCESS_KEY, SECRET_KEY = "test:tester", "swift-test-secret"
_DEFAULT_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "swift"

_SERVER = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
disable_fallocate = true
log_address = {folder}/no-syslog
log_level = WARNING

"""
_STORAGE = """[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY = f"""[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck s3api tempauth bulk copy slo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
error_suppression_limit = 1000000

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:healthcheck]
use = egg:swift#healthcheck

[filter:s3api]
use = egg:swift#s3api
location = us-east-1

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {SECRET_KEY} .admin

[filter:bulk]
use = egg:swift#bulk

[filter:copy]
use = egg:swift#copy

[filter:slo]
use = egg:swift#slo
"""
# runs in Swift's own environment: one device, 16 partitions, one replica
_MAKE_RINGS = """
import json, os, sys
from swift.common.ring import RingBuilder
folder, ports = sys.argv[1], json.loads(sys.argv[2])
for kind in ("account", "container", "object"):
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    address = {"ip": "127.0.0.1", "port": ports[kind]}
    replication = {"replication_" + name: value for name, value in address.items()}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "device": "d1"} | address | replication)
    builder.rebalance(seed=1)
    builder.get_ring().save(os.path.join(folder, kind + ".ring.gz"))
"""


@dataclass
class Swift:
    """A running service of four servers: proxy, account, container and object."""

    folder: Path
    python: Path
    ports: dict[str, int]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.ports['proxy']}"

    def start(self, kind: str) -> None:
        """Start one server, or start it again after `kill`; what it had acknowledged is still there."""
        self.processes[kind] = process = _start(kind, self.folder, self.python)
        _await_healthy(kind, self.ports[kind], process, self.folder)

    def kill(self, kind: str) -> None:
        process = self.processes[kind]
        process.kill()
        process.wait()

    def uri(self, bucket: str, prefix: str = "") -> str:
        path = f"{bucket}/{prefix}" if prefix else bucket
        return f"s3://{path}?endpoint_override={self.endpoint}&scheme=http"

    def make_bucket(self) -> str:
        """A new, empty bucket's name."""
        from pyarrow.fs import S3FileSystem

        name = f"caravan-{uuid.uuid4().hex[:12]}"
        S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            endpoint_override=self.endpoint,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        ).create_dir(name)
        return name


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    with running_swift(tmp_path_factory.mktemp("swift")) as service:
        yield service


@contextmanager
def running_swift(folder: Path) -> Iterator[Swift]:
    """The service, with its credentials in this process's environment (and so in that of its children)."""
    python = _environment()
    ports = _free_ports("proxy", "account", "container", "object")
    _configure(folder, ports, python)
    service = Swift(folder, python, ports)
    names = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    before = {name: os.environ.get(name) for name in names}
    try:
        for kind in ports:
            service.start(kind)
        os.environ.update(names)
        yield service
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for kind in service.processes:
            service.kill(kind)


def _environment() -> Path:
    """The Python of Swift's environment, installed if need be; several test runs at once install it once."""
    if sys.platform != "linux":
        pytest.skip("Swift needs Linux")
    folder = Path(os.environ.get("CARAVAN_TEST_CACHE", _DEFAULT_CACHE)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    environment = folder / f"venv-{sys.version_info.major}.{sys.version_info.minor}"
    complete = environment / "complete.json"
    with open(folder / "lock", "w") as lock:
        flock(lock, LOCK_EX)
        if not complete.exists() or json.loads(complete.read_text()) != list(REQUIREMENTS):
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(environment)],
                [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", *REQUIREMENTS],
            ):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    _unavailable(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            complete.write_text(json.dumps(REQUIREMENTS))
    return environment / "bin" / "python"


def _unavailable(reason: str) -> None:
    if os.environ.get("CARAVAN_OFFLINE") == "1":
        pytest.skip("CARAVAN_OFFLINE=1, and Swift is not installed")
    pytest.fail(f"Swift, the S3 service of these tests, cannot be installed (CARAVAN_OFFLINE=1 skips them):\n{reason}")


def _free_ports(*names: str) -> dict[str, int]:
    sockets = {name: socket.create_server(("127.0.0.1", 0)) for name in names}
    ports = {name: server.getsockname()[1] for name, server in sockets.items()}
    for server in sockets.values():
        server.close()
    return ports


def _configure(folder: Path, ports: dict[str, int], python: Path) -> None:
    (folder / "devices" / "d1").mkdir(parents=True)
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = tests\n\n[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    for kind, port in ports.items():
        rest = _PROXY if kind == "proxy" else _STORAGE.format(kind=kind)
        (folder / f"{kind}.conf").write_text(_SERVER.format(port=port, user=user, folder=folder) + rest)
    subprocess.run([python, "-c", _MAKE_RINGS, str(folder), json.dumps(ports)], check=True)


def _start(kind: str, folder: Path, python: Path) -> subprocess.Popen[bytes]:
    with open(folder / f"{kind}.log", "wb") as log:
        return subprocess.Popen(
            [python, python.parent / f"swift-{kind}-server", folder / f"{kind}.conf"],
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also when the test run is killed


def _await_healthy(kind: str, port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/healthcheck")
            connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"Swift's {kind} server did not start:\n{(folder / f'{kind}.log').read_text()[-2000:]}")
