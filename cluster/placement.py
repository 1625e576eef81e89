"""Which workers go to which node, so that every expert-parallel group stays inside one.

The all-to-all of a group is the heaviest traffic of a step, and a node is one NVLink domain. Ray Train sorts workers
by node before it numbers them, so one node's ranks are contiguous; with the expert-parallel axis innermost, group i is
ranks i*ep to i*ep+ep-1. Hence every group stays inside a node exactly if every node's worker count is a multiple of ep.

The plan is made before a start, handed to Ray as labels, and verified by the workers from the node ids they gather.
"""

import socket
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor, inf
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ray.train import ScalingConfig

NODE_ID_LABEL = "ray.io/node-id"
_ACCELERATOR = "accelerator_type:"
_POLL_SECONDS = 0.5
_CANCEL_SECONDS = 5.0
_CONNECT_SECONDS = 2.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class NodeResources:
    """What a node has in all; `accelerator_type` as Ray names it, such as `H200`, None without a GPU."""

    node_id: str
    cpus: float
    gpus: float = 0.0
    accelerator_type: str | None = None


@dataclass(frozen=True)
class WorkerNeeds:
    """What one worker asks for. Raises ValueError if that is nothing, or negative."""

    cpus: float = 1.0
    gpus: float = 0.0
    accelerator_type: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("cpus_per_worker", self.cpus), ("gpus_per_worker", self.gpus)):
            if value < 0:
                raise ValueError(f"{name}={value} is negative; use 0 or more")
        if self.cpus == self.gpus == 0:
            raise ValueError("cpus_per_worker=0 and gpus_per_worker=0: a worker must ask for something")
        if self.accelerator_type is not None and self.gpus == 0:
            raise ValueError(f"accelerator_type={self.accelerator_type!r} needs gpus_per_worker of at least 1")

    def resources(self) -> dict[str, float]:
        """As Ray's resource requests name them."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        if self.accelerator_type is not None:
            wanted[_ACCELERATOR + self.accelerator_type] = 0.001  # what Ray itself asks for, to name a kind of node
        return {name: amount for name, amount in wanted.items() if amount > 0}

    def slots(self, node: NodeResources) -> int:
        """How many workers `node` holds."""
        if self.accelerator_type not in (None, node.accelerator_type):
            return 0
        room = [have / need for have, need in ((node.cpus, self.cpus), (node.gpus, self.gpus)) if need > 0]
        return floor(min(room, default=inf) + 1e-9)


@dataclass(frozen=True)
class WorldSizes:
    """The numbers of workers that a training can use: those of `smallest` to `largest` that satisfy `fits`, whose
    multiples of `ep` they are. Picklable if `fits` is."""

    smallest: int
    largest: int
    ep: int
    fits: Callable[[int], bool]

    @classmethod
    def exactly(cls, workers: int, ep: int = 1) -> "WorldSizes":
        return cls(workers, workers, ep, partial(_divides, ep))

    def usable(self, room: int) -> int | None:
        """The largest of them in a room for so many workers; None if there is none."""
        return next((size for size in range(min(self.largest, room), self.smallest - 1, -1) if self.fits(size)), None)

    @property
    def fewest(self) -> int | None:
        """The smallest of them; None if there is none."""
        return next((size for size in range(self.smallest, self.largest + 1) if self.fits(size)), None)

    def nearest(self, room: int) -> int | None:
        """In that room, what satisfies `fits` and is nearest to them; None if nothing does."""
        fitting = [size for size in range(1, room + 1) if self.fits(size)]
        return min(fitting, key=lambda size: (max(self.smallest - size, size - self.largest, 0), -size), default=None)

    def __str__(self) -> str:
        return str(self.largest) if self.smallest == self.largest else f"[{self.smallest}, {self.largest}]"


class PlacementError(ValueError):
    """There is no such plan, or it was not kept. `nearest` is the (workers, ep) that would fit, if any does."""

    def __init__(self, message: str, nearest: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class PlacementPlan:
    """`workers_by_node`: how many workers each node gets, a multiple of `ep` each."""

    workers_by_node: tuple[tuple[str, int], ...]
    ep: int
    needs: WorkerNeeds

    @property
    def workers(self) -> int:
        return sum(count for _, count in self.workers_by_node)

    @property
    def node_ids(self) -> list[str]:
        """The node of every worker. Not by rank: Ray numbers the workers itself."""
        return [node_id for node_id, count in self.workers_by_node for _ in range(count)]

    def to_scaling(self) -> "ScalingConfig":
        """The plan as Ray Train takes it: one node label for every worker.

        It names nodes, so it holds for one start: after the loss of a node plan anew.
        """
        from ray.train import ScalingConfig

        resources = {"CPU": self.needs.cpus, "GPU": self.needs.gpus}
        # ray.train shows type checkers its older ScalingConfig, which has no labels
        return ScalingConfig(
            num_workers=self.workers,
            use_gpu=self.needs.gpus > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount > 0},
            accelerator_type=self.needs.accelerator_type,
            label_selector=[{NODE_ID_LABEL: node_id} for node_id in self.node_ids],  # type: ignore[call-arg]
        )


def plan(nodes: Sequence[NodeResources], workers: int, ep: int, needs: WorkerNeeds) -> PlacementPlan:
    """Place `workers` in groups of `ep`, on as few nodes as possible.

    Raises PlacementError that says why there is no room, and what would fit.
    """
    if workers < 1 or ep < 1:
        raise ValueError(f"workers={workers} and ep={ep} must both be at least 1")
    if workers % ep:
        raise _refusal(f"workers={workers} is not a multiple of ep={ep}", nodes, workers, ep, needs)
    slots = {node.node_id: needs.slots(node) for node in nodes}
    if workers > capacity(nodes, ep, needs):
        reason = f"workers={workers} in groups of ep={ep} do not fit ({_rooms(nodes, needs)})"
        raise _refusal(reason, nodes, workers, ep, needs)
    left, chosen = workers, []
    for node_id, room in sorted(slots.items(), key=lambda item: (-(item[1] // ep), item[0])):
        count = min(left, refit(room, ep))
        if count:
            chosen.append((node_id, count))
            left -= count
    return PlacementPlan(tuple(chosen), ep, needs)


def largest_plan(nodes: Sequence[NodeResources], sizes: WorldSizes, needs: WorkerNeeds) -> PlacementPlan:
    """`plan` of the most workers of `sizes` that the nodes hold.

    Raises PlacementError that says why there is no room, and what would fit.
    """
    room = capacity(nodes, sizes.ep, needs)
    workers = sizes.usable(room)
    if workers is not None:
        return plan(nodes, workers, sizes.ep, needs)
    if sizes.smallest == sizes.largest and sizes.largest % sizes.ep:
        return plan(nodes, sizes.largest, sizes.ep, needs)  # which says that
    reason = f"workers={sizes} in groups of ep={sizes.ep} do not fit ({_rooms(nodes, needs)})"
    if sizes.fewest is None:
        reason = f"workers={sizes} fit the training in no number"
    nearest = sizes.nearest(room)
    if nearest is None:
        raise _refusal(reason, nodes, sizes.smallest, sizes.ep, needs)
    raise PlacementError(f"{reason}; workers={nearest} with ep={sizes.ep} would fit", (nearest, sizes.ep))


def capacity(nodes: Sequence[NodeResources], ep: int, needs: WorkerNeeds) -> int:
    """The largest number of workers that the nodes hold in groups of `ep`, none across nodes."""
    return sum(refit(needs.slots(node), ep) for node in nodes)


def refit(workers_available: int, ep: int) -> int:
    """The largest usable world size, a multiple of `ep`; 0 if not even one group is left."""
    return workers_available - workers_available % ep


def verify(node_ids_by_rank: Sequence[str], ep: int) -> None:
    """Check, from the node id of every rank, that no expert-parallel group crosses nodes.

    Raises PlacementError naming the first group that does.
    """
    if len(node_ids_by_rank) % ep:
        raise PlacementError(f"world size {len(node_ids_by_rank)} is not a multiple of ep={ep}")
    for first in range(0, len(node_ids_by_rank), ep):
        group = node_ids_by_rank[first : first + ep]
        if len(set(group)) > 1:
            where = ", ".join(f"rank {first + offset} on {node_id}" for offset, node_id in enumerate(group))
            raise PlacementError(
                f"expert-parallel group {first // ep} crosses nodes ({where}); "
                "give every node a number of workers that ep divides, or use a smaller ep"
            )


def alive_nodes(without: Collection[str] = ()) -> list[NodeResources]:
    """What the nodes of the cluster that this process is connected to have in all, in use or not.

    `without`: ids of nodes to leave out.
    """
    import ray

    nodes = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in without:
            has = node["Resources"]
            kinds = sorted(name.removeprefix(_ACCELERATOR) for name in has if name.startswith(_ACCELERATOR))
            kind = kinds[0] if kinds else None
            nodes.append(NodeResources(node["NodeID"], has.get("CPU", 0.0), has.get("GPU", 0.0), kind))
    return nodes


def unreachable_nodes() -> frozenset[str]:
    """Ids of nodes that Ray takes for alive and whose raylet accepts no connection.

    Of a node that was lost without a word Ray finds out after some twenty seconds; whoever plans at once, because its
    workers died with the node, would plan with it.
    """
    import ray

    silent = set()
    for node in ray.nodes():
        if node["Alive"]:
            try:
                address = (node["NodeManagerAddress"], node["NodeManagerPort"])
                socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
            except OSError:
                silent.add(node["NodeID"])
    return frozenset(silent)


def await_plan(
    sizes: WorldSizes, needs: WorkerNeeds, wait_seconds: float = 0.0, without: Collection[str] = ()
) -> PlacementPlan:
    """`largest_plan` on the nodes of this process's cluster, `without` left out; where there is no room yet for the
    smallest, an autoscaler is asked for that once.

    Raises PlacementError if there is still no room after `wait_seconds`, and at once if no cluster could have any.
    """
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + wait_seconds
    asked = False
    try:
        while True:
            try:
                return largest_plan(alive_nodes(without), sizes, needs)
            except PlacementError:
                smallest = sizes.fewest
                if smallest is None or time.monotonic() >= deadline:
                    raise
            if not asked:
                asked = True
                request_resources(bundles=[needs.resources()] * smallest)
            time.sleep(_POLL_SECONDS)
    finally:
        if asked:
            request_resources(bundles=[])  # what runs keeps its nodes; a request that stays would keep idle ones


def run_on_cluster(
    needs: WorkerNeeds, function: Callable[..., Result], *args: object, wait_seconds: float = 0.0
) -> Result:
    """The result of `function(*args)`, run as one Ray task that gets `needs`; it queues while these are in use.

    An interrupt cancels the task. Raises what the function raises, PlacementError if after `wait_seconds` no node
    would hold such a task even when idle, and ray.exceptions.RayError if its process is lost time and again.
    """
    import ray

    await_plan(WorldSizes.exactly(1), needs, wait_seconds)
    remote = ray.remote(function).options(
        num_cpus=needs.cpus, num_gpus=needs.gpus, accelerator_type=needs.accelerator_type
    )
    task = remote.remote(*args)
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
    except KeyboardInterrupt:
        ray.cancel(task)
        ray.wait([task], timeout=_CANCEL_SECONDS)
        raise


def _divides(ep: int, workers: int) -> bool:
    return workers % ep == 0


def _rooms(nodes: Sequence[NodeResources], needs: WorkerNeeds) -> str:
    slots = sorted((node.node_id, needs.slots(node)) for node in nodes)
    rooms = ", ".join(f"{node_id}: {count}" for node_id, count in slots) or "there is no node"
    return f"a group stays on one node; room: {rooms}"


def _refusal(reason: str, nodes: Sequence[NodeResources], workers: int, ep: int, needs: WorkerNeeds) -> PlacementError:
    """The error with the nearest plan: the same ep if one group of it fits, else the largest smaller one."""
    for size in range(ep, 0, -1):
        room = capacity(nodes, size, needs)
        if room:
            count = min(range(size, room + 1, size), key=lambda count: (abs(count - workers), count))
            return PlacementError(f"{reason}; workers={count} with ep={size} would fit", (count, size))
    each = f"{needs.cpus:g} CPU and {needs.gpus:g} GPU" + (
        f" of {needs.accelerator_type}" * bool(needs.accelerator_type)
    )
    return PlacementError(f"{reason}; no node has room for even one worker of {each}")
