"""A connection to Ray: a running cluster, the one of `caravan up`, or an own local one that ends with the session.

Every socket of a Ray that is started here is on loopback, and so are those of a training on it
(cluster/process_group.py). Ray reads its settings when it is first imported, so this module sets them, and imports ray,
inside its functions.
"""

import atexit
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster import processes
from cluster.head import (
    JOB_CONFIG,
    ClusterError,
    ClusterRecord,
    down,
    prepare_environment,
    recorded,
    scratch_folder,
    temporary_folder,
    up,
)
from cluster.location import checked

__all__ = [
    "ClusterError",
    "ClusterRecord",
    "Session",
    "connect",
    "down",
    "node_folder",
    "recorded",
    "runtime_env",
    "up",
]

PACKAGES = ("llama", "cluster", "pipelines")

_NODE_FOLDER = "caravan"


@dataclass
class Session:
    """This process's connection to a Ray cluster; a context manager.

    `owned`: the cluster was started by this session and ends with it.
    """

    address: str
    owned: bool
    dashboard_url: str | None
    _disconnects: bool = True
    _open: bool = field(default=True, init=False)

    def close(self) -> None:
        """Disconnect; an owned cluster is ended, and no process of it is left when this returns."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        if not self._disconnects:
            return
        import ray

        if not self.owned:
            ray.shutdown()
            return
        own, folder = ray_processes(), _session_folder() / _NODE_FOLDER
        ray.shutdown()
        # the dashboard's helpers outlive it for some seconds
        processes.await_end(own, grace=10)
        shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def connect(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    dashboard: bool = True,
    modules: Sequence[str] = (),
) -> Session:
    """Connect this process to Ray.

    `address`: `host:port` of a cluster that this machine is a node of; `auto`, a cluster that runs on this machine,
    whoever started it; `local`, a new one of this session's own. None: RAY_ADDRESS, else the cluster of `up`, else
    `local`. `num_cpus` and `num_gpus` are what a local one has, and refused for a running one; `dashboard`: whether a
    local one gets a dashboard.

    Workers import our packages, and the top-level `modules`, as this process has them, except inside a job that was
    submitted with packages of its own.
    What they print stays in Ray's own log files. A process that is connected already shares that connection, and
    closing such a session leaves it open.

    Raises ClusterError.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        _refuse_sizes(num_cpus, num_gpus, "that this process is connected to")
        return _share(address)
    recorded_address = None
    if address is None:
        address = os.environ.get("RAY_ADDRESS") or None
    if address is None and (record := recorded()) is not None:
        address = recorded_address = record.address
    if address is None or address == "local":
        return _start_local(num_cpus, num_gpus, dashboard, modules)
    _refuse_sizes(num_cpus, num_gpus, f"at {address}")
    try:
        return _join(address, modules)
    except ClusterError as error:
        if recorded_address is None:
            raise
        raise ClusterError(f"{error} (the cluster of `caravan up`; `caravan down` ends what is left of it)") from error


def runtime_env(modules: Sequence[str] = ()) -> dict[str, Any]:
    """What makes workers import llama, cluster and pipelines as they are here, and not what a node has installed; and
    other top-level `modules` as well.

    Raises ClusterError if one of them is not to be found here.
    """
    places = []
    for name in (*PACKAGES, *modules):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ClusterError(f"package {name!r} is not installed here, so workers cannot get it; pip install it")
        folders = list(spec.submodule_search_locations or ())
        places.append(folders[0] if folders else str(spec.origin))
    return {"py_modules": places, "excludes": ["**/__pycache__/**", "**/*.pyc"]}


def node_folder(name: str) -> Path:
    """The folder `name`, for copies that all of this node's workers share; it is made if it does not exist.

    It lies in the folder of this node's Ray session and goes with that: with the end of a session that owns its
    cluster, else when Ray's temporary folder is cleared. Needs a connection to Ray. Raises ValueError for a bad name.
    """
    if "/" in checked(name):
        raise ValueError(f"name={name!r} is not a plain name; leave out the '/'")
    folder = _session_folder() / _NODE_FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ray_processes() -> list[Any]:
    """The processes of a local cluster that this process owns (psutil.Process)."""
    import ray

    package = os.path.dirname(ray.__file__)
    roots = []
    for child in processes.this_process().children():
        process = processes.find(child.pid)
        if process is not None and any(package in word for word in process.cmdline()):
            roots.append(process)
    return [member for root in roots for member in processes.tree(root)]


# -- inside


def _session_folder() -> Path:
    """This node's folder of the Ray session: `/tmp/ray/session_...`, which holds `sockets/plasma_store`."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return Path(node["ObjectStoreSocketName"]).parent.parent


def _refuse_sizes(num_cpus: int | None, num_gpus: int | None, which: str) -> None:
    for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if value is not None:
            raise ClusterError(
                f"{name}={value} cannot change the running cluster {which}; leave it out, or use address 'local'"
            )


def _start_local(num_cpus: int | None, num_gpus: int | None, dashboard: bool, modules: Sequence[str]) -> Session:
    prepare_environment(loopback=True)
    import ray

    try:
        with _scratch_below_ray():
            context = ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                runtime_env=runtime_env(modules),
                logging_level=logging.WARNING,
                log_to_driver=False,
                _temp_dir=str(temporary_folder()),
            )
    except (RuntimeError, ValueError, OSError) as error:
        ray.shutdown()
        raise ClusterError(f"a local Ray could not be started: {error}") from error
    return _session(context.dashboard_url, owned=True)


@contextmanager
def _scratch_below_ray() -> Iterator[None]:
    """What is started inside the block keeps its temporary files below Ray's folder."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = scratch_folder()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def _join(address: str, modules: Sequence[str]) -> Session:
    if "://" in address:
        raise ClusterError(
            f"address {address!r} is not host:port; give the cluster's own address (not its dashboard or Ray Client), "
            "from one of its nodes, or send the work as a job: caravan submit"
        )
    if address == "auto":
        address = find_local()
    prepare_environment(loopback=is_loopback(address))
    import ray

    # Ray itself keeps trying an address where nothing listens for more than a minute
    check_reachable(address)
    try:
        context = ray.init(
            address=address,
            runtime_env=None if _job_has_packages() else runtime_env(modules),
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except (RuntimeError, ValueError, OSError) as error:
        ray.shutdown()
        raise ClusterError(
            f"cannot join the cluster at {address}: {error}; run this on one of its nodes, or send it: caravan submit"
        ) from error
    return _session(context.dashboard_url, owned=False)


def _job_has_packages() -> bool:
    """Whether this process is the entrypoint of a submitted job that came with packages for its workers."""
    config = json.loads(os.environ.get(JOB_CONFIG) or "{}")
    return bool((config.get("runtime_env") or {}).get("py_modules"))


def _session(dashboard: str | None, owned: bool) -> Session:
    import ray

    session = Session(ray.get_runtime_context().gcs_address, owned, f"http://{dashboard}" if dashboard else None)
    atexit.register(session.close)
    return session


def _share(address: str | None) -> Session:
    import ray

    current = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", current):
        raise ClusterError(f"this process is connected to {current} already; close that session before {address}")
    return Session(current, False, None, _disconnects=False)


def find_local() -> str:
    """The `host:port` of a cluster that runs on this machine. Raises ClusterError if there is none."""
    prepare_environment(loopback=True)
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return canonicalize_bootstrap_address_or_die("auto")
    except ConnectionError as error:
        raise ClusterError("no Ray cluster runs on this machine; start one: caravan up") from error


def is_loopback(address: str) -> bool:
    """Whether the host of `host:port` is this machine's loopback."""
    host = address.rpartition(":")[0]
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_reachable(address: str) -> None:
    """Raises ClusterError unless something listens at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except ValueError as error:
        raise ClusterError(f"address {address!r} is not host:port") from error
    except OSError as error:
        raise ClusterError(
            f"no cluster answers at {address} ({error}); check the address, or start one: caravan up"
        ) from error
