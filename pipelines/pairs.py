"""Pairs of sequences, and the stage that writes them: drawn for a task, or read from a JSONL file.

    vocabulary.json      the symbols, in the order of their ids
    train.parquet        ids of source and target, a pair a row
    held_out.parquet     the same; no source is in both

Symbols are texts without blanks. Their ids follow those of the two tokens that begin and end a target.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from cluster.storage import JSON, FileEntry, NotFound, Store
from pipelines.documents import write_table
from pipelines.pair_set import SPECIAL, VOCABULARY, Vocabulary
from pipelines.permutation import permute
from pipelines.recipe_text import shown
from pipelines.section import Positive, Section, lasting_uri
from pipelines.sources import DataError
from pipelines.stage import Stage, StageContext

Task = Literal["reverse", "sort", "copy"]
_DRAWN = {"symbols": 16, "min_length": 1, "max_length": 12, "training_pairs": 20_000}


class PairsConfig(Section):
    """What the model learns: `task` on random sequences, or the pairs of the file at `path`."""

    task: Task | None = None
    """reverse: 3 1 2 → 2 1 3; sort: 3 1 2 → 1 2 3; copy: 3 1 2 → 3 1 2. The symbols are numbers."""
    symbols: Annotated[int, Field(ge=2)] | None = None
    """Different ones (16 if left out)."""
    min_length: Positive | None = None
    """Symbols of the shortest sequence (1); lengths are drawn evenly up to `max_length` (12)."""
    max_length: Positive | None = None
    training_pairs: Positive | None = None
    """Pairs to train on (20,000); no two of all pairs have one source."""
    path: Annotated[str, Field(min_length=1)] | None = None
    """A JSONL file, local or a store's URI: {"source": [3, 1], "target": [1, 3]} or {"source": "3 1", ...} a line."""
    held_out_pairs: Positive = 500
    """Sources that are not trained on but evaluated, with their targets."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @field_validator("path")
    @classmethod
    def _means_the_same_everywhere(cls, path: str | None) -> str | None:
        return None if path is None else lasting_uri(path)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        return cls.filled_in(values) if isinstance(values, dict) else values

    @classmethod
    def filled_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """With the defaults of a task, so that a stored recipe says them. Raises ValueError."""
        if (values.get("task") is None) == (values.get("path") is None):
            raise ValueError("pairs.task draws pairs and pairs.path names a file of them; give one of the two")
        if values.get("path") is None:
            return {**values, **{key: value for key, value in _DRAWN.items() if values.get(key) is None}}
        for key in _DRAWN:
            if values.get(key) is not None:
                raise ValueError(f"pairs.{key}={shown(values[key])} is for drawn pairs, and pairs.path names a file")
        return values

    @model_validator(mode="after")
    def _enough_to_draw(self) -> PairsConfig:
        if self.task is None:
            return self
        symbols, shortest, longest, count = self.drawn
        if shortest > longest:
            raise ValueError(f"pairs.min_length={shortest} is above pairs.max_length={longest}; lower it")
        # Half of those of the greatest length, or what is drawn would be mostly what was drawn before.
        wanted = count + self.held_out_pairs
        if symbols**longest < 2 * wanted:
            raise ValueError(
                f"pairs.symbols={symbols} make {symbols**longest} sequences of pairs.max_length={longest}, too few to "
                f"draw pairs.training_pairs={count} and pairs.held_out_pairs={self.held_out_pairs} of; raise one or "
                "lower the others"
            )
        return self

    @property
    def drawn(self) -> tuple[int, int, int, int]:
        """Symbols, shortest and longest length, and training pairs of a task."""
        found = (self.symbols, self.min_length, self.max_length, self.training_pairs)
        assert None not in found  # as filled in
        return found  # type: ignore[return-value]


@dataclass(frozen=True)
class Room:
    """What the recipe leaves for the pairs."""

    vocab_size: int
    source: int
    """Symbols of the longest source."""
    target: int
    """Symbols of the longest target, beside the token that begins or ends it."""


Pair = tuple[tuple[str, ...], tuple[str, ...]]


def pairs_stage(config: PairsConfig, room: Room) -> Stage:
    """The stage `pairs`. A file is part of its key by its content, which is read now.

    Raises DataError if it is not there.
    """
    key: dict[str, Any] = {"pairs": config}
    if config.path is not None:
        # Whether they fit the model is found out with the file at hand.
        file = _file_of(config.path).checksum
        key = {"file": file, "held_out": config.held_out_pairs, "seed": config.seed, "room": room}
    return Stage("pairs", 1, key, partial(_write, config, room, key.get("file")))


def _file_of(path: str) -> FileEntry:
    folder, _, name = path.rpartition("/")
    try:
        return Store(folder or "/").entry(name)
    except NotFound:
        raise DataError(f"pairs.path={path} does not exist; give a JSONL file of pairs") from None


def _write(config: PairsConfig, room: Room, checksum: str | None, context: StageContext) -> dict[str, JSON]:
    """The stage: raises DataError for pairs that the model has no room for, and for another file than it was."""
    if config.path is not None and _file_of(config.path).checksum != checksum:
        raise DataError(f"pairs.path={config.path} was changed since the run began; begin it anew")
    found = draw(config) if config.task is not None else read_pairs(str(config.path))
    training, held_out = split(found, config.held_out_pairs, config.seed)
    vocabulary = Vocabulary.of(symbol for pair in found for sequence in pair for symbol in sequence)
    _check_room(found, vocabulary, room)
    output = context.attempt.store
    context.record(output.write_json(VOCABULARY, list(vocabulary.symbols)))
    for name, pairs in (("train", training), ("held_out", held_out)):
        columns = {
            side: pa.array([vocabulary.encode(pair[place]) for pair in pairs], pa.list_(pa.int32()))
            for place, side in enumerate(("source", "target"))
        }
        context.record(write_table(output, f"{name}.parquet", pa.table(columns)))
    return {"training_pairs": len(training), "held_out_pairs": len(held_out), "symbols": len(vocabulary.symbols)}


def _check_room(pairs: Sequence[Pair], vocabulary: Vocabulary, room: Room) -> None:
    needs = {
        "model.vocab_size": (len(vocabulary.symbols) + SPECIAL, room.vocab_size),
        "model.max_source_len": (max(len(source) for source, _ in pairs), room.source),
        "train.seq_len": (max(len(target) for _, target in pairs) + 1, room.target + 1),
    }
    missing = {name: (need, there) for name, (need, there) in needs.items() if need > there}
    if missing:
        lines = (f"{name}={there} is below the {need} that the pairs need" for name, (need, there) in missing.items())
        raise DataError("; ".join(lines) + "; raise it")


def draw(config: PairsConfig) -> list[Pair]:
    """Random sequences, no two alike, each with what the task makes of it."""
    symbols, shortest, longest, count = config.drawn
    random = np.random.default_rng(config.seed)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count + config.held_out_pairs:
        lengths = random.integers(shortest, longest, size=1024, endpoint=True)
        numbers = random.integers(symbols, size=(1024, longest))
        for length, row in zip(lengths.tolist(), numbers.tolist(), strict=True):
            drawn.setdefault(tuple(row[:length]))
    sources = list(drawn)[: count + config.held_out_pairs]
    return [(_texts(source), _texts(_solve(config.task, source))) for source in sources]


def _solve(task: Task | None, source: tuple[int, ...]) -> tuple[int, ...]:
    match task:
        case "reverse":
            return source[::-1]
        case "sort":
            return tuple(sorted(source))
    return source


def _texts(numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(map(str, numbers))


def split(pairs: Sequence[Pair], held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: those of so many sources, chosen by the seed, are held out. Raises DataError."""
    sources = list(dict.fromkeys(source for source, _ in pairs))
    if len(sources) <= held_out:
        raise DataError(
            f"pairs.held_out_pairs={held_out} leaves nothing to train on of {len(sources)} different sources; lower "
            "it, or add pairs"
        )
    chosen = permute(np.arange(held_out), len(sources), seed, 0)
    away = {sources[index] for index in chosen.tolist()}
    return [pair for pair in pairs if pair[0] not in away], [pair for pair in pairs if pair[0] in away]


def read_pairs(path: str) -> list[Pair]:
    """Those of a JSONL file. Raises DataError naming the first line that is none."""
    folder, _, name = path.rpartition("/")
    pairs: list[Pair] = []
    with Store(folder or "/").open_input(name) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                pairs.append(_pair(line, f"pairs.path={path}, line {number}"))
    if not pairs:
        raise DataError(f'pairs.path={path} has no pairs; a line of it is {{"source": [...], "target": [...]}}')
    return pairs


def _pair(line: bytes, where: str) -> Pair:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or not {"source", "target"} <= record.keys():
        raise DataError(f"{where}: {shown(record)} is no object with source and target")
    source, target = (_symbols(record[side], f"{where}: {side}") for side in ("source", "target"))
    if not source:
        raise DataError(f"{where}: source is empty; give at least one symbol")
    return source, target


def _symbols(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(value.split())
    if isinstance(value, list) and all(type(item) is int for item in value):
        return _texts(value)
    raise DataError(f"{where}={shown(value)} is neither a list of whole numbers nor symbols with blanks between them")
