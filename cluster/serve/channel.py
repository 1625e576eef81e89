"""Where an ingress process takes in its chunks: they come on one stream from each replica, for all of its requests."""

import asyncio
import itertools
from collections import deque

from cluster.serve.messages import ReplicaUpdate
from llama.engine import Chunk


class ReplicaLost(Exception):
    """A replica went away while it served a request."""

    code = "replica_lost"


class Call:
    """One attempt at one request. `replica`: the one that answers; None before its first chunk."""

    def __init__(self, number: int, request_id: str) -> None:
        self.number = number
        self.request_id = request_id
        self.replica: str | None = None
        self._items: deque[Chunk] = deque()
        self._error: Exception | None = None
        self._ready = asyncio.Event()

    def put(self, replica: str, chunk: Chunk) -> None:
        """The next chunk, unless another replica answers already: Serve sends a call again when the connection to its
        replica breaks before it has said whether it takes it, and then both may work on it."""
        if self.replica not in (None, replica):
            return
        chunk.request_id = self.request_id  # the engine knows the attempt by another name
        self.replica = replica
        self._items.append(chunk)
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """There will be no more chunks; the first error counts."""
        self._error = self._error or error
        self._ready.set()

    async def next(self) -> Chunk:
        """The next chunk, or, when all that came are taken, what `fail` was told."""
        while not self._items:
            if self._error is not None:
                raise self._error
            self._ready.clear()
            await self._ready.wait()
        return self._items.popleft()


class Inbox:
    """The open calls of one ingress process, on one event loop. `source` names the process to the replicas."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count(1)

    def next_number(self) -> int:
        """For a new call."""
        return next(self._numbers)

    def open(self, request_id: str, number: int) -> Call:
        """An attempt at a request, which was just sent; end it with `close`."""
        call = Call(number, request_id)
        self._calls[call.number] = call
        return call

    def close(self, call: Call) -> None:
        """Whatever still comes for this call is dropped."""
        self._calls.pop(call.number, None)

    def take(self, replica: str, update: ReplicaUpdate) -> None:
        """Hands an update's chunks to their calls."""
        for number, chunk in update.chunks:
            call = self._calls.get(number)
            if call is not None:
                call.put(replica, chunk)

    def open_calls(self) -> list[Call]:
        """Those that are not closed."""
        return list(self._calls.values())
