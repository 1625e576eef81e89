"""A replica's own server: bound to the node's address, or not started at all."""

import pytest
from ray.serve._private import replica as serve_replica

from cluster.serve import loopback
from cluster.serve.loopback import NodeOnlyServer


@pytest.fixture
def bound(monkeypatch) -> list[str]:
    """The addresses that are really bound."""
    addresses: list[str] = []
    monkeypatch.setattr(
        serve_replica, "add_port_to_grpc_server", lambda server, address: addresses.append(address) or 7
    )
    return addresses


@pytest.mark.parametrize(("node", "address"), [("127.0.0.1", "127.0.0.1:0"), ("fd00::1", "[fd00::1]:0")])
def test_every_interface_becomes_the_nodes_address(bound, monkeypatch, node, address):
    monkeypatch.setattr(loopback.ray.util, "get_node_ip_address", lambda: node)
    server = NodeOnlyServer()
    assert serve_replica.add_port_to_grpc_server(None, "[::]:0") == 7
    assert bound == [address]
    server.check()


def test_a_ray_that_binds_in_another_way_fails_loudly(bound, monkeypatch):
    server = NodeOnlyServer()
    with pytest.raises(RuntimeError, match=r"binds a server to 0\.0\.0\.0:0"):
        serve_replica.add_port_to_grpc_server(None, "0.0.0.0:0")
    assert bound == []
    with pytest.raises(RuntimeError, match="does not call"):
        server.check()
    monkeypatch.delattr(serve_replica, "add_port_to_grpc_server")
    with pytest.raises(RuntimeError, match="has no"):
        NodeOnlyServer()
