"""One policy in virtual time: production router, index, ledger and cost, Ray's own classes, modelled engines."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from ray.serve._private.common import DeploymentID
from ray.serve.request_router import RequestRouter

from cluster.serve.broadcast import HEARTBEAT_S
from cluster.serve.cost import CostCoefficients
from cluster.serve.replay import virtual_time
from cluster.serve.replay.feed import Feed
from cluster.serve.replay.local_actors import LocalQueue, LocalTree, blocking_get
from cluster.serve.replay.measure import Outcome, Replay
from cluster.serve.replay.modelled_engine import ModelledEngine
from cluster.serve.replay.picks import time_picks
from cluster.serve.replay.policies import YARDSTICKS, Variant, router_class
from cluster.serve.replay.requests import make_request
from cluster.serve.replay.simulated_serve import (
    Refused,
    SimulatedHandle,
    SimulatedReplica,
    make_router,
    seed_routers,
)
from cluster.serve.replay.timing import MODELLED_ENGINE, StepTime
from cluster.serve.replay.trace import Prompts, TraceRequest
from cluster.serve.replay.yardsticks import Omniscience, YardstickRouter, oracle, perfect
from cluster.serve.state import RoutingState
from llama.engine import Chunk, EngineConfig

DEPLOYMENT = DeploymentID("engine", "replay")


@dataclass(frozen=True)
class Scenario:
    """What every policy is given. `names` of the replicas, on which a consistent hash and our ties depend; without any
    they are random, as Serve's are."""

    requests: Sequence[TraceRequest]
    replicas: int = 4
    engine: EngineConfig = MODELLED_ENGINE
    timing: StepTime = field(default_factory=StepTime)
    cost: CostCoefficients = field(default_factory=CostCoefficients)
    seed: int = 0
    names: Sequence[str] = ()


def simulate(scenario: Scenario, variant: Variant) -> Replay:
    """Replays the scenario under one policy; the same arguments give the same result."""
    seed_routers(scenario.seed)
    return virtual_time.run(Simulation(scenario, variant).run())


class Simulation:
    """One run; `state` (of our own policy only) and `engines`, by replica, can be looked at afterwards."""

    def __init__(self, scenario: Scenario, variant: Variant) -> None:
        self._scenario = scenario
        self._variant = variant
        self._prompts = Prompts()
        self._picks_s: list[float] = []
        self._lags_s: list[float] = []

    async def run(self) -> Replay:
        scenario, variant = self._scenario, self._variant
        self._loop = asyncio.get_running_loop()
        self.state = RoutingState(scenario.cost, clock=self._loop.time) if variant.policy == "caravan" else None
        engines = [ModelledEngine(scenario.engine, scenario.timing) for _ in range(scenario.replicas)]
        draw = random.Random(f"replicas {scenario.seed}")
        names = scenario.names or [f"{draw.getrandbits(32):08x}" for _ in engines]
        replicas = [
            SimulatedReplica(name, DEPLOYMENT, engine, variant.max_ongoing)
            for name, engine in zip(names, engines, strict=True)
        ]
        self.engines = {replica.name: replica.engine for replica in replicas}
        with blocking_get() if variant.policy == "prefix_affinity" else nullcontext():
            router = self._router(replicas)
            time_picks(router, variant.policy, self._picks_s)
            handle = SimulatedHandle(router, replicas)
            heartbeats = self._follow(replicas)
            outcomes = await asyncio.gather(
                *(self._request(handle, number, request) for number, request in enumerate(scenario.requests))
            )
        seconds = self._loop.time()
        await asyncio.sleep(HEARTBEAT_S)  # whatever is on its way arrives
        for task in heartbeats:
            task.cancel()
        for engine in engines:
            engine.check_integrity()
            engine.close()
        busy_s = sum(engine.busy_s for engine in engines)
        extra = {"busy": busy_s / (scenario.replicas * seconds)}
        return Replay(list(outcomes), scenario.replicas, seconds, self._picks_s, self._lags_s, extra)

    def _router(self, replicas: Sequence[SimulatedReplica]) -> RequestRouter:
        policy = self._variant.policy
        if policy in YARDSTICKS:
            truth, names = Omniscience(replicas), [replica.name for replica in replicas]
            pick = (
                oracle(truth, names, self._loop.time)
                if policy == "oracle"
                else perfect(truth, names, self._scenario.cost)
            )
            return make_router(YardstickRouter, {"choose": pick}, DEPLOYMENT)
        cls, kwargs = router_class(policy), dict(self._variant.kwargs)
        if self.state is not None:
            cls, kwargs = _with_state(cls), {"state": self.state}
        if policy == "prefix_affinity":
            kwargs["tree_actor"] = LocalTree()
        if policy == "capacity_queue":
            kwargs["capacity_queue_actor_name"] = "capacity_queue"
        router = make_router(cls, kwargs, DEPLOYMENT)
        if policy == "capacity_queue":
            router._capacity_queue = LocalQueue(replicas)  # type: ignore[attr-defined]
        return router

    def _follow(self, replicas: Sequence[SimulatedReplica]) -> list[asyncio.Task[None]]:
        if self.state is None:
            return []
        for replica in replicas:
            feed = Feed(replica.name, replica.engine, self.state)
            feed.first()
            replica.feed = feed
            feed.lags_s = self._lags_s
        return [self._loop.create_task(_heartbeat(replica)) for replica in replicas]

    async def _request(self, handle: SimulatedHandle, number: int, traced: TraceRequest) -> Outcome:
        await asyncio.sleep(traced.at - self._loop.time())
        outcome = Outcome(traced.at, self._prompts.length(traced))
        request = make_request(
            self._variant.policy, number, traced, self._prompts, self._scenario.engine.block_size, "modelled"
        )
        state = self.state

        def on_chunk(replica: str, chunk: Chunk) -> None:
            if outcome.first_token is None:
                outcome.first_token = self._loop.time()
                outcome.replica, outcome.cached_tokens = replica, chunk.num_cached_tokens
                if state is not None:
                    outcome.predicted_tokens = state.placed(request, replica)
                    state.first_token(request.request_id, chunk.prompt_tokens - chunk.num_cached_tokens)
            if state is not None:
                state.progress(request.request_id, chunk.completion_tokens)

        if state is not None:
            state.begin(request.request_id)
        try:
            await handle.call(request, f"session-{traced.session}", on_chunk)
            outcome.ended = self._loop.time()
            outcome.work_s = self._scenario.timing.work_s(
                outcome.prompt_tokens - outcome.cached_tokens,
                outcome.prompt_tokens,
                self._prompts.output(traced),
                self._scenario.engine.max_batched_tokens,
            )
        except Refused as error:
            outcome.error = str(error)
        finally:
            if state is not None:
                state.finish(request.request_id)
        return outcome


def _with_state(cls: type[RequestRouter]) -> type[RequestRouter]:
    """The production router, on a state whose clock is virtual."""

    class Simulated(cls):  # type: ignore[misc, valid-type]
        def initialize_state(self, state: RoutingState) -> None:
            self._state = state

    return Simulated


async def _heartbeat(replica: SimulatedReplica) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        replica.report()
