"""torch.distributed for the workers of a Ray Train run, on the nodes' own addresses and no others.

Ray's own set-up lets torch's rendezvous store (on rank 0) and gloo listen on every interface, without authentication:
whoever reaches the machine could read and write what the ranks tell each other. Here rank 0 binds the store's socket
to the address by which Ray knows its node, and gloo and NCCL are told that address's interface. On a loopback cluster
everything is on loopback.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from ipaddress import ip_address

import torch
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

_TIMEOUT = timedelta(minutes=30)
"""Of a collective; `train.hang_seconds` comes first."""


class _NoProcessGroup(Backend):
    """Leaves torch.distributed to the workers."""

    share_cuda_visible_devices = True


class OwnProcessGroup(TorchConfig):
    """For a TorchTrainer whose workers enter `process_group` themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoProcessGroup


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Called by every worker of a Ray Train run: the default process group while the block runs; yields its device.

    The group is left as it is when the block raises: the worker ends then, and a collective that others wait in could
    not be ended in order.
    """
    import ray.train
    import ray.train.collective
    import ray.util
    from ray.train.torch import get_device

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    address = ray.util.get_node_ip_address()
    interface = interface_of(address)
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(context.get_local_rank()),
            "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
            "NODE_RANK": str(context.get_node_rank()),
        }
    )
    # What the user has set stays. NCCL takes a name for the beginning of names, but for the equals sign.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    device = get_device()
    assert isinstance(device, torch.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    server: dist.TCPStore | None = None
    if rank == 0:
        server = listening_store(address)
    host, port = ray.train.collective.broadcast_from_rank_zero((address, server.port) if server else None)
    store = server or dist.TCPStore(host, port, is_master=False, timeout=_TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    yield device
    dist.destroy_process_group()


def listening_store(address: str) -> dist.TCPStore:
    """A rendezvous store that listens on a free port of this address only."""
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    listener = socket.socket(family)
    listener.bind((address, 0))
    listener.listen(socket.SOMAXCONN)
    port = listener.getsockname()[1]
    # the store takes the socket over and closes it
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listener.detach()
    )


def interface_of(address: str) -> str:
    """The name of the network interface that has this address; for any address of loopback that of loopback.

    Raises OSError if none has it.
    """
    import psutil  # Ray's own copy, see cluster/processes.py

    wanted = ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        for at in addresses:
            if at.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            own = ip_address(at.address.partition("%")[0])
            if own == wanted or (own.is_loopback and wanted.is_loopback and own.version == wanted.version):
                return name
    raise OSError(f"no network interface of this machine has the address {address}, by which Ray knows it")
