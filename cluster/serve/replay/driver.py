"""Sends a trace's requests to replicas on Serve and notes when their answers come: one process for each policy.

It holds the deployment handle, so the policy's router runs in it, on Serve's own router thread. Our policy gets what
serving uses: `EngineClient`, `Subscriptions` and the process's `RoutingState`; Ray's get plain calls.
"""

import asyncio
import contextvars
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter

from cluster.serve.api_error import ApiError
from cluster.serve.channel import Inbox
from cluster.serve.engine_client import EngineClient
from cluster.serve.events import Subscriptions
from cluster.serve.loopback import NodeOnlyServer
from cluster.serve.messages import GenerateRequest
from cluster.serve.replay.measure import Outcome, Replay
from cluster.serve.replay.picks import time_picks
from cluster.serve.replay.policies import Variant
from cluster.serve.replay.replicas import FAMILY
from cluster.serve.replay.requests import make_request
from cluster.serve.replay.timing import StepTime
from cluster.serve.replay.trace import Prompts, TraceRequest
from cluster.serve.state import routing_state
from llama.bench.workload import percentile

LAG_PROBE_S = 0.02
_START_S = 60.0


class Sender(Protocol):
    """One way of getting a request answered. `lags_s`: see `Replay`."""

    lags_s: list[float]

    async def ready(self, replicas: int) -> None:
        """Returns when requests are routed to so many replicas."""

    async def send(self, request: GenerateRequest, session_id: str, outcome: Outcome) -> None:
        """Fills in what becomes of it. Raises when it is refused."""


class Driver:
    """A deployment of one process."""

    def __init__(self, engines: DeploymentHandle, variant: Variant, replicas: int) -> None:
        self._server = NodeOnlyServer()
        self._variant = variant
        self._replicas = replicas
        self._picks_s: list[float] = []
        self._sender: Sender
        if variant.policy == "caravan":
            self._sender = _Caravan(engines, self._picks_s)
        else:
            self._sender = _Peer(engines, variant, self._picks_s)

    async def ready(self) -> None:
        """Returns when the replicas are routed to."""
        await self._sender.ready(self._replicas)
        self._picks_s.clear()

    async def replay(
        self, requests: Sequence[TraceRequest], start: float, tokens_per_id: int, block_size: int, weights_id: str
    ) -> Replay:
        """Sends the requests, the first at `start` on the machine's monotonic clock."""
        prompts = Prompts(tokens_per_id)
        lags: list[float] = []
        probe = asyncio.create_task(_probe(lags))
        cpu = time.process_time()

        async def one(number: int, traced: TraceRequest) -> Outcome:
            await asyncio.sleep(start + traced.at - time.monotonic())
            outcome = Outcome(traced.at, prompts.length(traced))
            request = make_request(self._variant.policy, number, traced, prompts, block_size, weights_id)
            try:
                await self._sender.send(request, f"session-{traced.session}", outcome)
            except (RayTaskError, ApiError) as error:
                outcome.error = str(error).splitlines()[-1]
            for name in ("first_token", "ended"):
                if getattr(outcome, name) is not None:
                    setattr(outcome, name, getattr(outcome, name) - start)
            missing = outcome.prompt_tokens - outcome.cached_tokens
            outcome.work_s = StepTime().work_s(missing, outcome.prompt_tokens, prompts.output(traced), 2048)
            return outcome

        outcomes = await asyncio.gather(*(one(number, traced) for number, traced in enumerate(requests)))
        probe.cancel()
        seconds = time.monotonic() - start
        extra = {
            "loop_lag_ms_p99": percentile(lags, 0.99) * 1e3,
            "driver_cpu": (time.process_time() - cpu) / seconds,
        }
        return Replay(list(outcomes), self._replicas, seconds, self._picks_s, self._sender.lags_s, extra)

    def check_health(self) -> None:
        """Serve's probe."""
        self._server.check()


class _Caravan:
    """As an ingress does it."""

    def __init__(self, engines: DeploymentHandle, picks_s: list[float]) -> None:
        context = serve.get_replica_context()
        self._state = routing_state(context.app_name)
        self._inbox = Inbox(context.replica_id.unique_id)
        self._client = EngineClient(engines, self._state, self._inbox, FAMILY)
        process = ray.get_runtime_context().current_actor
        self._subscriptions = Subscriptions(engines, self._state, self._inbox, process)
        self._picks_s = picks_s
        self.lags_s: list[float] = []

    async def ready(self, replicas: int) -> None:
        self._subscriptions.start()
        async with asyncio.timeout(_START_S):
            while sum(status.fresh for status in self._state.status()) < replicas:
                await asyncio.sleep(0.1)

    async def send(self, request: GenerateRequest, session_id: str, outcome: Outcome) -> None:
        async with aclosing(self._client.stream(request)) as chunks:
            async for item in chunks:
                if outcome.first_token is None:
                    outcome.first_token = time.monotonic()
                    outcome.replica, outcome.cached_tokens = item.replica, item.chunk.num_cached_tokens
                    outcome.predicted_tokens = item.predicted_cached_tokens
                    selection = self._state.selection(request.request_id)
                    if selection is not None:
                        self._picks_s.append(selection.seconds)
        outcome.ended = time.monotonic()
        await self._state.wait_applied(item.replica, item.chunk.event_seq, 1.0)
        self.lags_s.append(time.monotonic() - outcome.ended)


class _Peer:
    """A plain call through one of Ray's routers."""

    def __init__(self, engines: DeploymentHandle, variant: Variant, picks_s: list[float]) -> None:
        self._policy = variant.policy
        _time_picks(variant.policy, picks_s)
        self._generate = engines.options(method_name="generate")
        self.lags_s: list[float] = []

    async def ready(self, replicas: int) -> None:
        # Not all at once: a router learns of its replicas, and fills its queue-length cache, with the first calls.
        for number in range(2 * replicas):
            await self.send(
                make_request(self._policy, -1 - number, TraceRequest(0.0, 1, 1, (number,)), Prompts(), 512, ""),
                f"warm-{number}",
                Outcome(0.0, 1),
            )

    async def send(self, request: GenerateRequest, session_id: str, outcome: Outcome) -> None:
        handle = self._generate.options(session_id=session_id)
        # A context of its own: Serve tells calls apart by the request they are made in, and siblings would hang.
        answered = await contextvars.Context().run(handle.remote, request)
        outcome.replica, outcome.cached_tokens = answered.replica, answered.cached_tokens
        outcome.first_token, outcome.ended = answered.first_token, answered.ended


def _time_picks(policy: str, picks_s: list[float]) -> None:
    """Notes how long each pick takes of the routers that this process is going to make.

    Serve ships a router's class by value, so it is not the one that can be imported here; its base class is.
    """
    make = RequestRouter.__init__

    def timed_init(router: RequestRouter, *args: Any, **kwargs: Any) -> None:
        make(router, *args, **kwargs)
        time_picks(router, policy, picks_s)

    RequestRouter.__init__ = timed_init  # type: ignore[assignment, method-assign]


async def _probe(lags: list[float]) -> None:
    while True:
        began = time.monotonic()
        await asyncio.sleep(LAG_PROBE_S)
        lags.append(time.monotonic() - began - LAG_PROBE_S)
