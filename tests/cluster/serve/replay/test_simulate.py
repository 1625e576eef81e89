"""Every policy in virtual time on a small trace, and what must hold for the comparison to mean anything."""

import random
from dataclasses import replace

import pytest
from ray.llm._internal.serve.routing_policies.prefix_aware import prefix_aware_router
from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.experimental import capacity_queue_router, consistent_hash_router, round_robin_router

from cluster.serve.replay import virtual_time
from cluster.serve.replay.measure import summary
from cluster.serve.replay.policies import PEERS, POLICIES, Variant, router_class, variants
from cluster.serve.replay.simulate import Scenario, Simulation, simulate
from cluster.serve.replay.trace import SyntheticTrace, make_trace
from cluster.serve.router import CacheAwareRouter
from llama.engine import EngineConfig

ENGINE = EngineConfig(num_blocks=150, block_size=512, max_batched_tokens=2048, max_running=64, max_waiting=200)
REQUESTS = make_trace(SyntheticTrace(requests=80, rate=6.0, burst=4, concurrent=12, output_tokens=40, seed=1))
SCENARIO = Scenario(REQUESTS, replicas=3, engine=ENGINE, seed=5)


def _run(policy: str, scenario: Scenario = SCENARIO) -> Simulation:
    simulation = Simulation(scenario, variants(policy)[-1])
    virtual_time.run(simulation.run())
    return simulation


def test_rays_routers_are_rays():
    assert router_class("power_of_two") is PowerOfTwoChoicesRequestRouter
    assert router_class("round_robin") is round_robin_router.RoundRobinRouter
    assert router_class("capacity_queue") is capacity_queue_router.CapacityQueueRouter
    assert router_class("consistent_hash") is consistent_hash_router.ConsistentHashRouter
    assert router_class("prefix_affinity") is prefix_aware_router.PrefixCacheAffinityRouter
    assert router_class("caravan") is CacheAwareRouter
    assert all(router_class(name).__module__.startswith("ray.") for name in PEERS)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_serves_everybody_and_the_same_way_again(policy):
    variant = variants(policy)[-1]
    ray = prefix_aware_router.ray
    first, second = simulate(SCENARIO, variant), simulate(SCENARIO, variant)
    assert first.outcomes == second.outcomes
    assert prefix_aware_router.ray is ray
    figures = summary(first, deadline_s=1.0)
    assert figures["rejects"] == 0 and len(first.picks_s) >= len(REQUESTS)
    assert len({outcome.replica for outcome in first.outcomes}) == 3
    for outcome, request in zip(first.outcomes, REQUESTS, strict=True):
        assert outcome.arrived == pytest.approx(request.at)
        assert outcome.arrived < outcome.first_token <= outcome.ended
        assert outcome.cached_tokens < outcome.prompt_tokens == request.input_tokens


def test_round_robin_takes_turns():
    apart = [replace(request, at=1.0 * number) for number, request in enumerate(REQUESTS[:12])]
    outcomes = simulate(replace(SCENARIO, requests=apart), Variant("round_robin")).outcomes
    replicas = [outcome.replica for outcome in outcomes]
    assert len(set(replicas[:3])) == 3 and replicas == replicas[:3] * 4


def test_the_consistent_hash_keeps_conversations_together():
    outcomes = simulate(SCENARIO, Variant("consistent_hash")).outcomes
    homes: dict[int, set[str]] = {}
    for outcome, request in zip(outcomes, REQUESTS, strict=True):
        homes.setdefault(request.session, set()).add(outcome.replica)
    assert all(len(replicas) == 1 for replicas in homes.values()) and len(homes) > 5


def test_the_affinity_routers_tree_learns_after_routing_only():
    """So the first of a burst of new conversations find the same replica emptiest, where slower ones are spread."""
    new = [
        replace(REQUESTS[0], hash_ids=tuple(range(1000 * n, 1000 * n + len(REQUESTS[0].hash_ids)))) for n in range(4)
    ]

    def replicas(gap_s: float) -> set[str]:
        requests = [replace(request, at=gap_s * number) for number, request in enumerate(new)]
        outcomes = simulate(replace(SCENARIO, requests=requests), variants("prefix_affinity")[-1]).outcomes
        return {outcome.replica for outcome in outcomes}

    assert len(replicas(0.0)) == 1 and len(replicas(1.0)) == 3


def test_the_capacity_queue_holds_back_what_nobody_can_take():
    variant = Variant("capacity_queue", max_ongoing=1)
    simulation = Simulation(replace(SCENARIO, requests=[replace(REQUESTS[0], at=0.0)] * 5), variant)
    replay = virtual_time.run(simulation.run())
    ends = sorted(outcome.ended for outcome in replay.outcomes)
    firsts = sorted(outcome.first_token for outcome in replay.outcomes)
    assert firsts[3] > ends[0] and firsts[4] > ends[1]


def test_the_index_is_the_union_of_the_caches_and_nothing_stays_booked():
    simulation = _run("caravan")
    state = simulation.state
    assert state is not None and len(state._ledger) == 0 and not state._selections
    state._index.check_integrity()
    evictions = 0
    for name, engine in simulation.engines.items():
        held = set(engine.snapshot().hashes)
        assert state._index._copies[name].hashes == held and held
        evictions += engine.event_seq
    assert evictions > len(REQUESTS)


def test_foreseen_is_what_is_found():
    replay = simulate(SCENARIO, Variant("caravan"))
    assert summary(replay, 1.0)["predicted_error"] < 0.02
    assert summary(replay, 1.0)["hit_rate"] > 0.3


def test_knowing_the_cache_pays():
    figures = {
        policy: summary(simulate(SCENARIO, variants(policy)[-1]), 1.0)
        for policy in ("caravan", "caravan_perfect", "oracle", "round_robin", "power_of_two")
    }
    for policy in ("caravan", "caravan_perfect", "oracle"):
        for blind in ("round_robin", "power_of_two"):
            assert figures[policy]["ttft_mean"] < figures[blind]["ttft_mean"]
            assert figures[policy]["hit_rate"] > figures[blind]["hit_rate"]


def test_a_full_engine_refuses():
    engine = replace(ENGINE, max_waiting=1, max_running=1)
    scenario = replace(SCENARIO, engine=engine, requests=[replace(request, at=0.0) for request in REQUESTS[:20]])
    figures = summary(simulate(scenario, Variant("round_robin")), 1.0)
    assert 0 < figures["rejects"] < 20 and figures["requests"] == 20


def test_the_routers_draw_by_the_seed():
    chosen = [
        [outcome.replica for outcome in simulate(replace(SCENARIO, seed=seed), Variant("power_of_two")).outcomes]
        for seed in (5, 6)
    ]
    assert chosen[0] != chosen[1]
    random.seed()
