"""The application with an ingress whose event streams can be told to fail. Shipped to Ray's workers by itself.

Whoever wants a fault puts a file named `{kind}-{number}` into the folder that CARAVAN_FAULTS names; the first ingress
process whose stream has block events takes it away and does it:

    lost        the item's events do not come
    gap         one of its events does not come
    reordered   its events come after those of the item that follows
"""

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from ray.serve import Application
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cluster.serve import app, ingress
from cluster.serve.events import Subscriptions
from cluster.serve.messages import ReplicaUpdate
from cluster.serve.settings import BuildArgs

FOLDER = "CARAVAN_FAULTS"
KINDS = ("lost", "gap", "reordered")


class FaultyIngress(ingress.Ingress):
    def __init__(self, config: ingress.IngressConfig, engines: DeploymentHandle) -> None:
        ingress.Subscriptions = FaultySubscriptions  # type: ignore[misc]
        super().__init__(config, engines)


class FaultySubscriptions(Subscriptions):
    def _open(self, replica: str, *, renews: bool) -> "FaultyStream":  # type: ignore[override]
        return FaultyStream(super()._open(replica, renews=renews), Path(os.environ[FOLDER]))


class FaultyStream:
    def __init__(self, items: DeploymentResponseGenerator, folder: Path) -> None:
        self._items = items
        self._folder = folder

    def cancel(self) -> None:
        self._items.cancel()

    async def __aiter__(self) -> AsyncIterator[ReplicaUpdate]:
        held: ReplicaUpdate | None = None
        async for item in self._items:
            if held is not None:
                yield replace(held, events=())
                item, held = replace(item, events=item.events + held.events), None
            fault = self._ordered() if item.events else None
            if fault == "lost":
                item = replace(item, events=())
            elif fault == "gap":
                middle = len(item.events) // 2
                item = replace(item, events=item.events[:middle] + item.events[middle + 1 :])
            elif fault == "reordered":
                held = item
                continue
            yield item
        if held is not None:
            yield held

    def _ordered(self) -> str | None:
        for order in self._folder.iterdir():
            try:
                order.unlink()
            except FileNotFoundError:
                continue  # another process was quicker
            return order.name.partition("-")[0]
        return None


def build(args: BuildArgs) -> Application:
    """As `cluster.serve.app.build`."""
    app.Ingress = FaultyIngress  # type: ignore[misc]
    return app.build(args)
