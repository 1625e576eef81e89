"""Engine replicas of a replay on Serve."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from ray import serve

from cluster.serve.loopback import NodeOnlyServer
from cluster.serve.messages import GenerateRequest
from cluster.serve.replay.engines import EngineSpec
from cluster.serve.replay.trace import VOCAB_SIZE
from cluster.serve.replica import EngineReplica, ReplicaConfig
from cluster.serve.settings import EngineOptions
from llama.engine import Chunk, Engine, EngineFailed

FAMILY = "replay"


@dataclass(frozen=True)
class Answered:
    """When one machine's monotonic clock showed what, in seconds; and cached tokens of the prompt."""

    replica: str
    first_token: float
    ended: float
    cached_tokens: int


class PeerReplica:
    """A replica behind one of Ray's routers: one plain call for a request, which returns when it is over.

    Tokens are not streamed, because each costs Ray more than half a millisecond and it is not the streaming that is
    compared; when they came is in the answer.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._server = NodeOnlyServer()
        self._engine = spec.make()
        self._name = serve.get_replica_context().replica_id.unique_id

    async def generate(self, request: GenerateRequest) -> Answered:
        """Works on a request. Raises what the engine's `add_request` raises."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Answered] = loop.create_future()
        first: float | None = None

        def sink(item: Chunk | EngineFailed) -> None:
            nonlocal first
            now = time.monotonic()
            if isinstance(item, EngineFailed):
                loop.call_soon_threadsafe(answered.set_exception, item)
                return
            first = first or now
            if item.finish_reason is not None:
                answer = Answered(self._name, first, now, item.num_cached_tokens)
                loop.call_soon_threadsafe(answered.set_result, answer)

        self._engine.add_request(request.token_ids, request.params, request_id=request.request_id, sink=sink)
        return await answered

    def check_health(self) -> None:
        """Serve's probe."""
        self._server.check()
        self._engine.check_health(120.0)


class CaravanReplica(EngineReplica):
    """The production replica around another engine. Like the peers' it does not stream: of an answer the first and
    the last chunk are sent, while its cache events, load and admissions go out as ever."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        super().__init__(ReplicaConfig(family=FAMILY, shape="", engine=spec.config))
        self._load_model(EngineOptions(model=""))
        every = self._broadcast.sink
        self._broadcast.sink = lambda answer: _first_and_last(every(answer))  # type: ignore[method-assign]

    def _make_engine(self, uri: str) -> tuple[Engine, int]:
        return cast(Engine, self._spec.make()), VOCAB_SIZE


def _first_and_last(sink: Callable[[Chunk | EngineFailed], None]) -> Callable[[Chunk | EngineFailed], None]:
    """A sink for one completion's chunks that leaves out those in the middle."""
    begun = False

    def take(item: Chunk | EngineFailed) -> None:
        nonlocal begun
        if not begun or isinstance(item, EngineFailed) or item.finish_reason is not None:
            begun = True
            sink(item)

    return take
