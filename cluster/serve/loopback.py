"""Keeps a replica's inter-deployment server on the address of its Ray node.

Serve gives every replica a gRPC server for calls between deployments, binds it to every interface of the machine, and
unpickles whatever reaches it: anyone who can reach the port can run code. Ray has no setting for the address, so the
function that binds it is wrapped, in the replica's own process: with `caravan up` the node's address is 127.0.0.1, and
on a cluster it is the one by which Ray's other nodes know this node.

The user's constructor runs before Serve binds; the first health check runs after, and must pass before the replica
counts. So a Ray that has renamed the function, or does not call it any more, makes the replica fail to start instead
of leaving it open.
"""

from typing import Any

import ray
from ray.serve._private import replica as serve_replica

_BINDER = "add_port_to_grpc_server"
_ANY_ADDRESS = "[::]"


class NodeOnlyServer:
    """Construct it first thing in a deployment's constructor; call `check` from its `check_health`.

    Raises RuntimeError when this version of Ray binds its server in another way.
    """

    def __init__(self) -> None:
        self._bound = False
        bind = getattr(serve_replica, _BINDER, None)
        if bind is None:
            raise RuntimeError(_explain(f"has no ray.serve._private.replica.{_BINDER}"))

        def bind_to_node(server: Any, address: str, *args: Any) -> int:
            host, _, port = address.rpartition(":")
            if host != _ANY_ADDRESS:
                raise RuntimeError(_explain(f"binds a server to {address} and not to {_ANY_ADDRESS}"))
            node = ray.util.get_node_ip_address()
            bound_port = bind(server, f"[{node}]:{port}" if ":" in node else f"{node}:{port}", *args)
            self._bound = True
            return bound_port

        setattr(serve_replica, _BINDER, bind_to_node)

    def check(self) -> None:
        """Raises RuntimeError if Serve has started the replica without binding through us."""
        if not self._bound:
            raise RuntimeError(_explain(f"does not call ray.serve._private.replica.{_BINDER}"))


def _explain(what: str) -> str:
    return (
        f"Ray {ray.__version__} {what}, so a replica's gRPC server, which unpickles what it gets, cannot be kept off "
        "the network; install the Ray version that pyproject.toml asks for"
    )
