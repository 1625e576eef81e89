"""Training metrics in the store: small parts of JSON lines, because an object store cannot append.

A part is `{writer}-{first step}.jsonl`, one JSON object a line, each with its `step`. The writer's name sorts by the
time it began, so that where a resumed run repeats steps the later writer's lines stand.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

from cluster.storage import Store

FLUSH_SECONDS = 2.0


class MetricsWriter:
    """Collects metrics and writes a part at most every `FLUSH_SECONDS`.

    Args:
        store: the folder of parts.
        writer: name of this incarnation; later incarnations must sort after earlier ones.
        clock: seconds, for the tests.
    """

    def __init__(self, store: Store, writer: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._writer = writer
        self._clock = clock
        self._pending: list[dict[str, Any]] = []
        self._last_flush = float("-inf")

    def write(self, metrics: dict[str, Any]) -> None:
        """Takes one step's metrics; they are in the store after `flush`, or once the interval has passed.

        What is not finite is written as null: JSON has no word for it.
        """
        self._pending.append({key: value if _is_json(value) else None for key, value in metrics.items()})
        if self._clock() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            name = f"{self._writer}-{self._pending[0]['step']:08d}.jsonl"
            lines = "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in self._pending)
            self._store.write_bytes(name, lines.encode())
            self._pending = []
        self._last_flush = self._clock()


class MetricsReader:
    """Reads the parts, each once: `poll` returns what is new, `steps` is the whole curve so far."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts: dict[str, list[dict[str, Any]]] = {}

    def poll(self) -> list[dict[str, Any]]:
        """Metrics of the parts that appeared since the last call, in order of writer and step."""
        fresh = [name for name in self._store.list() if name.endswith(".jsonl") and name not in self._parts]
        new: list[dict[str, Any]] = []
        for name in fresh:
            self._parts[name] = [json.loads(line) for line in self._store.read_bytes(name).splitlines()]
            new.extend(self._parts[name])
        return new

    def skip_existing(self) -> None:
        """Marks what is there as seen, so that `poll` reports only what comes later."""
        self.poll()

    def steps(self) -> list[dict[str, Any]]:
        """One entry a step, in order; a later writer's replaces an earlier one's, from its first step on."""
        curve: dict[int, dict[str, Any]] = {}
        writers: dict[str, list[dict[str, Any]]] = {}
        for name in sorted(self._parts):
            writers.setdefault(name.rsplit("-", 1)[0], []).extend(self._parts[name])
        for lines in writers.values():
            first = min(line["step"] for line in lines)
            curve = {step: line for step, line in curve.items() if step < first}
            curve.update((line["step"], line) for line in lines)
        return [curve[step] for step in sorted(curve)]


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
