"""What travels between the ingress, the router and the engine replicas. Plain data, no behaviour."""

from dataclasses import dataclass
from typing import Any

from llama.engine import BlockEvent, CacheSnapshot, Chunk, SamplingParams


@dataclass(frozen=True)
class GenerateRequest:
    """A tokenised prompt on its way to a replica of the router's choice.

    `hashes` are the prompt's block hashes (one per full block), computed once by the ingress. `weights_id` names the
    model that the prompt is for: during a redeployment replicas of two models run. `avoid` names replicas to use only
    if no other is left: those on which this request has already failed. `salt`, `priority` and `timeout_s` are the
    engine's. `source` is the ingress process that asks; `max_wait_s` is how long it may be until the first token.
    `call` numbers the attempts of all requests of that process: chunks come back under it.
    `caller` is whose key it came with, and `arrived` when: `time.monotonic()` of the ingress.
    """

    request_id: str
    token_ids: tuple[int, ...]
    hashes: tuple[bytes, ...]
    params: SamplingParams
    weights_id: str
    avoid: frozenset[str] = frozenset()
    salt: str = ""
    priority: int = 0
    timeout_s: float | None = None
    max_wait_s: float | None = None
    source: str = ""
    call: int = 0
    caller: str = ""
    arrived: float | None = None


@dataclass(frozen=True)
class ReplicaTarget:
    """A control call pinned to one replica (subscribe, flush): nobody else may answer it."""

    replica: str


@dataclass(frozen=True)
class Subscription(ReplicaTarget):
    """Asks a replica for all that happens there, the chunks of this process's requests among it.

    `source` names the asking process and `process` is its Ray actor, by which the replica notices its death (None: it
    has none, and must say good-bye). `renews`: the stream before this one is read to its end, so nothing gets lost;
    without it, the requests of `source` that run there end, for some of their chunks may have been.
    """

    source: str
    process: Any = None
    renews: bool = False


@dataclass(frozen=True)
class ReplicaInfo:
    """What a replica is. Only its weights change while it lives: their `weights_id`, the URI `model` they come from,
    and the `revision`, which tells apart two loads from there.

    `max_seq_len`: tokens of a prompt and its answer, at most. `family` names what a swap leaves as it is, the tokenizer
    among it (see cluster/serve/weights.py): an ingress asks only replicas of its own.
    """

    replica: str
    pid: int
    node_id: str
    weights_id: str
    vocab_size: int
    max_seq_len: int
    block_size: int
    num_blocks: int
    family: str = ""
    model: str = ""
    revision: int = 0


@dataclass(frozen=True)
class ReplicaLoad:
    """A replica's engine statistics at one moment; the token counters run from its start.

    `draining`: new requests wait there until its weights are swapped.
    """

    running: int
    waiting: int
    free_blocks: int
    pending_prefill_tokens: int
    decode_context_tokens: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    draining: bool = False


@dataclass(frozen=True)
class Admission:
    """A request that has reached a replica. `hashes` are of the blocks that its prefill will store."""

    request_id: str
    missing_tokens: int
    hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class ReplicaUpdate:
    """One item of a subscription: all that happened since the item before.

    The first carries `info`, `snapshot` and every admission whose prefill is not over. `admitted` are the requests
    that arrived, from whatever ingress; `prefilled` those whose prefill is over, or that ended before it was.

    `number` counts the items of one ingress process at one replica, over renewals of its subscription, from 1.
    `chunks` are what has been computed for requests of that process, each with its `GenerateRequest.call`; their block
    events are in this item or were in one before. `open_calls`: requests of that process that are not over.
    `made_at`: Unix time of the oldest of `events`. `seq`: the number of the last event until now, None where that is
    not known; who has not heard of it has missed some.
    """

    epoch: str
    load: ReplicaLoad
    events: tuple[BlockEvent, ...] = ()
    snapshot: CacheSnapshot | None = None
    info: ReplicaInfo | None = None
    admitted: tuple[Admission, ...] = ()
    prefilled: tuple[str, ...] = ()
    number: int = 0
    chunks: tuple[tuple[int, Chunk], ...] = ()
    open_calls: int = 0
    made_at: float | None = None
    seq: int | None = None


class WrongModel(RuntimeError):
    """A request reached a replica of another model than it is for."""


class WrongReplica(RuntimeError):
    """A pinned call reached another replica, because the one it names has left."""


class NotFollowed(RuntimeError):
    """A request's chunks cannot be delivered: its ingress has no subscription at this replica, or it broke."""
