"""What can be refused before a deployment starts anything: a taken port, too few resources."""

import socket
from math import floor
from typing import Any

from cluster.serve.errors import NoRoom, PortTaken
from cluster.serve.settings import BuildArgs

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_port(details: dict[str, Any], host: str, port: int) -> None:
    """Raises PortTaken unless Serve, told of by `details`, can answer on `host` and `port` of this machine."""
    running = details["http_options"] if details.get("proxies") else None
    if running is None:
        check_port_free(host, port)
    elif (running["host"], running["port"]) != (host, port):
        raise PortTaken(
            f"Serve already listens on {running['host']}:{running['port']} in this cluster; "
            f"deploy there, or undeploy before using {host}:{port}"
        )


def check_port_free(host: str, port: int) -> None:
    """Raises PortTaken when another process listens there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the proxy binds: a socket in TIME_WAIT does not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"port {port} on {host} is taken ({error.strerror})"
            raise PortTaken(f"{reason}; choose another: --port, or serve.port in the recipe") from error


def proxy_listens(details: dict[str, Any]) -> bool:
    """Whether the proxy that `details` told of still has its port, as far as this machine can see."""
    http = details["http_options"] if details.get("proxies") else None
    if http is None or http["host"] not in LOOPBACK:
        return False
    try:
        check_port_free(http["host"], http["port"])
    except PortTaken:
        return True
    return False


def check_room(args: BuildArgs, replicas: int, nodes: list[dict[str, float]]) -> None:
    """Raises NoRoom when the nodes, each given by all that it has in Ray's names, cannot hold the replicas even empty.

    A cluster that grows by itself is judged by what it has now.
    """
    needs = {"CPU": args.cpus_per_replica, "GPU": args.gpus_per_replica}
    if args.accelerator_type is not None:
        needs[f"accelerator_type:{args.accelerator_type}"] = 0.001  # what Ray asks for, to name a kind of node
    needs = {name: amount for name, amount in needs.items() if amount > 0}
    if not needs:
        return
    room = sum(min(floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in needs.items()) for node in nodes)
    if room < replicas:
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount >= 0.01)
        if args.accelerator_type is not None:
            wanted += f" of type {args.accelerator_type}"
        raise NoRoom(
            f"replicas={replicas} of {wanted} each do not fit; the cluster holds {room} of them: ask for fewer, or for "
            "less with --cpus-per-replica and --gpus-per-replica, or add nodes"
        )
