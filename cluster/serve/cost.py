"""The routing decision: what would this request cost on each replica, in seconds? Pure.

    cost = a · (pending prefill + w · missing) + b · decode context + c · max(0, need − free)

    missing          prompt tokens the replica must compute: all but its leading cached blocks   [tokens]
    pending prefill  tokens of earlier requests that are prefilled first                         [tokens]
    decode context   tokens of context the replica's running requests attend to at every step    [tokens]
    need, free       blocks this prompt must newly hold; blocks free to take                     [blocks]
    w                why a missing token costs more than a waiting one: its prefill also slows everybody's
                     decode and fills the cache. 3 to 8 is a flat optimum; 1 loses to plain affinity under load.

There is no threshold. Equal costs go to the fewest active requests, then to the rendezvous hash (Thaler and
Ravishankar 1998) of the first missing block, so that requests which share a prefix nobody has yet meet on the
same replica, and a change of the replica set moves only what it must.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from llama.engine import reusable_blocks


@dataclass(frozen=True)
class CostCoefficients:
    """Seconds per unit of each term. Only their ratios decide a ranking; the scale makes costs readable."""

    prefill_s_per_token: float = 1 / 32_000
    missing_weight: float = 5.0
    decode_s_per_context_token: float = 0.03 / 32_000
    shortage_s_per_block: float = 16 / 32_000

    def __post_init__(self) -> None:
        for name in ("prefill_s_per_token", "missing_weight", "decode_s_per_context_token", "shortage_s_per_block"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"cost.{name}={value} must be zero or more")


@dataclass(frozen=True)
class Candidate:
    """One replica as the router sees it at this moment. `matched_blocks` are leading blocks of this prompt."""

    replica: str
    matched_blocks: int
    pending_prefill_tokens: int
    decode_context_tokens: int
    active_requests: int
    free_blocks: int


@dataclass(frozen=True)
class Score:
    """A candidate's cost and what the request will find there."""

    replica: str
    cost_s: float
    predicted_cached_tokens: int
    missing_tokens: int
    missing_blocks: int


def choose(
    hashes: Sequence[bytes],
    num_tokens: int,
    block_size: int,
    candidates: Iterable[Candidate],
    coefficients: CostCoefficients,
) -> list[Score]:
    """Ranks the candidates, best first.

    Args:
        hashes: the prompt's block hashes, one per full block.
        num_tokens: length of the prompt; its last token is always computed, so at most
            `reusable_blocks(num_tokens, block_size)` cached blocks can be used.
    """
    reusable = reusable_blocks(num_tokens, block_size)
    ranked = []
    for candidate in candidates:
        score = _score(min(candidate.matched_blocks, reusable), num_tokens, block_size, candidate, coefficients)
        first_missing = hashes[min(candidate.matched_blocks, len(hashes) - 1)] if hashes else b""
        tie = -rendezvous_weight(first_missing, candidate.replica)
        ranked.append(((score.cost_s, candidate.active_requests, tie, candidate.replica), score))
    ranked.sort(key=lambda entry: entry[0])
    return [score for _, score in ranked]


def rendezvous_weight(key: bytes, replica: str) -> int:
    """The weight of a replica for a key; the highest weight wins (highest-random-weight hashing)."""
    return xxhash.xxh3_64_intdigest(key + replica.encode())


def _score(
    cached_blocks: int, num_tokens: int, block_size: int, candidate: Candidate, coefficients: CostCoefficients
) -> Score:
    cached_tokens = cached_blocks * block_size
    missing_tokens = num_tokens - cached_tokens
    missing_blocks = -(-num_tokens // block_size) - cached_blocks
    cost = (
        coefficients.prefill_s_per_token
        * (candidate.pending_prefill_tokens + coefficients.missing_weight * missing_tokens)
        + coefficients.decode_s_per_context_token * candidate.decode_context_tokens
        + coefficients.shortage_s_per_block * max(0, missing_blocks - candidate.free_blocks)
    )
    return Score(candidate.replica, cost, cached_tokens, missing_tokens, missing_blocks)
