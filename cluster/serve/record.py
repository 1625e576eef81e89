"""One request's life, as its ingress saw it: kept a while for whoever asks, and what metrics and log are made of.

A record holds numbers and names, never a prompt, an output or a key. `Recording` follows one request through its
attempts and chunks; it is pure, with the clock passed in. Times are seconds since the request's arrival.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cluster.serve.cost import CostCoefficients, Score
from cluster.serve.messages import GenerateRequest
from cluster.serve.state import Selection
from llama.engine import Chunk

KEPT_RECORDS = 1000
KEPT_SCORES = 64
"""Of an attempt, the best ones: at a thousand replicas the records would be what fills the ingress's memory."""


@dataclass(frozen=True)
class Attempt:
    """One selection, `at_s` seconds after the arrival, and what came of it.

    `scores`: what the request would have cost on each replica, best first; choosing took `pick_s` (None: the router was
    not asked). `replica`: who had it; None: nobody.
    `outcome`: "answered", or the code of the error that ended it there.
    """

    at_s: float
    pick_s: float | None
    replica: str | None
    outcome: str
    scores: tuple[Score, ...]

    def as_json(self, coefficients: CostCoefficients) -> dict[str, Any]:
        scores = [_score_as_json(score, coefficients) for score in self.scores]
        return {**asdict(replace(self, scores=())), "scores": scores}


@dataclass(frozen=True)
class RequestRecord:
    """What became of a request.

    `arrived_at` is Unix time; `first_token_s` and `end_s` count from then, None: it never came.
    `predicted_cached_tokens` is what the router foresaw where the request ran, `cached_tokens` what the engine found.
    `queue_s` was spent in the engine's queue; `steps` of the engine computed a part of the request. `inter_token_s` is
    the mean time between tokens after the first, `longest_gap_s` the longest between two chunks. `outcome`: the finish
    reason, "cancelled" when the client left, or the error's code; `status`: the HTTP status that fits it.
    """

    request_id: str
    caller: str
    model: str
    ingress: str
    arrived_at: float
    status: int
    outcome: str
    replica: str | None
    attempts: tuple[Attempt, ...]
    prompt_tokens: int
    predicted_cached_tokens: int
    cached_tokens: int
    generated_tokens: int
    first_token_s: float | None
    end_s: float
    inter_token_s: float | None
    longest_gap_s: float | None
    queue_s: float | None
    steps: int
    preemptions: int

    def as_json(self, coefficients: CostCoefficients) -> dict[str, Any]:
        """Plain data; `coefficients` say how much of a cost each term makes."""
        attempts = [attempt.as_json(coefficients) for attempt in self.attempts]
        return {**asdict(replace(self, attempts=())), "attempts": attempts}

    def log_line(self) -> str:
        """`name=value` pairs, times in milliseconds."""
        fields = {
            "id": self.request_id,
            "caller": self.caller or "-",
            "status": self.status,
            "outcome": self.outcome,
            "replica": self.replica or "-",
            "attempts": len(self.attempts),
            "prompt": self.prompt_tokens,
            "predicted": self.predicted_cached_tokens,
            "cached": self.cached_tokens,
            "generated": self.generated_tokens,
            "queue_ms": _milliseconds(self.queue_s),
            "first_ms": _milliseconds(self.first_token_s),
            "total_ms": _milliseconds(self.end_s),
        }
        return "request " + " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())


@dataclass
class _Progress:
    """What is known of a request's present attempt, over all its completions."""

    replica: str | None = None
    predicted_cached_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    longest_gap_s: float | None = None
    queue_s: float | None = None
    steps: int = 0
    preemptions: int = 0
    reason: str | None = None
    ended: int = 0  # completions
    generated: dict[int, int] = field(default_factory=dict)  # by completion
    seen_s: dict[int, float] = field(default_factory=dict)  # when each completion's last chunk came


class Recording:
    """Follows one request: attempts, the chunks in each of them, and the end."""

    def __init__(
        self, request: GenerateRequest, *, model: str, ingress: str, clock: Callable[[], float], now: float
    ) -> None:
        """`clock`: the one that `request.arrived` was read from; `now`: Unix time."""
        self._request = request
        self._model = model
        self._ingress = ingress
        self._clock = clock
        began = clock()
        self._start = request.arrived if request.arrived is not None else began
        self._arrived_at = now - (began - self._start)
        self._attempts: list[Attempt] = []
        self._progress = _Progress()

    @property
    def is_whole(self) -> bool:
        """Whether every completion has ended."""
        return self._progress.ended >= self._request.params.n

    @contextmanager
    def attempt(self, routed: Callable[[], tuple[str | None, Selection | None]]) -> Iterator[None]:
        """The block is an attempt. `routed`: asked at its end which replica had it and what the router had decided.

        What an earlier attempt had brought counts no more. An exception that ends it says why by its `code`.
        """
        began_s, self._progress = self._clock() - self._start, _Progress()
        outcome = "failed"
        try:
            yield
            outcome = "answered"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "answered" if self.is_whole else "cancelled"
            raise
        except Exception as error:
            outcome = getattr(error, "code", None) or type(error).__name__
            raise
        finally:
            replica, selection = routed()
            if selection is None:
                self._attempts.append(Attempt(began_s, None, replica, outcome, ()))
            else:
                at_s, scores = max(0.0, selection.at - self._start), selection.scores[:KEPT_SCORES]
                self._attempts.append(Attempt(at_s, selection.seconds, replica, outcome, scores))

    def chunk(self, replica: str, predicted_cached_tokens: int, chunk: Chunk) -> None:
        """A chunk has come."""
        now, progress = self._clock() - self._start, self._progress
        progress.replica, progress.predicted_cached_tokens = replica, predicted_cached_tokens
        progress.cached_tokens = max(progress.cached_tokens, chunk.num_cached_tokens if not chunk.index else 0)
        if chunk.token_ids:
            if progress.first_token_s is None:
                progress.first_token_s = now
            before = progress.seen_s.get(chunk.index)
            if before is not None:
                progress.longest_gap_s = max(progress.longest_gap_s or 0.0, now - before)
            progress.seen_s[chunk.index] = progress.last_token_s = now
        progress.generated[chunk.index] = chunk.completion_tokens
        if chunk.timing is not None:
            queue_s = chunk.timing.queue_s
            progress.queue_s = queue_s if progress.queue_s is None else min(progress.queue_s, queue_s)
            progress.steps = max(progress.steps, chunk.timing.steps)
            progress.preemptions += chunk.timing.preemptions
        if chunk.finish_reason is not None:
            progress.reason = chunk.finish_reason
            progress.ended += 1

    def finished(self, status: int = 200, outcome: str | None = None) -> RequestRecord:
        """The request is over; `outcome` None: as its engine says."""
        end_s, progress = self._clock() - self._start, self._progress
        steady = max(progress.generated.values(), default=0) - 1
        inter_token_s = None
        if steady > 0 and progress.first_token_s is not None and progress.last_token_s is not None:
            inter_token_s = (progress.last_token_s - progress.first_token_s) / steady
        request = self._request
        return RequestRecord(
            request_id=request.request_id,
            caller=request.caller,
            model=self._model,
            ingress=self._ingress,
            arrived_at=self._arrived_at,
            status=status,
            outcome=outcome or progress.reason or "unfinished",
            replica=progress.replica or (self._attempts[-1].replica if self._attempts else None),
            attempts=tuple(self._attempts),
            prompt_tokens=len(request.token_ids),
            predicted_cached_tokens=progress.predicted_cached_tokens,
            cached_tokens=progress.cached_tokens,
            generated_tokens=sum(progress.generated.values()),
            first_token_s=progress.first_token_s,
            end_s=end_s,
            inter_token_s=inter_token_s,
            longest_gap_s=progress.longest_gap_s,
            queue_s=progress.queue_s,
            steps=progress.steps,
            preemptions=progress.preemptions,
        )


class Records:
    """The last requests that ended, by id."""

    def __init__(self, limit: int = KEPT_RECORDS) -> None:
        self._order: deque[str] = deque()
        self._records: dict[str, RequestRecord] = {}
        self._limit = limit

    def add(self, record: RequestRecord) -> None:
        """Keeps a record, in the place of the oldest when there are too many."""
        if record.request_id not in self._records:
            self._order.append(record.request_id)
        self._records[record.request_id] = record
        while len(self._order) > self._limit:
            del self._records[self._order.popleft()]

    def find(self, name: str) -> list[RequestRecord]:
        """Those of one HTTP request, newest first: of this id, or of ids that go on with a dash after it."""
        if name in self._records:
            return [self._records[name]]
        return [self._records[key] for key in reversed(self._order) if key.startswith(f"{name}-")]

    def newest(self, limit: int) -> list[RequestRecord]:
        """The last ones to end, newest first."""
        return [self._records[request_id] for request_id in list(self._order)[: -limit - 1 : -1]]


def _score_as_json(score: Score, coefficients: CostCoefficients) -> dict[str, Any]:
    """A score with its terms in seconds; they add up to the cost (cluster/serve/cost.py)."""
    candidate = score.candidate
    unit = coefficients.prefill_s_per_token * candidate.slowness
    terms = {
        "pending_s": unit * candidate.pending_prefill_tokens,
        "missing_s": unit * coefficients.missing_weight * score.missing_tokens,
        "decode_s": unit * coefficients.decode_weight * candidate.decode_context_tokens,
    }
    return {
        "replica": score.replica,
        "cost_s": score.cost_s,
        "wait_s": score.wait_s,
        "predicted_cached_tokens": score.predicted_cached_tokens,
        "missing_tokens": score.missing_tokens,
        "missing_blocks": score.missing_blocks,
        "pending_prefill_tokens": candidate.pending_prefill_tokens,
        "decode_context_tokens": candidate.decode_context_tokens,
        "active_requests": candidate.active_requests,
        "free_blocks": candidate.free_blocks,
        "draining": candidate.draining,
        "slowness": candidate.slowness,
        **terms,
        "shortage_s": max(0.0, score.cost_s - sum(terms.values())),
    }


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _quoted(value: object) -> str:
    """Names come from outside: none may look like another field or begin another line."""
    text = str(value)
    return text if re.fullmatch(r"[\w.:/@#+-]+", text, re.ASCII) else json.dumps(text)
