"""Functions that run in threads of their own and do one operation on a file system each time they are told to.

What stands between two operations runs undisturbed; so the order of the steps is the order in which a store sees them,
and any interleaving, failure and kill can be had at will, the same each time.
"""

import io
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from random import Random
from typing import Any, BinaryIO, Literal

from cluster.filesystem import AlreadyExists, FileStat, FileSystem, LocalFiles, Sink
from cluster.storage import Store

Order = Literal["go", "fail", "fail after", "kill", "kill after"]
_of_this_thread = threading.local()


class Killed(BaseException):
    """What a killed actor gets from every operation from then on."""


class Actor:
    """`body` in a thread. `result` is what it returned, `error` what it raised, `pending` the operation and its key
    that the next step does."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = self.killed = False
        self.pending: tuple[str, str] = ("idle", "")
        self._body = body
        self._order: Order = "go"
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def step(self, order: Order = "go") -> None:
        """One operation, or what `order` says of it: that it fails, or the actor is killed, before it or after."""
        assert not self.done
        self._order = order
        self._go.release()
        self._stopped.acquire()

    def finish(self, limit: int = 10_000) -> Any:
        """Steps until it ends; raises what it raised."""
        while not self.done:
            self.step()
            limit -= 1
            assert limit, "it does not end"
        if self.error is not None:
            raise self.error
        return self.result

    def kill(self) -> None:
        while not self.done:
            self.step("kill")

    def _run(self) -> None:
        _of_this_thread.actor = self
        try:
            idle()
            self.result = self._body()
        except BaseException as error:
            self.error = error
        self.done = True
        self._stopped.release()

    def _wait(self) -> Order:
        self._stopped.release()
        self._go.acquire()
        return self._order


@contextmanager
def operation(what: str = "idle", key: str = "") -> Iterator[None]:
    """The block is one operation of whichever actor's thread this is, if any."""
    actor: Actor | None = getattr(_of_this_thread, "actor", None)
    if actor is None:
        yield
        return
    actor.pending = what, key
    order = "kill" if actor.killed else actor._wait()
    if order == "kill":
        actor.killed = True
        raise Killed
    if order == "fail" and what != "idle":
        raise OSError("this one failed")
    yield
    if order == "kill after":
        actor.killed = True
        raise Killed
    if order == "fail after" and what != "idle":
        raise OSError("this one took effect, and failed")


def idle() -> None:
    """A step without an effect."""
    with operation():
        pass


class SteppedFiles:
    """A file system, one operation at a time. Folders are deleted file by file."""

    def __init__(self, inner: FileSystem) -> None:
        self.inner = inner

    def is_file(self, key: str) -> bool:
        with operation("look", key):
            return self.inner.is_file(key)

    def open_input(self, key: str) -> BinaryIO:
        with operation("read", key), self.inner.open_input(key) as file:
            return io.BytesIO(file.read())

    def create(self, key: str, exclusive: bool = False) -> Sink:
        return _SteppedSink(self.inner, key, exclusive)

    def stats(self, key: str) -> dict[str, FileStat]:
        with operation("list", key):
            return self.inner.stats(key)

    def delete(self, key: str) -> None:
        with operation("delete", key):
            names = [] if self.inner.is_file(key) else sorted(self.inner.stats(key))
            if not names:
                self.inner.delete(key)
        for name in names:
            with operation("delete", f"{key}/{name}"):
                self.inner.delete(f"{key}/{name}")


class _SteppedSink:
    def __init__(self, inner: FileSystem, key: str, exclusive: bool) -> None:
        self._inner, self._key = inner, key
        self._held_back = exclusive and not isinstance(inner, LocalFiles)
        self._sink = inner.create(key, exclusive and not self._held_back)

    def write(self, data: memoryview) -> None:
        self._sink.write(data)

    def commit(self) -> None:
        if self._held_back:  # an object store is asked first and written to then
            with operation("look", self._key):
                if self._inner.is_file(self._key):
                    raise AlreadyExists(self._key)
        with operation("write", self._key):
            self._sink.commit()

    def abort(self) -> None:
        with suppress(ValueError):
            self._sink.abort()


class MemoryObjects:
    """An object store in memory, with times of its own: every write is a second later than the one before."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.now_ns = 10**18

    def is_file(self, key: str) -> bool:
        return key in self.objects

    def open_input(self, key: str) -> BinaryIO:
        if key not in self.objects:
            raise FileNotFoundError(key)
        return io.BytesIO(self.objects[key][0])

    def create(self, key: str, exclusive: bool = False) -> Sink:
        assert not exclusive
        return _MemorySink(self, key)

    def stats(self, key: str) -> dict[str, FileStat]:
        prefix = f"{key}/"
        return {
            name[len(prefix) :]: FileStat(len(data), at)
            for name, (data, at) in self.objects.items()
            if name.startswith(prefix)
        }

    def delete(self, key: str) -> None:
        self.objects = {
            name: each for name, each in self.objects.items() if name != key and not name.startswith(f"{key}/")
        }


class _MemorySink:
    def __init__(self, objects: MemoryObjects, key: str) -> None:
        self._objects, self._key, self._data = objects, key, bytearray()

    def write(self, data: memoryview) -> None:
        self._data += data

    def commit(self) -> None:
        self._objects.now_ns += 10**9
        self._objects.objects[self._key] = bytes(self._data), self._objects.now_ns

    def abort(self) -> None:
        pass


def stepped(store: Store, inner: FileSystem) -> Store:
    """The store, on another file system that goes step by step."""
    store._filesystem = SteppedFiles(inner)
    return store


class Names:
    """Random names that are the same each time: what `uuid.uuid4` is replaced by."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def __call__(self) -> uuid.UUID:
        return uuid.UUID(int=self._random.getrandbits(128), version=4)
