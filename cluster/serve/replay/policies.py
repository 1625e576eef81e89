"""The policies that are compared, by name: ours, Ray's own router classes, and their settings.

Ray's classes are imported from where they are and never changed. Where a class has a setting that decides how well it
does, each of several values is a variant, and the best of them stands for the policy.
"""

import importlib
import math
from dataclasses import dataclass, field
from typing import Any, cast

from ray.serve.request_router import RequestRouter

ROUTERS = {
    "caravan": "cluster.serve.router.CacheAwareRouter",
    "power_of_two": "ray.serve._private.request_router.pow_2_router.PowerOfTwoChoicesRequestRouter",
    "round_robin": "ray.serve.experimental.round_robin_router.RoundRobinRouter",
    "capacity_queue": "ray.serve.experimental.capacity_queue_router.CapacityQueueRouter",
    "consistent_hash": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    # `ray.serve.llm.request_router` is its public path, and needs vLLM or SGLang to be installed.
    "prefix_affinity": (
        "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
    ),
}
PEERS = tuple(name for name in ROUTERS if name != "caravan")
YARDSTICKS = ("caravan_perfect", "oracle")
POLICIES = (*ROUTERS, *YARDSTICKS)

UNLIMITED = 8192
"""Calls that a replica takes at a time, where its engine's queue is to be the only limit."""
AFFINITY_THRESHOLDS = (2.0, 5.0, 10.0, math.inf)
CAPACITIES = (16, 32, 64, UNLIMITED)


@dataclass(frozen=True)
class Variant:
    """A policy with its settings.

    Args:
        policy: a key of `ROUTERS`, or a yardstick.
        setting: says which variant this is; "" where there is only one.
        kwargs: for the router's `initialize_state`.
        max_ongoing: calls that Serve lets a replica have at a time.
    """

    policy: str
    setting: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    max_ongoing: int = UNLIMITED

    @property
    def name(self) -> str:
        return f"{self.policy}[{self.setting}]" if self.setting else self.policy


def variants(policy: str) -> list[Variant]:
    """All variants of a policy. Raises ValueError for an unknown one."""
    if policy == "prefix_affinity":
        return [
            Variant(policy, f"threshold={threshold:g}", {"imbalanced_threshold": threshold})
            for threshold in AFFINITY_THRESHOLDS
        ]
    if policy == "capacity_queue":
        # How much is given out before requests wait in the queue, where they can still go anywhere.
        return [Variant(policy, f"capacity={capacity}", max_ongoing=capacity) for capacity in CAPACITIES]
    if policy not in POLICIES:
        raise ValueError(f"policies={policy!r} is none of {', '.join(POLICIES)}")
    return [Variant(policy)]


def router_class(policy: str) -> type[RequestRouter]:
    """The policy's class, as Serve would load it."""
    module, _, name = ROUTERS[policy].rpartition(".")
    return cast(type[RequestRouter], getattr(importlib.import_module(module), name))
