"""The routing decision: what would this request cost on each replica, in seconds? Pure.

    cost = a · slowness · (pending + w · missing + d · context + s · shortage)

    missing    prompt tokens the replica must compute: all but its leading cached blocks               [tokens]
    pending    tokens of earlier requests that are prefilled first                                     [tokens]
    context    tokens of context that the replica's running requests attend to at every decode step    [tokens]
    shortage   of the missing tokens, those for whose blocks others' must be evicted or preempted      [tokens]
    a          seconds to prefill a token; only makes costs readable where all replicas are alike
    slowness   of this replica, against its peers; 1 where they are alike (cluster/serve/calibration.py)
    w          why a missing token costs more than a waiting one: its prefill also slows everybody's decode and fills
               the cache. 3 to 8 is a flat optimum; 1 loses to plain affinity under load.
    d, s       a token of context, a token without room, in waiting tokens

There is no threshold. Equal costs go to the fewest active requests, then to the rendezvous hash (Thaler and
Ravishankar 1998) of the first missing block, so that requests which share a prefix nobody has yet meet on the
same replica, and a change of the replica set moves only what it must.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import NamedTuple

import xxhash

from cluster.serve.calibration import Speed
from llama.engine import reusable_blocks


@dataclass(frozen=True)
class CostCoefficients:
    """Seconds a prefill token takes, and what everything else weighs in such tokens.

    The weights alone decide a ranking. `caravan bench router` measures what a change of them does.
    """

    prefill_s_per_token: float = 1 / 32_000
    missing_weight: float = 5.0
    decode_weight: float = 0.03
    shortage_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"cost.{name}={value} must be zero or more")
        if self.prefill_s_per_token == 0:
            raise ValueError("cost.prefill_s_per_token=0 makes every replica cost the same; give seconds, such as 3e-5")


class Candidate(NamedTuple):
    """One replica as the router sees it at this moment.

    `matched_blocks`: leading blocks of this prompt that it holds, or is computing already. `draining`: it should get
    new requests only when nobody else can take them. `speed`: as learnt; None: as the coefficients say.
    """

    replica: str
    matched_blocks: int
    pending_prefill_tokens: int
    decode_context_tokens: int
    active_requests: int
    free_blocks: int
    draining: bool = False
    slowness: float = 1.0
    speed: Speed | None = None


class Score(NamedTuple):
    """A candidate's cost and what the request will find there. `wait_s`: until its first token, as predicted."""

    candidate: Candidate
    cost_s: float
    wait_s: float
    predicted_cached_tokens: int
    missing_tokens: int
    missing_blocks: int

    @property
    def replica(self) -> str:
        return self.candidate.replica


def choose(
    hashes: Sequence[bytes],
    num_tokens: int,
    block_size: int,
    candidates: Iterable[Candidate],
    coefficients: CostCoefficients,
    avoid: frozenset[str] = frozenset(),
) -> list[Score]:
    """Ranks the candidates, best first; those to avoid come last, behind those that drain.

    Args:
        hashes: the prompt's block hashes, one per full block.
        num_tokens: length of the prompt; its last token is always computed, so at most
            `reusable_blocks(num_tokens, block_size)` cached blocks can be used.
    """
    reusable = reusable_blocks(num_tokens, block_size)

    def order(score: Score) -> tuple[bool, bool, float, int]:
        candidate = score.candidate
        return candidate.replica in avoid, candidate.draining, score.cost_s, candidate.active_requests

    def tie(score: Score) -> tuple[int, str]:
        first_missing = hashes[min(score.candidate.matched_blocks, len(hashes) - 1)] if hashes else b""
        return -rendezvous_weight(first_missing, score.replica), score.replica

    scores = [
        _score(min(candidate.matched_blocks, reusable), num_tokens, block_size, candidate, coefficients)
        for candidate in candidates
    ]
    scores.sort(key=order)
    ranked: list[Score] = []
    for _, equals in groupby(scores, order):
        tied = list(equals)
        ranked += sorted(tied, key=tie) if len(tied) > 1 else tied
    return ranked


def rendezvous_weight(key: bytes, replica: str) -> int:
    """The weight of a replica for a key; the highest weight wins (highest-random-weight hashing)."""
    return xxhash.xxh3_64_intdigest(key + replica.encode())


def _score(
    cached_blocks: int, num_tokens: int, block_size: int, candidate: Candidate, coefficients: CostCoefficients
) -> Score:
    cached_tokens = cached_blocks * block_size
    missing_tokens = num_tokens - cached_tokens
    missing_blocks = -(-num_tokens // block_size) - cached_blocks
    shortage_tokens = max(0, missing_blocks - candidate.free_blocks) * block_size
    tokens = (
        candidate.pending_prefill_tokens
        + coefficients.missing_weight * missing_tokens
        + coefficients.decode_weight * candidate.decode_context_tokens
        + coefficients.shortage_weight * shortage_tokens
    )
    cost = coefficients.prefill_s_per_token * candidate.slowness * tokens
    speed = candidate.speed or Speed(0.0, coefficients.prefill_s_per_token)
    wait = speed.base_s + speed.s_per_token * (candidate.pending_prefill_tokens + missing_tokens)
    return Score(candidate, cost, wait, cached_tokens, missing_tokens, missing_blocks)
