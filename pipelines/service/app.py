"""The service as an application of Ray Serve, on a cluster: `pipelines.service.app:build` with `ServiceSettings`.

One replica, for one process decides what starts. While Serve puts a new one in its place there may be two for a moment:
both would give a run the same job's id, and Ray takes an id once. Serve's proxy is in front of it, and reachable for
whoever can reach that, so a token is not optional here.
"""

from typing import Any  # no annotations as text here: Serve reads the type of `build`'s argument

import ray
from fastapi import FastAPI
from ray import serve
from ray.dashboard.utils import ray_address_to_api_server_url
from ray.serve import Application

from cluster.jobs import JobsApi
from cluster.serve.loopback import NodeOnlyServer
from cluster.storage import Store
from pipelines.service.api import build_api
from pipelines.service.loop import Orchestrator
from pipelines.service.resources import RayResources
from pipelines.service.settings import ServiceSettings

DEPLOYMENT = "runs"
_MAX_REQUESTS = 1000


class Runs:
    """The deployment's class."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._server = NodeOnlyServer()
        self._settings = settings
        self._webhooks = settings.told()
        api_url = ray_address_to_api_server_url(ray.get_runtime_context().gcs_address)
        self._orchestrator = Orchestrator(
            Store(settings.store),
            JobsApi(api_url),
            RayResources(api_url, settings.may_grow_to),
            queue=settings.queue(),
            recipes=settings.recipes(),
            on_event=self._webhooks.send,
        )
        self._orchestrator.start()

    def __del__(self) -> None:
        """Serve's shutdown hook."""
        self._orchestrator.close()
        self._webhooks.close()

    def check_health(self) -> None:
        """Serve's probe."""
        self._server.check()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._orchestrator, self._settings.token())


def build(args: ServiceSettings) -> Application:
    """The application for Serve. Raises ValueError without a token file."""
    if args.token_file is None:
        raise ValueError("token_file is missing: Serve's proxy is open to whoever reaches it; name a file with a token")
    deployment: Any = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=1,
        max_ongoing_requests=_MAX_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        max_constructor_retry_count=2,
    )(serve.ingress()(Runs))
    return deployment.bind(args)
