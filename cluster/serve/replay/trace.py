"""Traces of requests: Mooncake's format, or made up; and the prompts that their block ids stand for.

A line of a Mooncake trace (github.com/kvcache-ai/Mooncake, FAST25-release) holds no text, but names every 512 tokens of
a prompt by a number, equal for equal prefixes: `timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids`.
Tokens are made from these numbers, so that prompts share exactly what they shared. Token ids are below `VOCAB_SIZE`:
Python keeps small integers once, so a prompt of 100,000 tokens takes 0.8 MB and not 4.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

TOKENS_PER_ID = 512
VOCAB_SIZE = 256


class TraceError(ValueError):
    """A trace that cannot be replayed; the message is one line."""


@dataclass(frozen=True)
class TraceRequest:
    """One request. `at`: arrival, seconds from the start. `session`: the conversation it goes on with."""

    at: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]
    session: int = 0


def read_trace(path: str | Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a file in Mooncake's format, in order of arrival.

    Raises:
        TraceError: there is no such file, it is empty, or a line is not a request; names file and line.
    """
    requests: list[TraceRequest] = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(requests) >= limit:
                    break
                if line.strip():
                    requests.append(_request(line, f"{path}:{number}"))
                    if len(requests) > 1 and requests[-1].at < requests[-2].at:
                        raise TraceError(f"{path}:{number}: timestamp goes back; sort the trace by it")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"trace {path} cannot be read: {error}") from error
    if not requests:
        raise TraceError(f"trace {path} holds no request")
    return with_sessions(requests)


def _request(line: str, place: str) -> TraceRequest:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{place}: not a line of JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TraceError(f"{place}: not an object with timestamp, input_length, output_length and hash_ids")
    timestamp, ids = fields.get("timestamp"), fields.get("hash_ids")
    if not isinstance(timestamp, int | float) or isinstance(timestamp, bool) or not 0 <= timestamp < float("inf"):
        raise TraceError(f"{place}: timestamp={timestamp!r} is not a time in milliseconds")
    for name in ("input_length", "output_length"):
        if not _is_count(fields.get(name), least=1):
            raise TraceError(f"{place}: {name}={fields.get(name)!r} is not a positive integer")
    if not isinstance(ids, list) or not all(_is_count(number, least=0) for number in ids):
        raise TraceError(f"{place}: hash_ids is not a list of natural numbers")
    if len(ids) != -(-fields["input_length"] // TOKENS_PER_ID):
        raise TraceError(
            f"{place}: {len(ids)} hash_ids do not cover input_length={fields['input_length']}, "
            f"one for every {TOKENS_PER_ID} tokens begun"
        )
    return TraceRequest(timestamp / 1000, fields["input_length"], fields["output_length"], tuple(ids))


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def with_sessions(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    """The requests with their conversations: that of the longest known chain of at least two blocks, or a new one.

    One block is too little: unrelated conversations begin with the same system prompt.
    """
    sessions: dict[int, int] = {}
    found: list[TraceRequest] = []
    for number, request in enumerate(requests):
        known = 0
        while known < len(request.hash_ids) and request.hash_ids[known] in sessions:
            known += 1
        session = sessions[request.hash_ids[known - 1]] if known >= 2 else number
        for hash_id in request.hash_ids[known:]:
            sessions[hash_id] = session
        found.append(replace(request, session=session))
    return found


def spread(requests: Sequence[TraceRequest], seed: int, grid_s: float = 3.0) -> list[TraceRequest]:
    """The requests with their stamps, which were recorded on a grid of `grid_s` seconds, moved uniformly inside it."""
    source = random.Random(f"spread {seed}")
    moved = [replace(request, at=request.at + source.uniform(0, grid_s)) for request in requests]
    return sorted(moved, key=lambda request: request.at)


def scaled(requests: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """The same requests, `factor` times as far apart, from time 0 on."""
    start = requests[0].at
    return [replace(request, at=(request.at - start) * factor) for request in requests]


class Prompts:
    """Token ids of a trace's prompts.

    Args:
        tokens_per_id: tokens that one of the trace's numbers stands for; less than 512 makes every prompt shorter.
    """

    def __init__(self, tokens_per_id: int = TOKENS_PER_ID) -> None:
        self.tokens_per_id = tokens_per_id

    def tokens(self, request: TraceRequest) -> list[int]:
        """The prompt's token ids."""
        return list(self._bytes(request))

    def text(self, request: TraceRequest) -> str:
        """The prompt as text, one character a token: for routers that match text."""
        return self._bytes(request).decode("latin-1")

    def _bytes(self, request: TraceRequest) -> bytes:
        parts = [random.Random(hash_id).randbytes(self.tokens_per_id) for hash_id in request.hash_ids]
        return b"".join(parts)[: self.length(request)]

    def length(self, request: TraceRequest) -> int:
        """Tokens of the prompt."""
        return max(1, request.input_tokens * self.tokens_per_id // TOKENS_PER_ID)

    def output(self, request: TraceRequest) -> int:
        """Tokens of the answer, which is as much shorter as the prompt."""
        return max(1, request.output_tokens * self.tokens_per_id // TOKENS_PER_ID)


@dataclass(frozen=True)
class SyntheticTrace:
    """Conversations whose every turn repeats all that was said before.

    Turns come in bursts of `burst` (1: a Poisson process), `rate` turns a second on the average. Of the conversations
    that are open at a time, `concurrent`, a random one goes on, and ends with a probability of one in `turns`.
    """

    requests: int = 1500
    rate: float = 3.0
    burst: int = 1
    concurrent: int = 60
    turns: int = 5
    system_blocks: int = 1
    turn_tokens: int = 3000
    output_tokens: int = 350
    seed: int = 0


def make_trace(settings: SyntheticTrace) -> list[TraceRequest]:
    """The trace that follows from the settings, lengths exponentially distributed around their means."""
    source = random.Random(f"trace {settings.seed}")
    next_id = settings.system_blocks
    histories: list[list[int]] = []
    at, found = 0.0, []
    for number in range(settings.requests):
        if number % settings.burst == 0:
            at += source.expovariate(settings.rate / settings.burst)
        if len(histories) < settings.concurrent:
            histories.append(list(range(settings.system_blocks)))
        place = source.randrange(len(histories))
        history = histories[place]
        added = max(1, round(source.expovariate(1 / settings.turn_tokens)))
        output = max(1, round(source.expovariate(1 / settings.output_tokens)))
        full = (added + output) // TOKENS_PER_ID
        blocks = [*history, *range(next_id, next_id + full + 1)]
        next_id += full + 1
        length = len(blocks[:-1]) * TOKENS_PER_ID + source.randrange(1, TOKENS_PER_ID + 1)
        found.append(TraceRequest(at, length, output, tuple(blocks)))
        histories[place] = blocks[:-1]
        if source.random() < 1 / settings.turns:
            del histories[place]
    return with_sessions(found)
