"""An ingress's parts and replicas with real engines in one process, and in between what Ray does, to be broken."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError

from cluster.serve.broadcast import Broadcast
from cluster.serve.channel import Inbox
from cluster.serve.engine_client import EngineClient
from cluster.serve.events import Subscriptions
from cluster.serve.messages import GenerateRequest, ReplicaInfo, ReplicaTarget
from cluster.serve.replica import EngineReplica, ReplicaConfig
from cluster.serve.state import RoutingState
from llama.engine import Engine, EngineConfig, SamplingParams, generation_root, hash_blocks
from tests.llama.engine.models import random_model

BLOCK = 4
CONFIG = EngineConfig(num_blocks=200, block_size=BLOCK, max_batched_tokens=32, max_running=8)


class Stream:
    """A streaming call. `flowing` lets its items through, `drop` loses the next, `cut` ends it on our side only."""

    def __init__(self, items: AsyncGenerator) -> None:
        self.queue: asyncio.Queue = asyncio.Queue()
        self.cancelled = False
        self.drop = False
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.received = 0
        self.task = asyncio.create_task(self._pump(items))

    async def _pump(self, items: AsyncGenerator) -> None:
        try:
            async for item in items:
                await self.flowing.wait()
                if self.drop:
                    self.drop = False
                else:
                    self.queue.put_nowait(item)
            self.queue.put_nowait(None)
        except Exception as error:
            self.queue.put_nowait(RayTaskError("subscribe", "traceback", error).as_instanceof_cause())
        finally:
            await items.aclose()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        item = await self.queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        self.received += 1
        return item

    def cut(self, error: BaseException) -> None:
        self.queue.put_nowait(error)

    def cancel(self) -> None:
        self.cancelled = True
        self.task.cancel()


class Call:
    """A plain call. `break_off` fails it on our side; the replica goes on."""

    def __init__(self, work: Any) -> None:
        self.task = asyncio.ensure_future(work)
        self.result: asyncio.Future = asyncio.get_running_loop().create_future()
        self.task.add_done_callback(self._finish)
        self.deaf = False

    def _finish(self, task: asyncio.Future) -> None:
        if self.result.done():
            task.cancelled() or task.exception()
        elif task.cancelled():
            self.result.cancel()
        elif (error := task.exception()) is not None:
            self.result.set_exception(RayTaskError("generate", "traceback", error).as_instanceof_cause())
        else:
            self.result.set_result(task.result())

    def __await__(self):
        return self.result.__await__()

    def break_off(self, error: Exception) -> None:
        self.deaf = True
        self.result.set_exception(error)

    def cancel(self) -> None:
        if not self.deaf:
            self.task.cancel()


class Link:
    """The handle of the engine deployment. `streams` and `calls`: all that were made, in order, with their replica.
    `routing` lets new calls find theirs."""

    def __init__(self, state: RoutingState, replicas: dict[str, EngineReplica]) -> None:
        self.state = state
        self.replicas = replicas
        self.streams: list[tuple[str, Stream]] = []
        self.calls: list[tuple[str, Call]] = []
        self.routing = asyncio.Event()
        self.routing.set()

    def options(self, *, method_name: str, stream: bool = False) -> "_Method":
        return _Method(self, method_name)

    def stream_of(self, replica: str) -> Stream:
        return next(stream for name, stream in reversed(self.streams) if name == replica)

    def kill(self, replica: str) -> None:
        """As SIGKILL: whatever was under way there fails here."""
        for name, stream in self.streams:
            if name == replica:
                stream.cut(ActorDiedError())
        for name, call in self.calls:
            if name == replica and not call.result.done():
                call.break_off(ActorDiedError())


class _Method:
    def __init__(self, link: Link, name: str) -> None:
        self.link = link
        self.name = name

    def remote(self, argument: Any) -> Any:
        link = self.link
        if isinstance(argument, GenerateRequest) and not link.routing.is_set():
            return Call(self._when_routed(argument))
        if isinstance(argument, GenerateRequest):
            name = link.state.select(argument, link.state.replicas)[0]
            call = Call(getattr(link.replicas[name], self.name)(argument))
            link.calls.append((name, call))
            return call
        assert isinstance(argument, ReplicaTarget)
        routed = argument.replica in link.state.replicas
        name = argument.replica if routed else next(iter(link.replicas))  # as our router: another one refuses it
        method = getattr(link.replicas[name], self.name)
        if self.name == "subscribe":
            stream = Stream(method(argument))
            link.streams.append((argument.replica, stream))
            return stream
        return Call(method(argument))

    async def _when_routed(self, request: GenerateRequest) -> None:
        await self.link.routing.wait()
        await self.remote(request)


class _Server:
    def check(self) -> None: ...


def make_replica(name: str, config: EngineConfig = CONFIG, step_s: float = 0.0) -> EngineReplica:
    """A replica without Serve, on the running loop. `step_s`: how long each of its steps takes at least."""
    replica = EngineReplica.__new__(EngineReplica)
    engine = Engine(random_model(), config=config, weights_id="w")
    run = engine._runner.run

    def slow(inputs):
        time.sleep(step_s)
        return run(inputs)

    engine._runner.run = slow  # type: ignore[method-assign]
    replica._server = _Server()  # type: ignore[assignment]
    replica._config = ReplicaConfig("family", "shape", config)
    replica._engine = engine
    replica._name = name
    replica._draining = False
    replica._failure = None
    replica._reconfiguring = asyncio.Lock()
    replica._loaded = True
    replica._info = ReplicaInfo(name, 1, "node", "w", 97, engine.max_total_tokens, BLOCK, 200, "family")
    replica._broadcast = Broadcast(engine, replica._load, replica._current_info)
    engine.on_events = replica._broadcast.notify
    return replica


class World:
    """One ingress process and its replicas. Use it as an async context manager."""

    def __init__(self, *names: str, step_s: float = 0.0, config: EngineConfig = CONFIG) -> None:
        self.state = RoutingState()
        self.replicas = {name: make_replica(name, config, step_s) for name in names}
        self._made = list(self.replicas.values())
        self.link = Link(self.state, self.replicas)
        self.inbox = Inbox("me")
        self.client = EngineClient(self.link, self.state, self.inbox, "family")  # type: ignore[arg-type]
        self.subscriptions = Subscriptions(self.link, self.state, self.inbox)  # type: ignore[arg-type]

    async def __aenter__(self) -> "World":
        self.state.set_replicas(list(self.replicas))
        self.subscriptions.start()
        await until(lambda: all(status.fresh for status in self.state.status()))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.subscriptions.stop()
        for replica in self._made:
            with suppress(Exception):
                await asyncio.to_thread(replica._engine.close)

    def engine(self, name: str) -> Engine:
        return self.replicas[name]._engine

    def at_rest(self) -> bool:
        """Nothing is left anywhere of any request."""
        return (
            not self.inbox.open_calls()
            and all(status.active_requests == 0 for status in self.state.status())
            and all(replica.at_rest() for replica in map(_Looked, self.replicas.values()))
        )


class _Looked:
    def __init__(self, replica: EngineReplica) -> None:
        self.replica = replica

    def at_rest(self) -> bool:
        stats, broadcast = self.replica._engine.stats(), self.replica._broadcast
        used = stats.num_blocks - stats.free_blocks
        open_answers = [answer for outbox in broadcast._outboxes.values() for answer in outbox.answers]
        return not (stats.running or stats.waiting or used or open_answers or broadcast._pending)


def make_request(number: int, *, max_tokens: int = 20, n: int = 1, weights_id: str = "w", **fields) -> GenerateRequest:
    token_ids = tuple((number * 7 + k) % 97 for k in range(10))
    hashes = tuple(hash_blocks(generation_root(weights_id), token_ids, BLOCK))
    params = SamplingParams(temperature=0, max_tokens=max_tokens, n=n)
    return GenerateRequest(f"r{number}", token_ids, hashes, params, weights_id, **fields)


async def until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.002)
