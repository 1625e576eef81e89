"""Contestants side by side in one run: interleaved rounds, ratios with a spread, and a verdict only where one is due.

Machines are shared and noisy, so a figure alone says little. In every round each contestant runs once, in an order that
turns from round to round, and only ratios within a round are compared.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from llama.training.memory import peak_bytes

MIN_ROUNDS = 5


class BenchError(ValueError):
    """A comparison that cannot be made, or would not be one; the message is one line."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the peer: over the rounds the median, the quartiles and the extremes."""

    median: float
    low: float
    high: float
    least: float
    most: float

    @property
    def verdict(self) -> str:
        """faster or slower where every round says so, else "no verdict".

        Between equals, all of n rounds agree by chance about once in 2ⁿ⁻¹ runs: of seven, in less than one of fifty.
        """
        if self.least > 1:
            return "faster"
        return "slower" if self.most < 1 else "no verdict"

    def __str__(self) -> str:
        return f"{self.median:.2f}× ({self.low:.2f}–{self.high:.2f}, {self.verdict})"


def interleave(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, by contestant and round. Each has one call before the rounds, which is not counted."""
    names = list(contestants)
    for name in names:
        contestants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Sequence[float], peer_seconds: Sequence[float]) -> Ratio:
    """How many times as fast as the peer, round by round.

    Raises:
        BenchError: fewer than `MIN_ROUNDS`, which agree by chance too often.
    """
    if len(seconds) < MIN_ROUNDS:
        raise BenchError(f"rounds={len(seconds)} are too few for a verdict; take at least {MIN_ROUNDS}")
    ratios = [peer / own for own, peer in zip(seconds, peer_seconds, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return Ratio(median(ratios), low, high, min(ratios), max(ratios))


class Contestant:
    """`python -m MODULE ARGUMENTS` in a process of its own: its settings, its memory and its crash stay its own.

    The process answers every line on its standard input with a line of JSON (`serve`), the first one unasked when it is
    ready. To be used as a context manager, which ends it.

    Args:
        program: takes the arguments in place of `python -m MODULE`.
        environment: variables it has beside those of this process.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        module: str = "llama.bench",
        *,
        program: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._command = [*(program or (sys.executable, "-m", module)), *arguments]
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Contestant:
        self._errors = tempfile.TemporaryFile(mode="w+")
        self._ready: dict[str, Any] | None = None
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._environment,
        )
        return self

    @property
    def ready(self) -> dict[str, Any]:
        """What it says when it is ready; waits for that, so that several may get ready at once.

        Raises:
            BenchError: it failed.
        """
        if self._ready is None:
            self._ready = self._answer()
        return self._ready

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def turn(self, task: str = "turn") -> dict[str, Any]:
        """Lets it work once; `task` is the line it is sent.

        Raises:
            BenchError: it has failed; holds the last line of its errors.
        """
        assert self.ready is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{task}\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or [f"ended with exit code {code}"])[-1]
        raise BenchError(f"{self.name} failed: {last}")


def serve(ready: dict[str, float], work: Callable[[], dict[str, float]]) -> None:
    """The other side of `Contestant`: one call of `work` for every line on standard input."""
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        print(json.dumps(work()), flush=True)


def peak_memory_mib() -> float:
    """Largest resident size of this process so far, MiB."""
    return peak_bytes() / 2**20


def resident_mib() -> float:
    """Resident size of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
