"""The loop that keeps the number of replicas at what the load asks for; the decision is cluster/serve/autoscale.py's.

It runs in every ingress process, which knows the replicas' loads anyway, and acts in the one of rank 0: Serve ranks the
processes of a deployment, and gives a lost process's rank to the one that takes its place. Should two act for a moment,
they act on the same loads. Nothing is kept elsewhere: a loop that begins anew takes replicas away only after a whole
window. What fails (Serve's controller restarts, the dashboard is away) is tried again at the next turn.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from statistics import fmean

from cluster.serve.autoscale import Autoscaler, Bounds, Load
from cluster.serve.declaration import declared_args
from cluster.serve.rest import ServeClient
from cluster.serve.settings import APP_NAME, ENGINE_DEPLOYMENT, IngressOptions
from cluster.serve.state import ReplicaStatus, RoutingState
from cluster.serve.view import declared, target_replicas

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0


class Autoscaling:
    """`options` are asked for at each turn; `leads` says whether this process is the one that acts."""

    def __init__(
        self,
        state: RoutingState,
        options: Callable[[], IngressOptions],
        leads: Callable[[], bool],
        connect: Callable[[], ServeClient],
    ) -> None:
        self._state = state
        self._options = options
        self._leads = leads
        self._connect = connect
        self._client: ServeClient | None = None
        self._scaler = Autoscaler()
        self.wanted: int | None = None
        """Replicas, by the last decision; None: this process decides nothing."""

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            options = self._options()
            if options.min_replicas is None or options.max_replicas is None or not self._leads():
                self._scaler, self.wanted = Autoscaler(), None
                continue
            try:
                await self._turn(Bounds(options.min_replicas, options.max_replicas))
            except Exception as error:
                # Nobody awaits this loop, and the next turn finds the world as it is then.
                self._client = None
                logger.warning(f"Autoscaling: {type(error).__name__}: {error}")

    async def _turn(self, bounds: Bounds) -> None:
        if self._client is None:
            self._client = await asyncio.to_thread(self._connect)
        details = await asyncio.to_thread(self._client.details)
        target, app = target_replicas(details), declared(details).get(APP_NAME)
        if target is None or app is None or declared_args(app).min_replicas is None:
            return  # somebody has set the number, and Serve has yet to tell this process
        heard = {status.replica: status for status in self._state.status() if status.load and status.info}
        if not heard:
            return  # so nothing is known of the load
        seconds = fmean(status.prefill_s_per_token for status in heard.values())
        loads = {replica: load_of(status) for replica, status in heard.items()}
        wanted = self.wanted = self._scaler.decide(time.monotonic(), loads, target, bounds, seconds)
        if wanted != target:
            logger.info(f"Autoscaling: from {target} to {wanted} replicas.")
            await asyncio.to_thread(self._client.scale, APP_NAME, ENGINE_DEPLOYMENT, wanted)


def load_of(status: ReplicaStatus) -> Load:
    """What a replica that has been heard says, as the decision takes it."""
    load, info = status.load, status.info
    assert load is not None and info is not None
    # The engine counts a prompt's tokens when its prefill begins; those that wait have come too.
    waiting = load.pending_prefill_tokens if load.waiting else 0
    arrived = load.prompt_tokens - load.cached_tokens + waiting
    return Load(load.pending_prefill_tokens, arrived, 1 - load.free_blocks / info.num_blocks)
