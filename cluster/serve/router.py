"""Ray Serve's adapter to the router: asks the process's `RoutingState` for a ranking and hands it to Serve.

Serve re-picks inside a group by queue length, so every group has one member and our order stands. Backoff is
always asked for: without it a full cluster makes Serve's loop spin. `choose_replicas` never awaits, because
Serve runs few routing tasks at a time.

A call pinned to a replica which has left goes to any other, whose refusal (`WrongReplica`) ends it: an empty
ranking would make Serve retry for ever. Other handles to the deployment build routers of their own, without
arguments we know; those calls go to the least busy replica.
"""

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.serve.messages import GenerateRequest, ReplicaTarget
from cluster.serve.state import RoutingState, routing_state


class CacheAwareRouter(RequestRouter):
    """Routes generate calls by the exact cache index, control calls to the replica they name."""

    # A replica deep in a prefill on a busy machine answers late; skipping it would give up its cache.
    queue_len_response_deadline_s = 2.0
    max_queue_len_response_deadline_s = 5.0

    def initialize_state(self) -> None:  # type: ignore[override]  # we take no arguments
        self._state: RoutingState = routing_state(self.app_name)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._state.set_replicas([replica.replica_id.unique_id for replica in replicas])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One ranking, best replica first, each in a group of its own."""
        if pending_request is None:
            return [[replica] for replica in candidate_replicas]
        pending_request.routing_context.should_backoff = True
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        request = _argument(pending_request)
        if isinstance(request, ReplicaTarget) and request.replica in by_id:
            return [[by_id[request.replica]]]
        if isinstance(request, GenerateRequest):
            return [[by_id[replica]] for replica in self._state.select(request, list(by_id))]
        return [candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Moves the booking when Serve had to pass over the first choice (its queue was full)."""
        request = _argument(pending_request)
        if isinstance(request, GenerateRequest):
            self._state.placed(request, replica_id.unique_id)


def _argument(pending_request: PendingRequest) -> object:
    return pending_request.args[0] if pending_request.args else None
