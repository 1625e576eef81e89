"""Keeps this process's block index in step with every replica: one pinned, streaming call to each.

A subscription begins with a snapshot and goes on with events. The replica ends it after a while, because it would
not notice our death; then the next one takes over where it ended. A gap or a failure empties the replica's copy
until the next snapshot. When Serve takes a replica out of routing, or this process shuts down, the call is
cancelled, so that a draining replica does not wait for us.
"""

import asyncio
import contextlib
import contextvars
import logging
from typing import cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cluster.serve.messages import ReplicaTarget
from cluster.serve.state import RoutingState

logger = logging.getLogger("ray.serve")

RESUBSCRIBE_S = 0.2


class Subscriptions:
    """One task per replica of `state`, for as long as the replica is routed to."""

    def __init__(self, handle: DeploymentHandle, state: RoutingState) -> None:
        self._subscribe = handle.options(method_name="subscribe", stream=True)
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopped = False

    def start(self) -> None:
        """Follows the replicas from now on. Call it on the event loop that is to run the subscriptions."""
        self._state.on_replicas_changed(self._replicas_changed)

    async def stop(self) -> None:
        """Ends every subscription; there is no way back."""
        self._stopped = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _replicas_changed(self) -> None:
        self._loop.call_soon_threadsafe(self._sync)

    def _sync(self) -> None:
        replicas = set() if self._stopped else set(self._state.replicas)
        for replica in set(self._tasks) - replicas:
            self._tasks.pop(replica).cancel()
        for replica in replicas - set(self._tasks):
            # An empty context: Serve tells calls apart by the request they are made in, and these have none.
            self._tasks[replica] = self._loop.create_task(self._follow(replica), context=contextvars.Context())

    async def _follow(self, replica: str) -> None:
        while True:
            try:
                kept = await self._follow_once(replica)
            except Exception:
                # Nobody awaits this task: what ended it would go unseen, and the replica unfollowed.
                logger.exception(f"Subscription to replica {replica} failed.")
                kept = False
            if not kept:
                self._state.lost_subscription(replica)
                await asyncio.sleep(RESUBSCRIBE_S)

    async def _follow_once(self, replica: str) -> bool:
        """One subscription, from its snapshot to its end; False when events were or may have been lost."""
        updates = cast(DeploymentResponseGenerator, self._subscribe.remote(ReplicaTarget(replica)))
        ended = False
        try:
            async for update in updates:
                if not self._state.apply_update(replica, update):
                    logger.warning(f"Events of replica {replica} were lost, or it has left.")
                    return False
            ended = True
        except (RayError, RayServeException) as error:
            logger.warning(f"Subscription to replica {replica} ended: {type(error).__name__}.")
        except asyncio.CancelledError:
            # Ours ends this task; the replica's (it shuts down) only ends the call.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
        finally:
            if not ended:
                with contextlib.suppress(RayError, RayServeException):
                    updates.cancel()
        return ended
