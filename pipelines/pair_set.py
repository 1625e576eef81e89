"""A committed `pairs` artifact (pipelines/pairs.py) as it is read: its vocabulary, and batches of a split's pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from cluster.artifact import Artifact
from llama.losses import IGNORE_INDEX
from llama.training.batch import Batch
from pipelines.documents import read_table
from pipelines.recipe_text import shown
from pipelines.sources import DataError

BOS, EOS = 0, 1
"""Ids of the tokens that begin and end a target."""
SPECIAL = 2
"""Of them; those of the symbols follow."""
VOCABULARY = "vocabulary.json"
PairSplit = Literal["train", "held_out"]

_MOST_SHOWN = 8


class Vocabulary:
    """The symbols of the pairs, and their ids."""

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        self._ids = {symbol: index + SPECIAL for index, symbol in enumerate(self.symbols)}

    @classmethod
    def of(cls, symbols: Iterable[str]) -> Vocabulary:
        """Of all symbols that there are, in an order that depends on nothing else: numbers by their size."""
        found = set(symbols)
        numbers = all(symbol.removeprefix("-").isdecimal() for symbol in found)
        return cls(sorted(found, key=(lambda symbol: (int(symbol), symbol)) if numbers else None))

    @classmethod
    def load(cls, pairs: Artifact) -> Vocabulary:
        return cls(pairs.files.read_json(VOCABULARY))

    def encode(self, symbols: Iterable[str]) -> list[int]:
        """Raises DataError for a symbol that is none."""
        symbols = list(symbols)
        unknown = [symbol for symbol in symbols if symbol not in self._ids]
        if unknown:
            some = " ".join(self.symbols[:_MOST_SHOWN]) + (" ..." if len(self.symbols) > _MOST_SHOWN else "")
            raise DataError(f"{shown(unknown[0])} is no symbol that the model was trained with; they are {some}")
        return [self._ids[symbol] for symbol in symbols]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Symbols up to the token that ends a target. An id without a symbol, of a larger `vocab_size`, is shown."""
        out: list[str] = []
        for token in ids:
            if token == EOS:
                break
            index = token - SPECIAL
            out.append(self.symbols[index] if 0 <= index < len(self.symbols) else f"<{token}>")
        return out


class PairSet:
    """One split of a committed `pairs` artifact, in memory: eight bytes a pair and four a symbol."""

    def __init__(self, artifact: Artifact, which: PairSplit) -> None:
        table = read_table(artifact.files, f"{which}.parquet").combine_chunks()
        self._sources, self._targets = (_Ragged(table[side]) for side in ("source", "target"))

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        for row in range(len(self)):
            yield self._sources.row(row), self._targets.row(row)

    def batch(self, rows: np.ndarray, seq_len: int) -> Batch:
        """Teacher forcing: from the begin token on the target, and as labels the target up to its end token."""
        source, source_lengths = self._sources.padded(rows)
        target, lengths = self._targets.padded(rows, seq_len)
        inputs = np.full((len(rows), seq_len), EOS)
        inputs[:, 0] = BOS
        inputs[:, 1:] = target[:, : seq_len - 1]
        place = np.arange(seq_len)
        labels = np.where(place < lengths[:, None], target, IGNORE_INDEX)
        labels[place == lengths[:, None]] = EOS
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(labels),
            lengths=torch.from_numpy(lengths + 1),
            source=torch.from_numpy(source),
            source_lengths=torch.from_numpy(source_lengths),
        )


class _Ragged:
    """Rows of any length, in two arrays."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        whole = column.combine_chunks()
        self._offsets = whole.offsets.to_numpy().astype(np.int64)
        self._values = whole.values.to_numpy()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, index: int) -> list[int]:
        found: list[int] = self._values[self._offsets[index] : self._offsets[index + 1]].tolist()
        return found

    def padded(self, rows: np.ndarray, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`[rows, length]` int64 with `EOS` behind each, and the rows' own lengths; None is the longest one's."""
        begins, lengths = self._offsets[rows], self._offsets[rows + 1] - self._offsets[rows]
        place = np.arange(max(1, int(lengths.max())) if length is None else length)
        inside = place < lengths[:, None]
        where = np.where(inside, begins[:, None] + place, 0)
        return np.where(inside, self._values[where] if len(self._values) else EOS, EOS).astype(np.int64), lengths
