"""The autoscaler's loop: when it acts, what it makes of the replicas' reports, and what it survives."""

import asyncio
from typing import Any

import pytest

from cluster.serve import autoscaling
from cluster.serve.autoscale import Load
from cluster.serve.autoscaling import Autoscaling, load_of
from cluster.serve.declaration import declaration
from cluster.serve.messages import ReplicaInfo, ReplicaLoad, ReplicaUpdate
from cluster.serve.settings import AppArgs, EngineOptions, IngressOptions
from cluster.serve.state import RoutingState
from llama.engine import CacheSnapshot


def _state(load: ReplicaLoad, replicas: tuple[str, ...] = ("a",)) -> RoutingState:
    state = RoutingState()
    state.set_replicas(list(replicas))
    for replica in replicas:
        info = ReplicaInfo(replica, 1, "node", "w", 100, 512, 16, 100)
        state.apply_update(replica, ReplicaUpdate("e", load, snapshot=CacheSnapshot("e", 0, ()), info=info))
    return state


class _Serve:
    """Its REST interface; the first `failures` calls find nobody."""

    def __init__(self, target: int, failures: int = 0, *, autoscales: bool = True) -> None:
        args = AppArgs(model="m", served_name="m", **({"min_replicas": 2, "max_replicas": 4} if autoscales else {}))
        self.declared = declaration(args, EngineOptions(model="m"), replicas=target)
        self.target = target
        self.failures = failures
        self.asked: list[int] = []
        self.connections = 0

    def connect(self) -> Any:
        self.connections += 1
        return self

    def details(self) -> dict[str, Any]:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the controller is away")
        deployments = {"engine": {"target_num_replicas": self.target}}
        return {"applications": {"caravan": {"deployments": deployments, "deployed_app_config": self.declared}}}

    def scale(self, app: str, deployment: str, replicas: int) -> None:
        assert (app, deployment) == ("caravan", "engine")
        self.asked.append(replicas)
        self.target = replicas


IDLE = ReplicaLoad(0, 0, 100, 0, 0, 0, 0, 0, 0)
BOUNDS = IngressOptions(min_replicas=2, max_replicas=4)


def _run(serve: _Serve, state: RoutingState, options: IngressOptions = BOUNDS, leads: bool = True) -> None:
    async def run() -> None:
        loop = asyncio.create_task(Autoscaling(state, lambda: options, lambda: leads, serve.connect).run())
        await asyncio.sleep(0.3)
        assert not loop.done()
        loop.cancel()

    asyncio.run(run())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(autoscaling, "PERIOD_S", 0.01)


@pytest.mark.parametrize(("target", "asked"), [(1, [2]), (2, []), (7, [4])])
def test_the_number_is_brought_between_the_bounds(target, asked):
    serve = _Serve(target)
    _run(serve, _state(IDLE))
    assert serve.asked == asked


def test_a_controller_that_is_away_is_asked_again():
    serve = _Serve(1, failures=3)
    _run(serve, _state(IDLE))
    assert serve.asked == [2] and serve.connections == 4


@pytest.mark.parametrize(("options", "leads"), [(IngressOptions(), True), (BOUNDS, False)])
def test_only_the_first_ingress_acts_and_only_where_bounds_are_set(options, leads):
    serve = _Serve(1)
    _run(serve, _state(IDLE), options, leads)
    assert serve.connections == 0


def test_a_number_that_somebody_has_just_set_is_not_changed_by_a_process_that_does_not_know_yet():
    serve = _Serve(1, autoscales=False)
    _run(serve, _state(IDLE))
    assert serve.connections == 1 and serve.asked == []


def test_before_a_replica_has_been_heard_nothing_is_changed():
    serve, state = _Serve(1), RoutingState()
    state.set_replicas(["a"])
    _run(serve, state)
    assert serve.asked == []


def test_prompts_that_wait_have_come_though_the_engine_has_not_begun_them():
    """The engine's counter of prompt tokens runs when a prefill begins."""
    running = ReplicaLoad(1, 0, 75, 300, 0, 1000, 400, 0, 0)
    waiting = ReplicaLoad(1, 2, 75, 900, 0, 1000, 400, 0, 0)
    (status,) = _state(running).status()
    assert load_of(status) == Load(300, 600, 0.25)
    (status,) = _state(waiting).status()
    assert load_of(status) == Load(900, 1500, 0.25)
