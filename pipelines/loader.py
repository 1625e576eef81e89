"""Reading shards: memory-mapped rows, in training order or one after the other.

The training order needs no list and no buffer: sample number p of a run is row `permutation(seed, epoch)(index)` with
`epoch, index = divmod(p, rows)`. A loader's whole state is therefore the number of samples consumed, whatever the
number of ranks: at every step rank r takes the r-th contiguous slice of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.storage import Artifact
from llama.losses import IGNORE_INDEX
from pipelines.ingest import Split
from pipelines.shards import Shard
from pipelines.sources import DataError

_ROUNDS = 6


class ShardSet:
    """A committed `shards` artifact, opened for reading. Shards are mapped when first touched.

    Shards of a local store are mapped where they lie; remote ones are copied to `cache_dir` first, each verified by its
    checksum, once a machine. Raises CorruptArtifact naming a shard that is missing or not of its size, NotFound if
    nothing is committed, and ValueError for a remote store without `cache_dir`.
    """

    def __init__(self, artifact: Artifact, cache_dir: str | Path | None = None) -> None:
        manifest = artifact.manifest()
        if cache_dir is None and artifact.store.local_path() is None:
            raise ValueError(f"{artifact.store.uri} is remote; give a cache_dir on this machine's disk")
        self.folder = artifact.fetch(cache_dir or ".")
        assert manifest is not None  # fetch has raised otherwise
        metadata: Any = manifest.metadata
        self.seq_len: int = metadata["seq_len"]
        self.vocab_size: int = metadata["vocab_size"]
        self.tokenizer: str = metadata["tokenizer"]
        self._splits = {
            split: _SplitIndex.of([Shard(**shard) for shard in found["shards"]])
            for split, found in metadata["splits"].items()
        }
        self._mapped: dict[str, np.ndarray] = {}

    def shards(self, split: Split) -> tuple[Shard, ...]:
        return self._splits[split].shards

    def full_rows(self, split: Split) -> int:
        """Rows without padding."""
        return int(self._splits[split].first_row[-1])

    def rows(self, shard: Shard) -> np.ndarray:
        """A shard's rows, the padded one included: `[rows, seq_len + 1]`, uint16 or uint32, mapped from disk."""
        if shard.path not in self._mapped:
            with pa.memory_map(str(self.folder / shard.path)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
            flat = batch.column("tokens").values.to_numpy(zero_copy_only=True)
            self._mapped[shard.path] = flat.reshape(-1, self.seq_len + 1)
        return self._mapped[shard.path]

    def gather(self, split: Split, indices: np.ndarray) -> np.ndarray:
        """Full rows by number, over all shards of the split: int64 `[len(indices), seq_len + 1]`."""
        index = self._splits[split]
        numbers = np.searchsorted(index.first_row, indices, side="right") - 1
        out = np.empty((len(indices), self.seq_len + 1), np.int64)
        for position, (number, row) in enumerate(zip(numbers, indices - index.first_row[numbers], strict=True)):
            out[position] = self.rows(index.shards[number])[row]
        return out


@dataclass(frozen=True)
class _SplitIndex:
    """Full row r of a split lies in the shard i with first_row[i] <= r < first_row[i + 1]."""

    shards: tuple[Shard, ...]
    first_row: np.ndarray

    @classmethod
    def of(cls, shards: list[Shard]) -> _SplitIndex:
        return cls(tuple(shards), np.cumsum([0, *(shard.full_rows for shard in shards)]))


class ShardLoader:
    """Endless micro-batches of one rank: int64 tensors `[micro_batch, seq_len + 1]`, inputs and targets in one.

    Epochs follow each other without a gap; each row without padding comes once in each. The state counts samples of
    whole steps: taken in the middle of a step it is that of the step's beginning.

    Args:
        artifact: a committed `shards` artifact.
        split: whose rows to read.
        seq_len: must be the shards'.
        global_batch: samples a step, over all ranks; a multiple of `micro_batch * world_size`.
        cache_dir: see ShardSet.

    Raises:
        DataError: the split has no full row.
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        artifact: Artifact,
        split: Split = "train",
        *,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.shards = ShardSet(artifact, cache_dir)
        if seq_len != self.shards.seq_len:
            raise ValueError(f"seq_len={seq_len}, but the shards were packed for {self.shards.seq_len}; pack them anew")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in 0..{world_size - 1}")
        if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * world_size):
            raise ValueError(
                f"global_batch={global_batch} is not a multiple of micro_batch={micro_batch} x world_size={world_size}"
            )
        self.rows = self.shards.full_rows(split)
        if self.rows == 0:
            raise DataError(f"the {split} split has no row of {seq_len + 1} tokens; add text or lower seq_len")
        self._split: Split = split
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._first = rank * (global_batch // world_size)
        self._micro_batches = global_batch // world_size // micro_batch
        self._seed = seed
        self._consumed = 0
        self._micro = 0

    @property
    def epoch(self) -> float:
        """Passes over the split consumed so far, with the fraction."""
        return self._consumed / self.rows

    def __iter__(self) -> ShardLoader:
        return self

    def __next__(self) -> torch.Tensor:
        begin = self._consumed + self._first + self._micro * self._micro_batch
        batch = self.shards.gather(self._split, self._row_numbers(np.arange(begin, begin + self._micro_batch)))
        self._micro += 1
        if self._micro == self._micro_batches:
            self._micro = 0
            self._consumed += self._global_batch
        return torch.from_numpy(batch)

    def _row_numbers(self, samples: np.ndarray) -> np.ndarray:
        numbers = np.empty_like(samples)
        epochs, indices = np.divmod(samples, self.rows)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            numbers[chosen] = permute(indices[chosen], self.rows, self._seed, int(epoch))
        return numbers

    def state_dict(self) -> dict[str, int]:
        return {"samples_consumed": self._consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for anything but a loader's state."""
        if set(state) != {"samples_consumed"} or state["samples_consumed"] < 0:
            raise ValueError(f"{state!r} is no loader state; expected {{'samples_consumed': n}}")
        self._consumed = int(state["samples_consumed"])
        self._micro = 0


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random bijection of 0..size-1, keyed by seed and epoch, sends `indices` (int64).

    A Feistel network over the smallest even number of bits that holds `size` (Luby & Rackoff 1988), with cycle walking
    (Black & Rogaway 2002, §4): what falls outside is sent through again. At most four times the work on average, no
    memory.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    sequence = np.random.SeedSequence([seed, epoch])
    keys = sequence.generate_state(_ROUNDS, np.uint64)
    out = indices.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> bits, out[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[todo] = (left << bits) | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def held_out_rows(shards: ShardSet, split: Split = "validation", max_rows: int | None = None) -> Iterator[np.ndarray]:
    """The split's rows in order, once, the padded ones included and cut to what is text: each 2 to seq_len + 1 tokens.

    Together their tokens after the first of each are the split's targets, each once (see `pipelines.shards`).
    """
    left = max_rows
    for shard in shards.shards(split):
        rows = shards.rows(shard)[:left]
        for number, row in enumerate(rows):
            yield row[: min(shards.seq_len + 1, shard.tokens - number * shards.seq_len)]
        if left is not None:
            left -= len(rows)
            if left == 0:
                return


def held_out_batches(
    shards: ShardSet,
    batch_size: int,
    *,
    split: Split = "validation",
    max_rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, labels) of the split's rows in order, once; int64 `[rows, seq_len]`, at most `batch_size` rows.

    Padding is 0 in the inputs and IGNORE_INDEX in the labels. Rank r takes every `world_size`-th row from r on, so
    ranks may differ in their number of batches. Labels that count sum up to the split's targets over all ranks.
    """
    batch: list[np.ndarray] = []
    for number, row in enumerate(held_out_rows(shards, split, max_rows)):
        if number % world_size == rank:
            batch.append(row)
        if len(batch) == batch_size:
            yield _pad(batch, shards.seq_len)
            batch = []
    if batch:
        yield _pad(batch, shards.seq_len)


def _pad(rows: list[np.ndarray], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = np.zeros((len(rows), seq_len), np.int64)
    labels = np.full((len(rows), seq_len), IGNORE_INDEX, np.int64)
    for index, row in enumerate(rows):
        inputs[index, : len(row) - 1] = row[:-1]
        labels[index, : len(row) - 1] = row[1:]
    return torch.from_numpy(inputs), torch.from_numpy(labels)
