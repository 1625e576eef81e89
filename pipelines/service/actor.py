"""The service on the cluster of `caravan up`: one detached actor, which Ray starts again when it dies.

Detached, it outlives the command that started it; `caravan down` ends it with the head. It has a fixed port on
loopback, which it takes again after a death, and all that it knows is in the store (loop.py).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from cluster.head import ClusterError
from cluster.storage import Store
from pipelines.service.settings import ServiceSettings
from pipelines.user_stage import not_installed

NAME, NAMESPACE = "caravan-service", "caravan"
HOST = "127.0.0.1"

_READY_SECONDS = 90.0
_PORT_SECONDS = 0.5
_log = logging.getLogger(__name__)


class ServiceActor:
    """Its constructor returns when the service answers; raises OSError if the port is taken.

    An actor that was started again waits for its port instead: of the one before it, the kernel may still hold it.
    """

    def __init__(self, settings: ServiceSettings, port: int) -> None:
        import ray
        from ray.dashboard.utils import ray_address_to_api_server_url

        from cluster.jobs import JobsApi
        from pipelines.service.api import build_api
        from pipelines.service.loop import Orchestrator
        from pipelines.service.resources import RayResources

        context = ray.get_runtime_context()
        listening = _bind(port, context.was_current_actor_reconstructed)
        api_url = ray_address_to_api_server_url(context.gcs_address)
        self._orchestrator = Orchestrator(
            Store(settings.store),
            JobsApi(api_url),
            RayResources(api_url, settings.may_grow_to),
            queue=settings.queue(),
            recipes=settings.recipes(),
            on_event=settings.told().send,
        )
        self._orchestrator.start()
        api = build_api(self._orchestrator, settings.token(), local_only=True)
        config = uvicorn.Config(api, log_config=None, access_log=False, server_header=False, ws="none")
        self._server = _Server(config)
        serving = threading.Thread(target=self._server.run, args=([listening],), name="http", daemon=True)
        serving.start()
        while serving.is_alive() and not self._server.started:
            time.sleep(0.01)
        if not self._server.started:
            raise ClusterError("the service's HTTP server ended as it began; its log in Ray's says why")

    def ready(self) -> bool:
        return self._server.started


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's signals are Ray's."""
        yield


def _bind(port: int, wait: bool) -> socket.socket:
    while True:
        try:
            return socket.create_server((HOST, port))
        except OSError as error:
            if not wait:
                raise
            _log.warning("port %s is taken (%s); trying again", port, error)
            time.sleep(_PORT_SECONDS)


def choose_port(port: int | None) -> int:
    """That port, or a free one. Raises ClusterError if it is taken."""
    try:
        with socket.create_server((HOST, port or 0)) as probe:
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"service_port={port} cannot be used on {HOST} ({error}); choose another, or none"
        ) from error


def start(address: str, settings: ServiceSettings, port: int) -> str:
    """Start the service on the cluster at `address`; returns its URL once it answers. Raises ClusterError."""
    from cluster import session

    settings.check_files()  # what is wrong with one is said here, and not in an actor's log
    with session.connect(address, modules=not_installed(settings.modules)):
        import ray

        actor: Any = (
            ray.remote(ServiceActor)
            .options(
                name=NAME, namespace=NAMESPACE, lifetime="detached", max_restarts=-1, max_task_retries=-1, num_cpus=0
            )
            .remote(settings, port)
        )
        try:
            ray.get(actor.ready.remote(), timeout=_READY_SECONDS)
        except (ray.exceptions.RayError, TimeoutError) as error:
            ray.kill(actor)
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise ClusterError(f"the service did not start: {reason}") from error
    return f"http://{HOST}:{port}"
