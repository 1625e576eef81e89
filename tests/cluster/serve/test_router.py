"""The adapter to Serve: singleton groups in our order, backoff always, pinned calls, no surprises from strangers."""

import asyncio
from types import SimpleNamespace

import pytest

from cluster.serve.messages import GenerateRequest, ReplicaLoad, ReplicaTarget, ReplicaUpdate
from cluster.serve.router import CacheAwareRouter
from cluster.serve.state import RoutingState
from llama.engine import CacheSnapshot, SamplingParams


def _replica(name: str) -> SimpleNamespace:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


REPLICAS = [_replica("a"), _replica("b"), _replica("c")]


@pytest.fixture
def router() -> CacheAwareRouter:
    # Without RequestRouter's constructor: it wants a Ray process, and the policy does not.
    router = CacheAwareRouter.__new__(CacheAwareRouter)
    router._state = RoutingState()
    router._state.set_replicas(["a", "b", "c"])
    return router


def _choose(router: CacheAwareRouter, *args: object) -> tuple[list[list[str]], bool]:
    pending = SimpleNamespace(args=list(args), routing_context=SimpleNamespace(should_backoff=False))
    groups = asyncio.run(router.choose_replicas(REPLICAS, pending))
    return [
        [replica.replica_id.unique_id for replica in group] for group in groups
    ], pending.routing_context.should_backoff


def _request(hashes: tuple[bytes, ...] = ()) -> GenerateRequest:
    return GenerateRequest("r", tuple(range(40)), hashes, SamplingParams(), "w")


def test_a_request_gets_every_replica_once_alone_in_its_group_best_first(router):
    hashes = (b"x" * 16, b"y" * 16)
    load = ReplicaLoad(0, 0, 100, 0, 0, 0, 0, 0, 0)
    router._state.apply_update("b", ReplicaUpdate("e", load, snapshot=CacheSnapshot("e", 1, hashes)))
    router._state.begin("r")
    groups, backoff = _choose(router, _request(hashes))
    assert groups[0] == ["b"] and sorted(groups) == [["a"], ["b"], ["c"]]
    assert backoff
    assert router._state.booked_on("r") == "b"


def test_a_pinned_call_goes_to_its_replica_only(router):
    assert _choose(router, ReplicaTarget("c")) == ([["c"]], True)
    assert router._state.booked_on("r") is None


@pytest.mark.parametrize("args", [(), (ReplicaTarget("gone"),), ("a stranger's argument",)])
def test_other_calls_reach_somebody(router, args):
    groups, backoff = _choose(router, *args)
    assert sorted(name for group in groups for name in group) == ["a", "b", "c"] and backoff


def test_no_pending_request_ranks_everybody(router):
    groups = asyncio.run(router.choose_replicas(REPLICAS, None))
    assert groups == [[replica] for replica in REPLICAS]


def test_the_booking_follows_the_replica_that_accepted(router):
    request = _request()
    router._state.begin("r")
    groups, _ = _choose(router, request)
    second = groups[1][0]
    router.on_request_routed(SimpleNamespace(args=[request]), SimpleNamespace(unique_id=second), None)
    assert router._state.booked_on("r") == second
    router.on_request_routed(SimpleNamespace(args=[]), SimpleNamespace(unique_id="a"), None)
