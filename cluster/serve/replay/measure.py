"""What a replay is judged by: times, hits, balance, and what the routing itself cost. Pure."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama.bench.workload import percentile


@dataclass
class Outcome:
    """What became of one request. Times in seconds from the replay's start; None: it did not come to that."""

    arrived: float
    prompt_tokens: int
    replica: str = ""
    first_token: float | None = None
    ended: float | None = None
    cached_tokens: int = 0
    predicted_tokens: int | None = None
    """Cached tokens that the router foresaw, where it does."""
    work_s: float = 0.0
    """What it took of a saturated replica."""
    error: str = ""


@dataclass
class Replay:
    """All that one replay of one policy measured.

    `seconds`: until the last request ended. `picks_s`: of each pick. `lags_s`: how late the router's index
    knew of blocks, from the event (simulated) or from the last token of the request that they belong to (on Serve).
    """

    outcomes: list[Outcome]
    replicas: int
    seconds: float
    picks_s: list[float] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def summary(replay: Replay, deadline_s: float) -> dict[str, Any]:
    """The figures of one policy. `goodput`: share of all requests whose first token came within `deadline_s`; `names`:
    of the replicas that answered."""
    answered = [outcome for outcome in replay.outcomes if outcome.ended is not None and not outcome.error]
    first = [outcome.first_token - outcome.arrived for outcome in answered if outcome.first_token is not None]
    whole = [outcome.ended - outcome.arrived for outcome in answered if outcome.ended is not None]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in answered)
    figures: dict[str, Any] = {
        "requests": len(replay.outcomes),
        "rejects": len(replay.outcomes) - len(answered),
        **_spread("ttft", first),
        **_spread("e2e", whole),
        "goodput": sum(seconds <= deadline_s for seconds in first) / len(replay.outcomes),
        "hit_rate": sum(outcome.cached_tokens for outcome in answered) / max(1, prompt_tokens),
        "imbalance": imbalance(answered, replay.replicas),
        "seconds": replay.seconds,
        "names": sorted({outcome.replica for outcome in answered}),
    }
    foreseen = [outcome for outcome in answered if outcome.predicted_tokens is not None]
    if foreseen:
        error = sum(abs(outcome.cached_tokens - (outcome.predicted_tokens or 0)) for outcome in foreseen)
        figures["predicted_error"] = error / max(1, sum(outcome.prompt_tokens for outcome in foreseen))
    for name, values, unit in (("pick_us", replay.picks_s, 1e6), ("index_lag_ms", replay.lags_s, 1e3)):
        for share in (50, 99):
            figures[f"{name}_p{share}"] = percentile(values, share / 100) * unit if values else None
    return {**figures, **replay.extra}


def imbalance(outcomes: Sequence[Outcome], replicas: int) -> float:
    """How much more work than the average the replica got that got most; 0 is even."""
    work: dict[str, float] = defaultdict(float)
    for outcome in outcomes:
        work[outcome.replica] += outcome.work_s
    total = sum(work.values())
    return max(work.values()) * replicas / total - 1 if total else 0.0


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"{name}_{kind}": None for kind in ("mean", "p50", "p90", "p99")}
    shares = {f"{name}_p{share}": percentile(values, share / 100) for share in (50, 90, 99)}
    return {f"{name}_mean": statistics.fmean(values), **shares}
