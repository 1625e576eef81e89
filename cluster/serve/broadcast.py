"""One engine's cache events, handed to every subscriber: each ingress process follows each replica.

The engine gives every event once. `publish` drains it and copies the events into every subscriber's queue; a new
subscriber starts from a snapshot taken after a drain, so that it misses nothing and may see an event twice, which
the index ignores. A subscriber that does not keep up loses its queue; the gap in the numbers tells it so.

Lives on one event loop. Only `notify` may be called from other threads (it is the engine's `on_events`).
"""

import asyncio
from typing import Protocol

from llama.engine import BlockEvent, CacheSnapshot

MAX_QUEUED_EVENTS = 16_384


class EventSource(Protocol):
    """The part of the engine that is followed."""

    def drain_events(self) -> list[BlockEvent]: ...
    def snapshot(self) -> CacheSnapshot: ...


class Subscriber:
    """One follower's queue."""

    def __init__(self) -> None:
        self._events: list[BlockEvent] = []
        self._ready = asyncio.Event()

    def put(self, events: list[BlockEvent]) -> None:
        if len(self._events) + len(events) > MAX_QUEUED_EVENTS:
            self._events.clear()
        self._events.extend(events)
        self._ready.set()

    async def take(self, timeout_s: float) -> list[BlockEvent]:
        """The events since the last call; waits for the first one, but no longer than `timeout_s`."""
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        except TimeoutError:
            return []
        self._ready.clear()
        events, self._events = self._events, []
        return events


class Broadcast:
    """Copies an event source to its subscribers."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self._subscribers: set[Subscriber] = set()
        self._loop = asyncio.get_running_loop()

    def notify(self) -> None:
        """Says, from any thread, that the source has events."""
        self._loop.call_soon_threadsafe(self.publish)

    def publish(self) -> None:
        """Moves the source's events to the subscribers."""
        events = self._source.drain_events()
        if events:
            for subscriber in self._subscribers:
                subscriber.put(events)

    def subscribe(self) -> tuple[Subscriber, CacheSnapshot]:
        """A new follower and where it starts. End it with `unsubscribe`."""
        self.publish()
        subscriber = Subscriber()
        self._subscribers.add(subscriber)
        return subscriber, self._source.snapshot()

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Ends a follower."""
        self._subscribers.discard(subscriber)
