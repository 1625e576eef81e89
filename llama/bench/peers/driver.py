"""What an engine is asked for and how that is timed: the same lines for ours and for every peer that works in steps.

The standard library alone, and nothing of this package: peers import this file in environments of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

Answer = dict[str, Any]

STAGGER = 8
"""Steps by which requests sent at once may get their first tokens apart, and still decode long enough together."""


class Steps(Protocol):
    """An engine that is driven by hand. Every request is greedy and ends by its number of tokens alone."""

    def add(self, name: str, prompt: list[int], generate: int) -> None: ...

    def step(self) -> Iterable[tuple[str, list[int]]]:
        """New tokens of the requests that got any."""

    def forget(self) -> None:
        """Drops the cached prefixes."""


def prefill(engine: Steps, prompts: list[list[int]]) -> Answer:
    """Seconds until every prompt has its first token, and those tokens."""
    began = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, 1)
    first: dict[str, int] = {}
    while len(first) < len(prompts):
        for name, tokens in engine.step():
            first.setdefault(name, tokens[0])
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": [first[str(index)] for index in range(len(prompts))]}


def decode(engine: Steps, prompts: list[list[int]], generate: int) -> Answer:
    """Seconds of the steps in which all prompts decode, the tokens of those steps, and each prompt's first token.

    The clock starts after the step that gives the last of them its first token, and stops after the step in which one
    reaches its limit: no prefill and no partly filled batch is in it, whatever the engine's schedule. That is at least
    `generate` steps if the first tokens come within `STAGGER` steps, as they do when the prompts are cached; 0 seconds
    if one ends before the last begins.
    """
    limit = generate + STAGGER
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, limit)
    got: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    began = ended = 0.0
    before = generated = 0
    while any(len(tokens) < limit for tokens in got.values()):
        for name, tokens in engine.step():
            got[name] += tokens
        counts = [len(tokens) for tokens in got.values()]
        if ended or not all(counts):
            continue
        now = time.perf_counter()
        if not began:
            if max(counts) >= limit:
                ended = now  # it was over before all were there
            began, before = now, sum(counts)
        elif max(counts) >= limit:
            ended, generated = now, sum(counts) - before
    seconds = ended - began if generated else 0.0
    return {"seconds": seconds, "generated": generated, "tokens": [tokens[0] for tokens in got.values()]}


def trace(engine: Steps, requests: list[dict[str, Any]]) -> Answer:
    """Replays arrivals; for each request the seconds from the trace's start to each of its tokens.

    Whoever arrives during a step is added after it, which counts as that request's waiting.
    """
    engine.forget()
    times: list[list[float]] = [[] for _ in requests]
    coming = deque(enumerate(requests))
    unfinished = 0
    began = time.perf_counter()
    while coming or unfinished:
        now = time.perf_counter() - began
        while coming and coming[0][1]["at"] <= now:
            index, request = coming.popleft()
            engine.add(str(index), request["prompt"], request["generate"])
            unfinished += 1
        if not unfinished:
            time.sleep(max(0.0, coming[0][1]["at"] - now))
            continue
        for name, tokens in engine.step():
            now, own = time.perf_counter() - began, times[int(name)]
            own += [now] * len(tokens)
            unfinished -= len(own) >= requests[int(name)]["generate"]
    return {"times": times}


def work_in_steps(engine: Steps) -> Callable[[dict[str, Any]], Answer]:
    """Answers tasks of every kind with an engine that works in steps."""

    def work(task: dict[str, Any]) -> Answer:
        if task["kind"] == "prefill":
            return prefill(engine, task["prompts"])
        if task["kind"] == "decode":
            return decode(engine, task["prompts"], task["generate"])
        return trace(engine, task["requests"])

    return work


def fastest(work: Mapping[str, Callable[[], Answer]]) -> str:
    """Which of these ways takes the least time for the same; the first call of each is not counted."""
    for once in work.values():
        once()
    seconds = {name: once()["seconds"] for name, once in work.items()}
    return min(seconds, key=lambda name: seconds[name])


def serve(start: Callable[[dict[str, Any]], tuple[Answer, Callable[[dict[str, Any]], Answer]]]) -> None:
    """A contestant's process: settings in its first argument, a task a line on standard input, an answer a line.

    `start` takes the settings and returns what to say when ready and what does the tasks. What libraries print goes to
    standard error, and an exception ends the process with one line that tells it.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        ready, work = start(json.loads(sys.argv[1]))
        print(json.dumps(ready), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(work(json.loads(line))), file=answers, flush=True)
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
