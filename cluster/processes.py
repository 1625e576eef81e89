"""Processes of this machine: who is alive, what they listen on, and how to end a tree of them. Needs no privileges.

psutil comes with Ray: importing ray puts Ray's own copy on the path. It is imported late because ray takes a second.
"""

import logging
import time
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listener:
    """A TCP socket that accepts connections."""

    pid: int
    process: str
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        address = ip_address(self.host)
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            return address.ipv4_mapped.is_loopback
        return address.is_loopback


def find(pid: int, started: float | None = None) -> Any | None:
    """The psutil.Process `pid`; None if it has ended.

    `started`, its start in seconds since the epoch, tells it from a later process that was given the same number.
    """
    psutil = _psutil()
    try:
        process = psutil.Process(pid)
        is_other = started is not None and abs(process.create_time() - started) > 2
        return None if is_other or process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def gone() -> type[Exception]:
    """What asking about a process raises once it has ended."""
    return _psutil().NoSuchProcess


def tree(process: Any) -> list[Any]:
    """`process` and all of its descendants, as they are now."""
    try:
        return [process, *process.children(recursive=True)]
    except _psutil().NoSuchProcess:
        return []


def await_end(processes: list[Any], grace: float) -> int:
    """Wait `grace` seconds for the processes to end, then kill those that have not; returns how many it killed."""
    psutil = _psutil()
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=10)
    return len(alive)


def end_tree(process: Any, grace: float) -> int:
    """Ask `process` to end and wait; kill what is left of its tree after `grace` seconds; returns the size of the tree.

    Descendants are noted before the signal: one whose parent has died cannot be traced any more.
    """
    members = tree(process)
    try:
        process.terminate()
    except _psutil().NoSuchProcess:
        pass
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and find(process.pid, process.create_time()) is not None:
        members += [late for late in tree(process) if late not in members]
        time.sleep(0.1)
    killed = await_end(members, max(1.0, deadline - time.monotonic()))
    if killed:
        logger.warning("%d of %d processes did not end by themselves and were killed", killed, len(members))
    return len(members)


def listeners(processes: list[Any]) -> list[Listener]:
    """Every TCP socket that the processes listen on."""
    psutil = _psutil()
    found = []
    for process in processes:
        try:
            sockets = process.net_connections(kind="tcp")
            name = process.name()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for connection in sockets:
            if connection.status == psutil.CONN_LISTEN:
                found.append(Listener(process.pid, name, connection.laddr.ip, connection.laddr.port))
    return found


def this_process() -> Any:
    return _psutil().Process()


def _psutil() -> Any:
    import ray  # noqa: F401  (its import makes psutil importable)

    import psutil  # isort: skip

    return psutil
