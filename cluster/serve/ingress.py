"""The HTTP face: OpenAI's API in front of the engine replicas.

Each request is templated and tokenised here, once; its block hashes go with it to the router, which runs in this
process and knows every replica's cache. A request's last chunk is not sent before this process's index has applied
the events of that request, so that whoever reads an answer and asks the next question finds the router informed.

OpenAI's endpoints are put together in routes.py; here are the operator's.
Every POST, the one without a body as well, must say `Content-Type: application/json`: see `require_json`.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.serve.access import Access
from cluster.serve.answer import Answers
from cluster.serve.api_error import ApiError
from cluster.serve.autoscaling import Autoscaling
from cluster.serve.channel import Inbox, ReplicaLost
from cluster.serve.cost import CostCoefficients
from cluster.serve.engine_client import EngineClient
from cluster.serve.events import Subscriptions
from cluster.serve.gate import Gate
from cluster.serve.listener import Listener
from cluster.serve.loopback import NodeOnlyServer
from cluster.serve.metrics import RaySink
from cluster.serve.observer import Observer
from cluster.serve.observing import Observing
from cluster.serve.openapi import add_route
from cluster.serve.refusals import Refusals
from cluster.serve.request_body import require_json
from cluster.serve.rest import ServeClient
from cluster.serve.routes import add_openai_routes
from cluster.serve.served_model import ServedModel
from cluster.serve.settings import IngressOptions
from cluster.serve.siblings import Sibling, Siblings
from cluster.serve.state import routing_state
from cluster.serve.weights import fetch_model
from cluster.session import node_folder
from llama.tokenizer import Tokenizer

T = TypeVar("T")

_COMPARISONS = 10


@dataclass(frozen=True)
class IngressConfig:
    """What the ingress needs to start. `family`: of its replicas. `served_name`: the model's name in the API."""

    model: str
    family: str
    served_name: str
    cost: CostCoefficients


class Ingress(Sibling):
    """The ingress deployment. Deploy it with `cluster.serve.app.build`."""

    def __init__(self, config: IngressConfig, engines: DeploymentHandle) -> None:
        self._server = NodeOnlyServer()
        self._access = Access(lambda: serve.get_replica_context().world_size)
        directory = fetch_model(config.model, node_folder("models"))
        self._state = routing_state(serve.get_replica_context().app_name)
        self._state.set_coefficients(config.cost)
        self._model = ServedModel(config.served_name, config.family, Tokenizer.load(directory), self._state)
        inbox = Inbox(serve.get_replica_context().replica_id.unique_id)
        self._observer = Observer(self._state, model=config.served_name, ingress=inbox.source)
        self._observer.start(RaySink((config.served_name, inbox.source)))
        self._client = EngineClient(engines, self._state, inbox, config.family, self._observer)
        process = ray.get_runtime_context().current_actor
        self._subscriptions = Subscriptions(engines, self._state, inbox, process)
        self._subscriptions.start()
        self._options = IngressOptions()
        autoscaling = Autoscaling(self._state, lambda: self._options, _leads, ServeClient.of_this_cluster)
        self._observer.wanted_replicas = lambda: autoscaling.wanted
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(autoscaling.run()), loop.create_task(self._access.follow())]

    async def __del__(self) -> None:
        """Serve's shutdown hook: the replicas, which drain after us, must not wait for our subscriptions."""
        for task in self._tasks:
            task.cancel()
        self._observer.stop()
        await self._listener.close()
        await self._subscriptions.stop()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's call when the ingress starts, before it is asked anything, and when other options are declared.

        Raises KeysError when the file of keys cannot be read.
        """
        options = IngressOptions(**user_config)
        self._access.set(options.api_keys, options.cors_origins)
        self._model.max_wait_s = options.max_wait_s
        self._options = options
        await self._listener.listen(options.listen)

    def check_health(self) -> None:
        """Serve's probe."""
        self._server.check()

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = FastAPI(title="Caravan", docs_url=None, redoc_url=None)
        add_openai_routes(api, self._model, Answers(self._client))
        add_route(api, "GET", "/ready", self.ready, statuses=(200, 503))
        add_route(api, "GET", "/caravan/replicas", self.replicas)
        add_route(api, "GET", "/caravan/replicas/{replica_id}/cache", self.cache)
        add_route(api, "POST", "/caravan/replicas/{replica_id}/flush", self.flush)
        siblings = Siblings(serve.get_replica_context().app_name)
        Observing(self._observer, siblings, self._state).add_routes(api)
        api.add_middleware(Gate, access=self._access)  # type: ignore[arg-type]
        api.add_middleware(Refusals, refused=self._observer.refused)  # type: ignore[arg-type]
        self._listener = Listener(api)
        return api

    # -- the operator's endpoints --------------------------------------------------------------------------

    async def ready(self) -> Response:
        """200 when every replica that Serve routes to is followed, 503 before that. Nobody needs a key for it."""
        replicas = [
            {
                "replica": status.replica,
                "fresh": status.fresh,
                "revision": None if status.info is None else status.info.revision,
            }
            for status in self._state.status()
        ]
        ready = bool(replicas) and all(entry["fresh"] for entry in replicas)
        return JSONResponse({"ready": ready, "replicas": replicas}, 200 if ready else 503)

    async def replicas(self) -> Response:
        """Every replica as this ingress sees it: process, load, cached blocks, freshness of its event feed."""
        return JSONResponse({"replicas": [asdict(status) for status in self._state.status()]})

    async def cache(self, replica_id: str) -> Response:
        """Compares one replica's prefix cache with what this ingress's index says of it: `missing` and `stale` blocks,
        both 0 unless there is a defect. 409 while it changes too fast to be compared."""
        self._check_replica(replica_id)
        for _ in range(_COMPARISONS):
            snapshot = await _unless_lost(replica_id, self._client.cache(replica_id))
            await self._state.wait_applied(replica_id, snapshot.seq, timeout_s=1.0)
            difference = self._state.difference(replica_id, snapshot)
            if difference is not None:
                missing, stale = difference
                found = {"replica": replica_id, "blocks": len(snapshot.hashes), "missing": missing, "stale": stale}
                return JSONResponse(found)
        raise ApiError(409, f"The cache of replica {replica_id!r} changes all the time; ask when it is quiet.")

    async def flush(self, replica_id: str, http: Request) -> Response:
        """Empties one replica's prefix cache and waits until this ingress has heard of it."""
        require_json(http)
        self._check_replica(replica_id)
        seq = await _unless_lost(replica_id, self._client.flush(replica_id))
        applied = await self._state.wait_applied(replica_id, seq, timeout_s=1.0)
        return JSONResponse({"replica": replica_id, "event_seq": seq, "applied": applied})

    def _check_replica(self, replica_id: str) -> None:
        if replica_id not in self._state.replicas:
            message = f"There is no replica {replica_id!r}; see /caravan/replicas."
            raise ApiError(404, message, param="replica_id", code="replica_not_found")


async def _unless_lost(replica_id: str, answer: Awaitable[T]) -> T:
    try:
        return await answer
    except ReplicaLost as error:
        message = f"Replica {replica_id!r} has just left."
        raise ApiError(503, message, code="replica_lost", kind="server_error") from error


def _leads() -> bool:
    """Whether this is the first of the ingress processes; Serve keeps the ranks without gaps."""
    return serve.get_replica_context().rank.rank == 0
