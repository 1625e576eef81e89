"""What the engines are given: cells of one kind, batch and context; prompts; a trace of arrivals. Pure functions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llama.bench.harness import BenchError

Kind = Literal["prefill", "decode", "trace"]

SYSTEM_TOKENS = 256
"""Of the text before a request's own: shared by many requests or, of the same length, by none."""
_SYSTEMS = 4
_SHARING = 0.8
_OWN_TOKENS = (16, 128)
GENERATED_TOKENS = (8, 64)
LONGEST_REQUEST = SYSTEM_TOKENS + _OWN_TOKENS[1] + GENERATED_TOKENS[1]


@dataclass(frozen=True)
class Cell:
    """One thing measured: so many sequences of so many tokens each, or the trace."""

    kind: Kind
    batch: int = 0
    context: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "trace" else f"{self.kind}:{self.batch}x{self.context}"


CELLS = (
    *(Cell("prefill", batch, context) for batch in (1, 8) for context in (256, 1024)),
    *(Cell("decode", batch, context) for batch in (1, 8, 32) for context in (256, 1024)),
    Cell("trace"),
)


def parse_cells(text: str) -> tuple[Cell, ...]:
    """`decode:8x1024,prefill,trace`: single cells, or all usual ones of a kind; nothing means all.

    Raises:
        BenchError: a part is none of these; names it.
    """
    cells: dict[Cell, None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, _, shape = part.partition(":")
        usual = [cell for cell in CELLS if cell.kind == kind]
        batch, _, context = shape.partition("x")
        if usual and not shape and ":" not in part:
            cells |= dict.fromkeys(usual)
        elif kind in ("prefill", "decode") and all(n.isascii() and n.isdigit() and int(n) for n in (batch, context)):
            cells[Cell(kind, int(batch), int(context))] = None  # type: ignore[arg-type]
        else:
            raise BenchError(f"cells={part!r} is not prefill, decode, trace or one like decode:8x1024")
    return tuple(cells) or CELLS


def prompts(cell: Cell, vocab_size: int, variant: int = 0) -> list[list[int]]:
    """Random prompts, `[batch][context]`, the same for everybody; another `variant` shares no beginning with this."""
    source = random.Random(f"{cell} {variant}")
    return [[source.randrange(vocab_size) for _ in range(cell.context)] for _ in range(cell.batch)]


@dataclass(frozen=True)
class TraceRequest:
    at: float
    """Arrival, seconds from the start."""
    prompt: list[int]
    generate: int
    """Tokens."""


def make_trace(requests: int, rate: float, vocab_size: int, seed: int = 0) -> list[TraceRequest]:
    """Arrivals of a Poisson process of `rate` a second; four of five prompts begin with one of four system texts."""
    source = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [source.randrange(vocab_size) for _ in range(count)]

    systems = [tokens(SYSTEM_TOKENS) for _ in range(_SYSTEMS)]
    trace: list[TraceRequest] = []
    at = 0.0
    for _ in range(requests):
        at += source.expovariate(rate)
        system = source.choice(systems) if source.random() < _SHARING else tokens(SYSTEM_TOKENS)
        trace.append(TraceRequest(at, system + tokens(source.randint(*_OWN_TOKENS)), source.randint(*GENERATED_TOKENS)))
    return trace


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True)
class Latencies:
    """Of one replay of a trace, or of several together; seconds."""

    tokens_per_second: float
    """Generated, from the first arrival to the last token."""
    first_token_p50: float
    """From arrival."""
    first_token_p99: float
    gap_p50: float
    """Between a request's tokens."""
    gap_p99: float


def latencies(trace: Sequence[TraceRequest], replays: Sequence[Sequence[Sequence[float]]]) -> Latencies:
    """Of replays, each the times of every request's tokens, seconds from the trace's start.

    Raises:
        BenchError: a request did not get the tokens it asked for.
    """
    first: list[float] = []
    gaps: list[float] = []
    generated, seconds = 0, 0.0
    for replay in replays:
        for request, times in zip(trace, replay, strict=True):
            if len(times) != request.generate:
                raise BenchError(f"a request of {request.generate} tokens got {len(times)}")
            first.append(times[0] - request.at)
            gaps += (later - earlier for earlier, later in zip(times, times[1:], strict=False))
        generated += sum(request.generate for request in trace)
        seconds += max(times[-1] for times in replay) - trace[0].at
    found = (percentile(values, share) for values in (first, gaps) for share in (0.5, 0.99))
    return Latencies(generated / seconds, *found)
