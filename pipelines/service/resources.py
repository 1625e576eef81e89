"""What the cluster has, and what others than the service's runs take of it, asked of Ray.

What Ray calls available does not help with our own runs: one that has just started has taken nothing yet, and one
between two stages holds nothing. So their needs are counted instead, and of the rest what living actors hold and what
placement groups keep: replicas of Serve, a training that was started by hand. Both belong to the job of the driver that
asked for them, and the replicas of a kept endpoint to whoever started Serve; while that is one of our runs, they count
as its needs. Tasks of others come and go, and are not counted.

Needs a connection to Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.head import ClusterError
from pipelines.service.queue import Amounts

_ACCELERATOR = "accelerator_type:"
_LISTED = 10_000
_ANSWER_SECONDS = 20


@dataclass(frozen=True)
class Room:
    """By resource: all that the cluster has or may grow to, and what of it others than our runs take."""

    capacity: Amounts
    others: Amounts


class Resources(Protocol):
    def look(self, drivers: Sequence[str]) -> Room:
        """`drivers`: Ray's ids of our runs' jobs. Raises ClusterError."""
        ...


class RayResources:
    """`api_url`: the dashboard of the cluster that this process is connected to; left to itself Ray would look for one
    on the machine, where there may be several. `may_grow_to`: what an autoscaler adds up to, where there is one; the
    cluster counts as that large."""

    def __init__(self, api_url: str, may_grow_to: Amounts | None = None) -> None:
        self._api_url = api_url
        self._may_grow_to = dict(may_grow_to or {})

    def look(self, drivers: Sequence[str]) -> Room:
        """Raises ClusterError."""
        import ray
        from ray.util.state import list_actors, list_placement_groups
        from ray.util.state.exception import RayStateApiException

        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            asked: Any = {"address": self._api_url, "limit": _LISTED, "timeout": _ANSWER_SECONDS, "detail": True}
            actors = list_actors(filters=[("state", "=", "ALIVE")], **asked)
            groups = list_placement_groups(filters=[("state", "=", "CREATED")], **asked)
        except (ray.exceptions.RayError, RayStateApiException, RuntimeError, OSError) as error:
            raise ClusterError(f"Ray does not say what the cluster has: {error}") from error
        ours = set(drivers)
        held = [actor.required_resources or {} for actor in actors if actor.job_id not in ours]
        for group in groups:
            if group.creator_job_id not in ours:
                held += [bundle["unit_resources"] for bundle in group.bundles or []]
        capacity = capacity_of(nodes)
        for name, amount in self._may_grow_to.items():
            capacity[name] = max(amount, capacity.get(name, 0.0))
        return Room(capacity, taken_by(held))


def capacity_of(nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """CPUs and GPUs of nodes by what Ray says of each; the GPUs of a kind, `GPU:H200`, besides."""
    total: dict[str, float] = {"CPU": 0.0, "GPU": 0.0}
    for node in nodes:
        for name in ("CPU", "GPU"):
            total[name] += node.get(name, 0.0)
        for name in node:
            if name.startswith(_ACCELERATOR) and node.get("GPU"):
                kind = f"GPU:{name.removeprefix(_ACCELERATOR)}"
                total[kind] = total.get(kind, 0.0) + node["GPU"]
    return total


def taken_by(held: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What actors and bundles hold in all. An actor in a placement group names that group's share, which is another
    resource, and is not counted twice."""
    taken: dict[str, float] = {}
    for each in held:
        for name in ("CPU", "GPU"):
            taken[name] = taken.get(name, 0.0) + float(each.get(name, 0.0))
        for name in each:
            if name.startswith(_ACCELERATOR):
                kind = f"GPU:{name.removeprefix(_ACCELERATOR)}"
                taken[kind] = taken.get(kind, 0.0) + float(each.get("GPU", 0.0))
    return {name: amount for name, amount in taken.items() if amount > 0}
