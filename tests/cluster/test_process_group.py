"""Where the rendezvous listens. That nothing of a training does elsewhere, tests/pipelines/test_job.py looks up."""

import socket

import pytest
import torch.distributed as dist

from cluster import processes
from cluster.process_group import interface_of, listening_store


def test_the_store_listens_on_its_address_alone() -> None:
    before = {found.port for found in processes.listeners([processes.this_process()])}
    store = listening_store("127.0.0.2")
    found = [found for found in processes.listeners([processes.this_process()]) if found.port not in before]
    assert [(at.host, at.port) for at in found] == [("127.0.0.2", store.port)]
    dist.TCPStore("127.0.0.2", store.port, is_master=False).set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", store.port), timeout=1)


def test_the_interface_of_an_address() -> None:
    loopback = interface_of("127.0.0.1")
    assert interface_of("127.0.0.7") == loopback
    assert loopback in [name for _, name in socket.if_nameindex()]
    with pytest.raises(OSError, match=r"no network interface .* 192\.0\.2\.1"):
        interface_of("192.0.2.1")
