"""All ingress processes of the application: Serve gives each request to one of them, and each knows only its own."""

from typing import Any

from prometheus_client.core import Metric as Family
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.serve.observer import Observer
from cluster.serve.record import RequestRecord
from cluster.serve.settings import INGRESS_DEPLOYMENT

TIMEOUT_S = 2.0


class Sibling:
    """What each of them answers; the base of the ingress deployment, which has its process's `_observer`."""

    _observer: Observer

    async def metric_families(self) -> list[Family]:
        return await self._observer.families()

    async def find_records(self, name: str) -> list[RequestRecord]:
        return self._observer.records.find(name)

    async def newest_records(self, limit: int) -> list[RequestRecord]:
        return self._observer.records.newest(limit)


class Siblings:
    """Asks every ingress process of an application, this one included."""

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._handle: DeploymentHandle | None = None

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """What each of them answers, but for one that has just died. `method`: of `Sibling`. Raises TimeoutError."""
        if self._handle is None:
            self._handle = serve.get_deployment_handle(INGRESS_DEPLOYMENT, self._app_name)
        answers = await self._handle.broadcast(method, *args).results_async(timeout_s=TIMEOUT_S, return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]
