"""Two ingress processes and many replicas in virtual time, everything between them broken at random, by seed.

The parts are the production ones, from the client to the books of the engines; only Ray and the model are not there.
"""

import asyncio
import random
from collections import Counter
from itertools import count

import pytest
from ray.exceptions import ActorUnavailableError

from cluster.serve.api_error import ApiError
from cluster.serve.broadcast import Broadcast
from cluster.serve.channel import Inbox
from cluster.serve.engine_client import EngineClient
from cluster.serve.events import Subscriptions
from cluster.serve.messages import GenerateRequest, ReplicaInfo
from cluster.serve.replay import virtual_time
from cluster.serve.replay.modelled_engine import ModelledEngine
from cluster.serve.replay.timing import StepTime
from cluster.serve.replica import EngineReplica, ReplicaConfig
from cluster.serve.state import RoutingState
from llama.engine import EngineConfig, SamplingParams, generation_root, hash_blocks
from tests.cluster.serve.linked import Link, Stream

BLOCK = 4
CONFIG = EngineConfig(num_blocks=60, block_size=BLOCK, max_batched_tokens=16, max_running=6, max_waiting=200)
STEP = StepTime(fixed_s=0.005, prefill_s_per_token=0.001, decode_s_per_context_token=1e-5)
FAMILIES = 5


def _replica(name: str, weights_id: str) -> EngineReplica:
    """A replica without Serve and without a model."""
    replica = EngineReplica.__new__(EngineReplica)
    engine = ModelledEngine(CONFIG, STEP, weights_id=weights_id)
    replica._config = ReplicaConfig("family", "shape", CONFIG)
    replica._engine = engine  # type: ignore[assignment]
    replica._name = name
    replica._draining = False
    replica._info = ReplicaInfo(
        name, 1, "node", weights_id, 97, engine.max_total_tokens, BLOCK, CONFIG.num_blocks, "family"
    )
    replica._broadcast = Broadcast(engine, replica._load, replica._current_info)
    engine.on_events = replica._broadcast.notify
    return replica


class _Ingress:
    def __init__(self, name: str, replicas: dict[str, EngineReplica]) -> None:
        self.state = RoutingState(clock=asyncio.get_running_loop().time)
        self.link = Link(self.state, replicas)
        self.inbox = Inbox(name)
        self.client = EngineClient(self.link, self.state, self.inbox, "family")  # type: ignore[arg-type]
        self.subscriptions = Subscriptions(self.link, self.state, self.inbox)  # type: ignore[arg-type]

    def route_to(self, names: list[str]) -> None:
        self.state.set_replicas(names)


class _Chaos:
    """The cluster, and what happens to it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.loop = asyncio.get_running_loop()
        self.replicas: dict[str, EngineReplica] = {}
        self.routed: list[str] = []
        self.names = (f"replica-{number}" for number in count())
        self.numbers = count()
        self.weights_id = "weights-0"
        self.seen: Counter[str] = Counter()
        self.ingresses = [_Ingress(name, self.replicas) for name in ("one", "two")]

    def add(self) -> None:
        name = next(self.names)
        self.replicas[name] = _replica(name, self.weights_id)
        self.routed.append(name)
        self._tell()

    def remove(self, *, killed: bool) -> None:
        """As a scale-down, or as SIGKILL; what was killed may even go on computing, cut off from everyone."""
        if len(self.routed) == 1:
            return
        name = self.rng.choice(self.routed)
        self.routed.remove(name)
        if killed:
            for ingress in self.ingresses:
                ingress.link.kill(name)
        self._tell()

    def _tell(self) -> None:
        """Serve tells the processes, each in its own time, how it is by then."""
        for ingress in self.ingresses:
            self.loop.call_later(self.rng.choice([0, 0, 0.5]), lambda to=ingress: to.route_to(list(self.routed)))

    def stream(self) -> Stream | None:
        streams = [stream for name, stream in self.rng.choice(self.ingresses).link.streams if name in self.routed]
        return self.rng.choice(streams[-4:]) if streams else None

    def damage(self, kind: str) -> None:
        stream = self.stream()
        if stream is None:
            return
        put = stream.queue.put_nowait
        held: list[object] = []

        def swapped(item: object) -> None:
            held.append(item)
            if len(held) == 2:
                stream.queue.put_nowait = put  # type: ignore[method-assign]
                put(held[1])
                put(held[0])

        def doubled(item: object) -> None:
            stream.queue.put_nowait = put  # type: ignore[method-assign]
            put(item)
            put(item)

        if kind == "lost":
            stream.drop = True
        elif kind == "reordered":
            stream.queue.put_nowait = swapped  # type: ignore[method-assign]
        elif kind == "doubled":
            stream.queue.put_nowait = doubled  # type: ignore[method-assign]
        elif kind == "cut":
            stream.cut(ActorUnavailableError("cut", None))
        else:
            stream.flowing.clear()
            self.loop.call_later(self.rng.uniform(0.1, 15), stream.flowing.set)

    def swap(self) -> None:
        """New weights wherever nothing runs; the others follow with the next swap."""
        self.weights_id = f"weights-{self.seen['swap']}"
        for name in self.routed:
            replica = self.replicas[name]
            core = replica._engine._core
            if not core.has_work and core.weights_id != self.weights_id:
                core.swap(self.weights_id)
                replica._broadcast.notify()
                replica._broadcast.touch()

    async def ask(self) -> None:
        ingress, number, rng = self.rng.choice(self.ingresses), next(self.numbers), self.rng
        info = ingress.state.model("family")
        if info is None:
            return
        family = rng.randrange(FAMILIES)
        common = [(family * 17 + position) % 97 for position in range(rng.randrange(40))]
        token_ids = (*common, *(rng.randrange(97) for _ in range(rng.randrange(1, 12))))
        request = GenerateRequest(
            f"request-{number}",
            token_ids,
            tuple(hash_blocks(generation_root(info.weights_id), token_ids, BLOCK)),
            SamplingParams(max_tokens=rng.randrange(1, 25), n=rng.choice([1, 1, 1, 2])),
            info.weights_id,
        )
        patience = rng.choice([None, None, None, rng.uniform(0.01, 0.3)])
        try:
            async with asyncio.timeout(patience):
                items = await ingress.client.complete(request)
        except TimeoutError:
            self.seen["left"] += 1
        except ApiError as error:
            self.seen[f"status {error.status}"] += 1
        else:
            self.seen["answered"] += 1
            generated = Counter(item.chunk.index for item in items for _ in item.chunk.token_ids)
            assert generated == dict.fromkeys(range(request.params.n), request.params.max_tokens)

    def happen(self) -> None:
        kinds = {"add": 3, "down": 2, "kill": 3, "lost": 6, "reordered": 6, "doubled": 3, "cut": 3, "stall": 2}
        kinds |= {"swap": 2, "flush": 2}
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        self.seen[kind] += 1
        if kind == "add" and len(self.routed) < 6:
            self.add()
        elif kind in ("down", "kill"):
            self.remove(killed=kind == "kill")
        elif kind == "swap":
            self.swap()
        elif kind == "flush":
            self.replicas[self.rng.choice(self.routed)]._engine.flush_cache()
        elif kind != "add":
            self.damage(kind)


async def run_chaos(seed: int, happenings: int) -> Counter[str]:
    chaos = _Chaos(seed)
    for _ in range(3):
        chaos.add()
    for ingress in chaos.ingresses:
        ingress.subscriptions.start()
    asked = []
    for _ in range(happenings):
        for _ in range(chaos.rng.randrange(8)):
            asked.append(asyncio.create_task(chaos.ask()))
            await asyncio.sleep(chaos.rng.expovariate(20))
        chaos.happen()
    await asyncio.gather(*asked)
    await asyncio.sleep(100)  # longer than any stall, silence or renewal
    _check(chaos)
    for ingress in chaos.ingresses:
        await ingress.subscriptions.stop()
    for replica in chaos.replicas.values():
        replica._engine.close()
    return chaos.seen


def _check(chaos: _Chaos) -> None:
    """Everyone knows exactly what is cached, and nothing is left of any request."""
    for ingress in chaos.ingresses:
        state = ingress.state
        assert set(state.replicas) == set(state._index.replicas) == set(chaos.routed)
        state._index.check_integrity()
        for status in state.status():
            truth = set(chaos.replicas[status.replica]._engine.snapshot().hashes)
            assert status.fresh and status.cached_blocks == len(truth), status.replica
            assert all(state._index.holds(status.replica, block_hash) for block_hash in truth)
            assert status.active_requests == 0
        assert not ingress.inbox.open_calls() and not len(state._promises) and not len(state._ledger)
    for name in chaos.routed:
        engine, broadcast = chaos.replicas[name]._engine, chaos.replicas[name]._broadcast
        engine.check_integrity()
        assert engine.stats().free_blocks == CONFIG.num_blocks
        assert not broadcast._pending and not any(outbox.answers for outbox in broadcast._outboxes.values())


@pytest.mark.parametrize("seed", range(3))
def test_the_index_is_the_union_of_the_caches_after_whatever_happened(seed):
    seen = virtual_time.run(run_chaos(seed, 60))
    assert min(seen[kind] for kind in ("add", "down", "kill", "lost", "reordered", "cut", "swap", "answered")) > 0
