"""Ray's router classes talk to actors; here the actors' own classes, run in this process in virtual time."""

import asyncio
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree
from ray.serve.experimental.capacity_queue import CapacityQueue

from cluster.serve.replay.policies import ROUTERS
from cluster.serve.replay.simulated_serve import RPC_S, SimulatedReplica
from cluster.serve.replay.virtual_time import VirtualTimeLoop

TREE_CALL_S = 0.002
"""A call of the affinity router to its tree's actor, for which it blocks its event loop."""


class _Method:
    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote


class LocalTree:
    """The handle of the affinity router's tree: a real tree. Its answers are read with `ray.get` (`blocking_get`)."""

    def __init__(self) -> None:
        self._tree = PrefixTree()

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._tree, name))


class LocalQueue:
    """The handle of the capacity queue's actor: its real class, one message away."""

    def __init__(self, replicas: Sequence[SimulatedReplica]) -> None:
        cls = CapacityQueue.__ray_metadata__.modified_class  # type: ignore[attr-defined]  # what Ray would instantiate
        self._queue = cls(acquire_timeout_s=30.0, token_ttl_s=None, _enable_long_poll=False)
        for replica in replicas:
            self._queue.register_replica(replica.name, replica.max_ongoing_requests)
        self.acquire = _Method(self._acquire)
        self.release = _Method(self._release)

    def _acquire(self) -> asyncio.Task[str | None]:
        return asyncio.get_running_loop().create_task(self._acquire_later())

    async def _acquire_later(self) -> str | None:
        await asyncio.sleep(RPC_S)
        name = await self._queue.acquire()
        await asyncio.sleep(RPC_S)
        return name

    def _release(self, name: str) -> None:
        asyncio.get_running_loop().call_later(RPC_S, self._queue.release, name)


@contextmanager
def blocking_get() -> Iterator[None]:
    """Inside, the affinity router's `ray.get` takes virtual time, in which its event loop does nothing else."""
    module = importlib.import_module(ROUTERS["prefix_affinity"].rpartition(".")[0])
    ray = module.ray
    module.ray = SimpleNamespace(get=_get)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.ray = ray  # type: ignore[attr-defined]


def _get(answer: Any) -> Any:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.block(TREE_CALL_S)
    return answer
