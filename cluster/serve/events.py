"""Follows every replica: one pinned, streaming call to each, with its events, its load and our requests' chunks.

A subscription begins with a snapshot. Ray keeps a few bytes of every item of a stream until it ends, so after RENEW_S
another one takes over: the replica ends the old one when the new one has come, and each is read to its end, so nothing
is lost between them. A gap in the block events asks for the same, for its snapshot.

A stream that breaks off, or is silent for SILENT_S, may have lost chunks: our requests on that replica fail (and are
tried elsewhere, if they may be), its copy in the index is emptied, and a new subscription begins.

When Serve takes a replica out of routing, no new subscription can reach it. The present one goes on until our requests
there are over, and ends then, so that the replica, which drains, does not wait for us.
"""

import asyncio
import contextlib
import contextvars
import logging
from functools import partial
from typing import Any, cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from cluster.serve.channel import Inbox, ReplicaLost
from cluster.serve.messages import Subscription
from cluster.serve.state import RoutingState

logger = logging.getLogger("ray.serve")

RENEW_S = 60.0
RESUBSCRIBE_S = 0.2
SILENT_S = 10.0


class _Broken(Exception):
    """The stream cannot be trusted any more."""


class Subscriptions:
    """One task per replica of `state`, for as long as the replica is routed to, or works on a request of ours.

    Args:
        process: the Ray actor that we are, by which the replicas notice our death; None: we are none.
    """

    def __init__(self, handle: DeploymentHandle, state: RoutingState, inbox: Inbox, process: Any = None) -> None:
        self._subscribe = handle.options(method_name="subscribe", stream=True)
        self._state = state
        self._inbox = inbox
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._routed: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lost: set[str] = set()  # of which the log has it already
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
        if self._stopped:
            return
        self._routed = set(self._state.replicas)
        for replica in self._routed - set(self._tasks):
            # An empty context: Serve tells calls apart by the request they are made in, and these have none.
            task = self._loop.create_task(self._follow(replica), context=contextvars.Context())
            self._tasks[replica] = task
            task.add_done_callback(partial(self._ended, replica))

    def _ended(self, replica: str, task: asyncio.Task[None]) -> None:
        del self._tasks[replica]
        self._lost.discard(replica)
        if replica in self._routed and not task.cancelled():  # it is back; cancelled: everything ends
            self._sync()

    async def _follow(self, replica: str) -> None:
        while replica in self._routed:
            try:
                await self._follow_once(replica)
            except (RayError, RayServeException, _Broken, TimeoutError) as error:
                self._lose(replica, f"{type(error).__name__} {error}".splitlines()[0])
            except asyncio.CancelledError:
                # Ours ends this task; the replica's (it shuts down) only ends the call.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                self._lose(replica, "the replica cancelled it")
            except Exception:
                # Nobody awaits this task: what ended it would go unseen, and the replica unfollowed.
                logger.exception(f"Subscription to replica {replica} failed.")
                self._lose(replica, "a defect")
            await asyncio.sleep(RESUBSCRIBE_S)

    def _lose(self, replica: str, why: str) -> None:
        # A dead one is tried again and again until Serve takes it out of routing.
        logger.log(logging.DEBUG if replica in self._lost else logging.WARNING, f"Lost replica {replica}: {why}")
        self._lost.add(replica)
        self._state.lost_subscription(replica)
        for call in self._inbox.open_calls():
            if replica in (call.replica, self._state.booked_on(call.request_id)):
                call.fail(ReplicaLost("its subscription broke off"))

    async def _follow_once(self, replica: str) -> None:
        """A subscription and those that renew it; returns when the replica has left and our requests there are over."""
        reading, renewal = self._open(replica, renews=False), None
        number, renew_at = 0, self._loop.time() + RENEW_S
        try:
            async with asyncio.timeout(SILENT_S) as silence:
                while True:
                    async for update in reading:
                        now = self._loop.time()
                        silence.reschedule(now + SILENT_S)
                        if update.number != number + 1:
                            raise _Broken(f"item {update.number} came after {number}")
                        number = update.number
                        self._lost.discard(replica)
                        complete = self._state.apply_update(replica, update)
                        self._inbox.take(replica, update)
                        if replica not in self._routed:
                            if not update.open_calls:
                                return
                        elif now >= renew_at or (not complete and renewal is None):
                            _cancel(renewal)  # it has not come through for a whole period
                            renewal, renew_at = self._open(replica, renews=True), now + RENEW_S
                    if renewal is None:
                        raise _Broken("the replica ended it")
                    reading, renewal = renewal, None
        finally:
            _cancel(reading)
            _cancel(renewal)

    def _open(self, replica: str, *, renews: bool) -> DeploymentResponseGenerator:
        subscription = Subscription(replica, self._inbox.source, self._process, renews)
        return cast(DeploymentResponseGenerator, self._subscribe.remote(subscription))


def _cancel(stream: DeploymentResponseGenerator | None) -> None:
    if stream is not None:
        with contextlib.suppress(RayError, RayServeException):
            stream.cancel()
