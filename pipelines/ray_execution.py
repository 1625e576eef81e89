"""Stages as Ray tasks: each in a worker process of its own, with what it asked for, on whatever node has that. One that
leaves the work to workers of its own runs beside the driver, as long as there is a place: a node that is only lent, and
may go, is no place to wait for others, and the dashboard and the endpoint may listen on the head's loopback only.

A task that is ended is first interrupted (KeyboardInterrupt in its main thread, once that is back from a call that
blocks), so that it can take back what it has begun, and after END_SECONDS killed. What it started dies with its
process, and that dies with the driver: Ray ends the tasks and actors of an owner that is gone.

What a stage has to say while it runs comes through an actor, the inbox, together with the warnings that it logs: Ray
itself brings nothing of a task to its driver before the task's end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.storage import JSON
from pipelines.execution import Ended, WorkerLost
from pipelines.runs import one_line
from pipelines.stage import Event, GraphError, Resources, Stage, Work

END_SECONDS = 20.0
_LOOK_SECONDS = 0.2
_BATCH_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0
_NOBODY = -1
_CLOSE_SECONDS = 5.0
_ROOM_SECONDS = 15.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _LogRecord:
    logger: str
    level: int
    message: str


@dataclass(frozen=True)
class _LastWords:
    """Nothing more comes from this try."""


@dataclass(frozen=True)
class _Outcome:
    """The metadata that a try came to, or its error: pickled if that can be done, in words, and where it was raised."""

    metadata: dict[str, JSON] | None
    error: bytes = b""
    words: str = ""
    raised: str = ""

    def result(self) -> dict[str, JSON]:
        if self.metadata is not None:
            return self.metadata
        error: Exception = RuntimeError(self.words)
        with suppress(Exception):  # its class may be one that only the worker has
            error = pickle.loads(self.error)
        error.add_note(f"on the stage's worker:\n{self.raised}")
        raise error


class _Inbox:
    """Items of all tries of a run, each with its try's number."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Any]] = []
        self._arrived = asyncio.Event()

    async def put(self, number: int, items: list[Any]) -> None:
        self._items += [(number, item) for item in items]
        self._arrived.set()

    async def take(self, patience: float) -> list[tuple[int, Any]]:
        """What has come; waits up to `patience` seconds for the first."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), patience)
        self._arrived.clear()
        taken, self._items = self._items, []
        return taken


class OnRay:
    """An executor on the cluster that this process is connected to. `close` it."""

    end_seconds = 2 * END_SECONDS

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._inbox: Any = None
        self._thread = threading.Thread(target=self._listen, name="stage-events", daemon=True)
        self._listeners: dict[int, _Listener] = {}
        self._numbers = count()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def capacity(self) -> Resources:
        """What the cluster's nodes have together, in use or not."""
        total = ray.cluster_resources()
        return Resources(total.get("CPU", 0.0), total.get("GPU", 0.0), int(total.get("memory", 0)))

    def check(self, work: Work) -> None:
        """Ray does all that a stage can ask for."""

    def execute(self, work: Work, on_event: Callable[[Event], None], end: threading.Event) -> dict[str, JSON]:
        listener = _Listener(on_event)
        with self._lock:
            number = next(self._numbers)
            self._listeners[number] = listener
            if self._inbox is None:
                beside = _beside_driver(soft=False)
                self._inbox = ray.remote(_Inbox).options(num_cpus=0, max_restarts=-1, **beside).remote()
                self._thread.start()
        task = ray.remote(_perform).options(name=work.stage.name, max_retries=0, **_asked(work.stage.resources))
        try:
            outcome = self._await(task.remote(work, self._inbox, number), work.stage, listener, end)
            listener.over.wait(_LAST_WORDS_SECONDS)
            return outcome.result()
        finally:
            with self._lock:
                del self._listeners[number]
                self._lock.notify_all()

    def close(self) -> None:
        """Ends what is still being tried. No thread asks Ray for anything after this: without a connection Ray would
        start a cluster to answer it."""
        self._closed.set()
        with self._lock:
            for listener in self._listeners.values():
                listener.over.set()
            self._lock.wait_for(lambda: not self._listeners, _CLOSE_SECONDS)
        if self._inbox is not None:
            self._inbox.put.remote(_NOBODY, [None])  # the listener is back from its call, which Ray would complain of
            self._thread.join(_CLOSE_SECONDS)
            ray.kill(self._inbox)

    def _await(self, task: Any, stage: Stage, listener: _Listener, end: threading.Event) -> _Outcome:
        name, submitted = stage.name, time.monotonic()
        asked: float | None = None
        killed = told = False
        while not self._closed.is_set():
            try:
                outcome: _Outcome = ray.get(task, timeout=_LOOK_SECONDS)
                return outcome
            except GetTimeoutError:
                pass
            except RayTaskError as error:
                raise GraphError(f"stage {name!r} could not begin on its worker: {one_line(error)}") from error
            except RayError as error:
                if end.is_set():
                    raise Ended(f"stage {name!r} was ended") from error
                raise WorkerLost(f"the worker of stage {name!r} was lost: {one_line(error)}") from error
            if not (listener.begun or told) and time.monotonic() - submitted > _ROOM_SECONDS:
                told = True
                listener.hear(Event(name, "progress", f"waits for {_room(stage.resources, self.capacity())}"))
            if end.is_set() and asked is None:
                asked = time.monotonic()
                ray.cancel(task, force=False, recursive=False)  # it may need what it has started to clear up
            elif asked is not None and not killed and time.monotonic() - asked > END_SECONDS:
                killed = True
                ray.cancel(task, force=True, recursive=True)
        ray.cancel(task, force=True, recursive=True)
        raise Ended(f"stage {name!r} was ended")

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                items = ray.get(self._inbox.take.remote(1.0))
            except Exception:  # the inbox comes back, without what it held; what cannot be read here is lost
                self._closed.wait(1.0)
                continue
            for number, item in items:
                if listener := self._listeners.get(number):
                    listener.hear(item)


class _Listener:
    """What one try says, in the driver. `begun`: it has said something; `over` is set when it has said all."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self.begun = False
        self.over = threading.Event()

    def hear(self, item: object) -> None:
        self.begun = True
        if isinstance(item, Event):
            self._on_event(item)
        elif isinstance(item, _LogRecord):
            logging.getLogger(item.logger).log(item.level, "%s", item.message)
        elif isinstance(item, _LastWords):
            self.over.set()


# -- in the worker


def _perform(work: Work, inbox: Any, number: int) -> _Outcome:
    mouth = _Mouth(inbox, number)
    with _ending_with_its_children(), mouth.speaking():
        try:
            return _Outcome(work.perform(mouth.say))
        except SystemExit as error:
            if hasattr(error, "ray_terminate_msg"):  # Ray ends this process
                raise
            left = RuntimeError(f"the stage called sys.exit({error.code!r})")
            return _failed(left.with_traceback(error.__traceback__))
        except Exception as error:  # travels as a value: raised, Ray would wrap it, or lose it if it cannot be pickled
            return _failed(error)


@contextmanager
def _ending_with_its_children() -> Iterator[None]:
    """An interrupted try ends its process: what it has started would live on as long as that, and Ray keeps it."""
    try:
        yield
    except KeyboardInterrupt:
        os._exit(1)


def _failed(error: Exception) -> _Outcome:
    """An error for another process: without its causes, whose story it carries along."""
    pickled = b""
    with suppress(Exception):
        candidate = pickle.dumps(error)
        if str(pickle.loads(candidate)) == str(error):
            pickled = candidate
    return _Outcome(None, pickled, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


class _Mouth(logging.Handler):
    """Sends events and warnings to the inbox, in order, without holding the stage up."""

    def __init__(self, inbox: Any, number: int) -> None:
        super().__init__(logging.WARNING)
        self._inbox, self._number = inbox, number
        self._items: queue.SimpleQueue[object] = queue.SimpleQueue()

    def say(self, item: object) -> None:
        self._items.put(item)

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("ray"):
            self.say(_LogRecord(record.name, record.levelno, record.getMessage()))

    @contextmanager
    def speaking(self) -> Any:
        sender = threading.Thread(target=self._send, name="stage-events", daemon=True)
        sender.start()
        logging.getLogger().addHandler(self)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(self)
            self.say(_LastWords())
            sender.join(_LAST_WORDS_SECONDS)

    def _send(self) -> None:
        over = False
        while not over:
            items = [self._items.get()]
            time.sleep(_BATCH_SECONDS if isinstance(items[0], Event) and items[0].kind == "progress" else 0)
            with suppress(queue.Empty):
                while True:
                    items.append(self._items.get_nowait())
            over = isinstance(items[-1], _LastWords)
            try:
                ray.get(self._inbox.put.options(max_task_retries=-1).remote(self._number, items))
            except Exception as error:  # it is only the view that suffers
                _log.debug("the driver does not hear of the stage: %s", error)


# -- inside


def _asked(resources: Resources) -> dict[str, Any]:
    """Ray's options of a task with these resources."""
    if resources.own_workers:
        return {"num_cpus": 0, **_beside_driver(soft=True)}
    asked: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
    if resources.memory:
        asked["memory"] = resources.memory
    if resources.accelerator_type:
        asked["accelerator_type"] = resources.accelerator_type
    return asked


def _room(wanted: Resources, capacity: Resources) -> str:
    """What a stage that has not begun waits for, in words."""
    if wanted.own_workers:
        return "a worker process"
    kind = f" ({wanted.accelerator_type})" if wanted.accelerator_type else ""
    return f"a node with {_listed(wanted)} to spare{kind}; all nodes together have {_listed(capacity)}, in use or not"


def _listed(resources: Resources) -> str:
    memory = f" and {resources.memory / 1e9:.1f} GB of memory" if resources.memory else ""
    return f"{resources.num_cpus:g} CPU, {resources.num_gpus:g} GPU{memory}"


def _beside_driver(soft: bool) -> dict[str, Any]:
    """Ray's option for this process's own node. Otherwise it puts what takes nothing on any, actors at random."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft)}
