"""A contestant's turns: announced when they begin, so that a long comparison is not silent, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

Say = Callable[[str], None]
"""Tells whoever watches what goes on, in a line."""


@dataclass
class Turns:
    """What `interleave` calls for a contestant. `seconds` has every turn so far, the uncounted first one included; the
    announcement is not in them."""

    name: str
    work: Callable[[], object]
    rounds: int
    say: Say
    seconds: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        number = len(self.seconds)
        first = "first turn, not a round" if self.rounds else "its turn"
        self.say(f"{self.name}: " + (f"round {number} of {self.rounds}" if number else first))
        began = time.perf_counter()
        self.work()
        self.seconds.append(time.perf_counter() - began)
