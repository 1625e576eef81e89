"""How far a list of prompts is: one line on standard error, written over."""

from __future__ import annotations

import sys
import time
from typing import Self

INTERVAL_S = 0.2


class Progress:
    """Counts prompts and generated tokens; a context manager that ends its line.

    On a terminal the line is written over, at most every `INTERVAL_S`; elsewhere only the last state is written.
    """

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._total = total
        self._enabled = enabled
        self._began = self._shown = time.monotonic()
        self._first_tokens: int | None = None
        self._line = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled and self._line:
            self._show("\n")

    def update(self, done: int, generated_tokens: int) -> None:
        """Args: prompts finished; the engine's counter of generated tokens."""
        if not self._enabled:
            return
        if self._first_tokens is None:
            self._first_tokens = generated_tokens
        now = time.monotonic()
        rate = (generated_tokens - self._first_tokens) / max(now - self._began, 1e-9)
        self._line = f"{done}/{self._total} prompts, {rate:.0f} tokens/s"
        if sys.stderr.isatty() and now - self._shown >= INTERVAL_S:
            self._shown = now
            self._show("")

    def _show(self, end: str) -> None:
        start = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(start + self._line, end=end, file=sys.stderr, flush=True)
