"""Training metrics in the store: small Parquet parts, because an object store cannot append.

A part is `{writer}-{first step}.parquet`, a row for each report: the fields of `StepMetrics`, a column each, and `time`
(seconds since the epoch). What is kept by layer is a map. The writer's name sorts by the time it began, so that where a
resumed run repeats steps the later writer's rows stand.
"""

from __future__ import annotations

import logging
import math
import re
import time
import types
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Store
from llama.training.metrics import StepMetrics

FLUSH_SECONDS = 2.0
"""The shortest time between two parts; it grows to a hundredth of the training's, at most `LONGEST_FLUSH_SECONDS`."""
LONGEST_FLUSH_SECONDS = 30.0

_PART = re.compile(r"(?P<writer>.+)-\d{8,}\.parquet")
_log = logging.getLogger(__name__)


def _column_type(annotation: Any) -> pa.DataType:
    if get_origin(annotation) is types.UnionType:
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    if get_origin(annotation) is dict:
        return pa.map_(*map(_column_type, get_args(annotation)))
    if get_origin(annotation) is list:
        return pa.list_(_column_type(*get_args(annotation)))
    return {int: pa.int64(), float: pa.float64(), str: pa.string()}[annotation]


SCHEMA = pa.schema(
    [(name, _column_type(annotation)) for name, annotation in get_type_hints(StepMetrics).items()]
    + [("time", pa.float64())]
)


class MetricsWriter:
    """Collects metrics and writes a part at intervals.

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
        self._began = clock()
        self._last_flush = float("-inf")

    def write(self, metrics: StepMetrics) -> None:
        """Takes one report; it is in the store after `flush`, or once the interval has passed. Numbers that are not
        finite are written as null."""
        self._pending.append(_without_infinities(asdict(metrics)) | {"time": time.time()})
        now = self._clock()
        interval = min(LONGEST_FLUSH_SECONDS, max(FLUSH_SECONDS, (now - self._began) / 100))
        if now - self._last_flush >= interval:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            name = f"{self._writer}-{self._pending[0]['step']:08d}.parquet"
            part = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(self._pending, schema=SCHEMA), part)
            self._store.write_bytes(name, part.getvalue().to_pybytes())
            self._pending = []
        self._last_flush = self._clock()


class MetricsReader:
    """Reads the parts, each once: `poll` returns what is new, `steps` is the whole curve so far.

    What is no part (half a file, or somebody else's) is named in the log, and left alone until its size changes.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sizes: dict[str, int] = {}
        self._parts: dict[str, list[dict[str, Any]]] = {}

    def poll(self) -> list[dict[str, Any]]:
        """Rows of the parts that appeared since the last call, in order of writer and step. Raises StorageError."""
        new: dict[str, list[dict[str, Any]]] = {}
        for name, size in sorted(self._store.sizes().items()):
            if name in self._parts or self._sizes.get(name) == size:
                continue
            data = self._store.read_bytes(name) if _PART.fullmatch(name) else b""
            try:
                rows = _parse(data)
            except (pa.ArrowException, ValueError, OSError) as error:
                _log.warning("%s: %s is no part of the metrics, and is left out: %s", self._store.uri, name, error)
                self._sizes[name] = size
            else:
                new[name] = rows
        self._parts |= new  # of a poll that fails, the next one returns all
        return [row for rows in new.values() for row in rows]

    def skip_existing(self) -> None:
        """Marks what is there as seen, so that `poll` reports only what comes later."""
        self.poll()

    def steps(self) -> list[dict[str, Any]]:
        """One row a step, in order; a later writer's replaces an earlier one's, from its first step on."""
        curve: dict[int, dict[str, Any]] = {}
        for rows in self.by_writer().values():
            first = min(row["step"] for row in rows)
            curve = {step: row for step, row in curve.items() if step < first}
            curve.update((row["step"], row) for row in rows)
        return [curve[step] for step in sorted(curve)]

    def by_writer(self) -> dict[str, list[dict[str, Any]]]:
        """All rows of each writer, in the order of the writers and of their steps; repeated steps are in it."""
        writers: dict[str, list[dict[str, Any]]] = {}
        for name in sorted(self._parts):
            writers.setdefault(name.rsplit("-", 1)[0], []).extend(self._parts[name])
        return writers


def _parse(data: bytes) -> list[dict[str, Any]]:
    """The rows of a part; a column that it lacks, being of an earlier version, is null."""
    table = pq.read_table(pa.BufferReader(data))
    known = [column for column in table.schema if column.name in SCHEMA.names]
    fits = all(column.type == SCHEMA.field(column.name).type for column in known)
    if not (fits and {"step", "steps", "tokens"} <= {column.name for column in known} and table.num_rows):
        raise ValueError("its columns are not those of a report")
    rows = table.select([column.name for column in known]).to_pylist(maps_as_pydicts="strict")
    return [dict.fromkeys(SCHEMA.names) | row for row in rows]


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else None
