"""Two routers that know what no router can: the modelled engines as they are at this moment, and every answer's length.

perfect   our cost function, on the truth
oracle    rolls every replica forward with and without the request, and takes the replica whose requests, old and
          new, lose least by it. It is greedy: it knows nothing of what comes next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster.serve.cost import Candidate, CostCoefficients, choose
from cluster.serve.index import BlockIndex
from cluster.serve.messages import GenerateRequest
from cluster.serve.replay.rollout import Job, rollout
from cluster.serve.replay.simulated_serve import SimulatedReplica
from llama.engine import reusable_blocks
from llama.engine.request import Request

FIRST_TOKEN_WEIGHT = 5.0
"""What the oracle takes a second until a first token to be worth, in seconds until an end."""


@dataclass
class _Known:
    """One replica as it is: its requests, those on their way to it included."""

    replica: SimulatedReplica
    jobs: list[Job]
    coming: set[bytes]
    """Blocks that these requests will have computed."""

    @property
    def free_blocks(self) -> int:
        return self.replica.engine.stats().free_blocks


class Omniscience:
    """The truth about the replicas, read from their engines when a request is routed."""

    def __init__(self, replicas: Sequence[SimulatedReplica]) -> None:
        self._replicas = {replica.name: replica for replica in replicas}
        self._index = BlockIndex()
        self._epochs: dict[str, str] = {}
        self._travelling: dict[str, dict[str, GenerateRequest]] = {replica.name: {} for replica in replicas}
        for replica in replicas:
            replica.engine.drain_events()
            snapshot = replica.engine.snapshot()
            self._epochs[replica.name] = snapshot.epoch
            self._index.load_snapshot(replica.name, snapshot)

    def send(self, name: str, request: GenerateRequest) -> None:
        """The request was routed there."""
        self._travelling[name][request.request_id] = request

    def matches(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Cached leading blocks by replica."""
        for name, replica in self._replicas.items():
            for event in replica.engine.drain_events():
                self._index.apply(name, event, epoch=self._epochs[name])
        return self._index.match(hashes)

    def replica(self, name: str) -> _Known:
        """What is in a replica. Call `matches` before."""
        replica = self._replicas[name]
        engine = replica.engine
        known = _Known(replica, [], set())
        computing = {item.request.request_id: item.end for item in engine.step}
        for request in engine.unfinished():
            known.jobs.append(self._job(known, request, computing.get(request.request_id)))
            self._travelling[name].pop(request.request_id, None)
        for travelling in self._travelling[name].values():
            known.jobs.append(self.new_job(known, travelling, self._index.match(travelling.hashes)[name]))
        return known

    def _job(self, known: _Known, request: Request, computed: int | None) -> Job:
        size = known.replica.engine.config.block_size
        left = request.params.max_tokens - request.num_generated
        length = len(request.token_ids)
        if request.admission is None:
            matched = self._index.match(request.table.hashes)[known.replica.name]
            return self._waiting(known, request.table.hashes, length, left, matched, size)
        end = max(request.num_computed, computed or 0)
        known.coming.update(request.table.hashes[request.num_computed // size :])
        if end == length and computed is not None:  # the step under way samples its next token
            return Job(0, length + 1, left - 1, started=True)
        return Job(length - end, length, left, started=True)

    def new_job(self, known: _Known, request: GenerateRequest, matched: int) -> Job:
        """The request as the last one of a replica's."""
        size = known.replica.engine.config.block_size
        return self._waiting(known, request.hashes, len(request.token_ids), request.params.max_tokens, matched, size)

    @staticmethod
    def _waiting(known: _Known, hashes: Sequence[bytes], length: int, output: int, matched: int, size: int) -> Job:
        held = matched
        while held < len(hashes) and hashes[held] in known.coming:
            held += 1  # it will wait until these are computed for another
        held = min(held, reusable_blocks(length, size))
        known.coming.update(hashes[held:])
        return Job(length - held * size, length, output, -(-length // size) - held)


class YardstickRouter(RequestRouter):
    """Asks a function of the request for a replica's name."""

    def initialize_state(self, choose: Callable[[GenerateRequest], str]) -> None:  # type: ignore[override]
        self._choose = choose

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        name = self._choose(pending_request.args[0])
        return [[replica for replica in candidate_replicas if replica.replica_id.unique_id == name]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Nothing: the choice was counted when it was made."""


def oracle(truth: Omniscience, names: Sequence[str], now: Callable[[], float]) -> Callable[[GenerateRequest], str]:
    """Chooses the replica where first tokens and ends, of all its requests together, come least later."""

    def pick(request: GenerateRequest) -> str:
        matches = truth.matches(request.hashes)
        losses = {name: _loss(truth, name, request, matches[name], now()) for name in names}
        best = min(losses, key=lambda name: losses[name])
        truth.send(best, request)
        return best

    return pick


def _loss(truth: Omniscience, name: str, request: GenerateRequest, matched: int, now: float) -> float:
    known = truth.replica(name)
    engine = known.replica.engine
    start = max(now, engine.step_end) if engine.step else now
    free, budget, timing = known.free_blocks, engine.config.max_batched_tokens, engine.timing
    before = rollout(known.jobs, start_s=start, free_blocks=free, max_batched_tokens=budget, timing=timing)
    jobs = [*known.jobs, truth.new_job(known, request, matched)]
    after = rollout(jobs, start_s=start, free_blocks=free, max_batched_tokens=budget, timing=timing)
    first = sum(first for first, _ in after) - sum(first for first, _ in before)
    ends = sum(end for _, end in after) - sum(end for _, end in before)
    return FIRST_TOKEN_WEIGHT * first + ends


def perfect(truth: Omniscience, names: Sequence[str], cost: CostCoefficients) -> Callable[[GenerateRequest], str]:
    """Our cost on what is, instead of what is known of it."""

    def pick(request: GenerateRequest) -> str:
        matches = truth.matches(request.hashes)
        candidates = []
        for name in names:
            known = truth.replica(name)
            started = [job for job in known.jobs if job.started and job.missing == 0]
            candidates.append(
                Candidate(
                    replica=name,
                    matched_blocks=matches[name],
                    pending_prefill_tokens=sum(job.missing for job in known.jobs),
                    decode_context_tokens=sum(job.context for job in started),
                    active_requests=len(known.jobs),
                    free_blocks=known.free_blocks - sum(job.blocks for job in known.jobs),
                )
            )
        size = known.replica.engine.config.block_size
        best = choose(request.hashes, len(request.token_ids), size, candidates, cost)[0].replica
        truth.send(best, request)
        return best

    return pick
