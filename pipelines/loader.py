"""Micro-batches of training rows or pairs, in an order whose whole state is the number of samples consumed.

At every step rank r takes the r-th contiguous slice of the global batch, whatever the number of ranks; which row a
sample is, pipelines/permutation.py says. So a run goes on exactly where it was, on another number of ranks too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from cluster.artifact import Artifact
from llama.losses import IGNORE_INDEX
from llama.training.batch import Batch
from pipelines.documents import Split
from pipelines.permutation import SampleOrder
from pipelines.prefetch import Prefetch
from pipelines.shard_set import ShardSet
from pipelines.sources import DataError

_LOCATED = 1 << 10  # samples that are located at once: to permute a few costs as much as to permute many


@dataclass(frozen=True)
class RankSlices:
    """Which samples of the run a rank's micro-batches are made of.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    global_batch: int
    """Samples a step, over all ranks; a multiple of `micro_batch * world_size`."""
    micro_batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} is not in 0..{self.world_size - 1}")
        if self.micro_batch < 1 or self.global_batch < 1 or self.global_batch % (self.micro_batch * self.world_size):
            raise ValueError(
                f"global_batch={self.global_batch} is not a multiple of micro_batch={self.micro_batch} x "
                f"world_size={self.world_size}"
            )

    @property
    def micro_batches(self) -> int:
        """Of a step."""
        return self.global_batch // self.world_size // self.micro_batch

    def samples(self, numbers: np.ndarray, start: int) -> np.ndarray:
        """`[n]` micro-batches, counted from sample `start` of the run → `[n, micro_batch]` samples of the run."""
        steps, micros = np.divmod(numbers, self.micro_batches)
        first = start + self.rank * (self.global_batch // self.world_size)
        begins = first + steps * self.global_batch + micros * self.micro_batch
        return begins[:, None] + np.arange(self.micro_batch)


class RankLoader(ABC):
    """Endless micro-batches of one rank, and how many samples of the run they come to.

    Epochs follow each other without a gap; each sample that training draws comes once in each. The state counts samples
    of whole steps: taken in the middle of a step it is that of the step's beginning.

    Args:
        samples: of an epoch.
    """

    def __init__(self, samples: int, slices: RankSlices) -> None:
        self.samples = samples
        self._slices = slices
        self._start = 0
        self._taken = 0

    @property
    def epoch(self) -> float:
        """Passes over the samples consumed so far, with the fraction."""
        return self._consumed / self.samples

    @property
    def _consumed(self) -> int:
        return self._start + self._taken // self._slices.micro_batches * self._slices.global_batch

    def __iter__(self) -> Self:
        return self

    @abstractmethod
    def __next__(self) -> Batch: ...

    @abstractmethod
    def validation_batches(self, max_rows: int) -> list[Batch]:
        """At most so many held-out rows over all ranks: this rank's, in as many batches as every rank has."""

    def state_dict(self) -> dict[str, int]:
        return {"samples_consumed": self._consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError for anything but a loader's state."""
        consumed = state.get("samples_consumed")
        if set(state) != {"samples_consumed"} or type(consumed) is not int or consumed < 0:
            raise ValueError(f"{state!r} is no loader state; expected {{'samples_consumed': n}}")
        self._start, self._taken = consumed, 0

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ShardLoader(RankLoader):
    """The rows of shards. Its state is that of the batches handed out, however many are prepared.

    Args:
        artifact: a committed `shards` artifact.
        split: whose rows to read.
        seq_len: must be the shards'.
        global_batch, micro_batch: see RankSlices.
        shuffle_shards: how many shards' rows are mixed with one another; see SampleOrder.
        cache_dir, cache_bytes: see ShardSet. The shards of the current window and of the next one are copied in the
            background, so two windows must fit in a bounded cache.
        prefetch: batches prepared in a background thread; 0 prepares each when it is asked for.

    Raises:
        DataError: the split has no row to train on.
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
        shuffle_shards: int | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        prefetch: int = 2,
    ) -> None:
        self.shards = ShardSet(artifact, cache_dir, cache_bytes)
        if seq_len != self.shards.seq_len:
            raise ValueError(f"seq_len={seq_len}, but the shards were packed for {self.shards.seq_len}; pack them anew")
        samples = [shard.samples for shard in self.shards.shards(split)]
        super().__init__(sum(samples), RankSlices(global_batch, micro_batch, rank, world_size))
        if prefetch < 0:
            raise ValueError(f"prefetch={prefetch} must not be negative; 0 prepares nothing in advance")
        if self.samples == 0:
            raise DataError(f"the {split} split has no row of {seq_len + 1} tokens; add text or lower seq_len")
        self._order = SampleOrder(samples, seed, shuffle_shards)
        if self.shards.remote and cache_bytes is not None:
            _check_windows_fit(self.shards, split, cache_bytes, shuffle_shards)
        self._split: Split = split
        self._depth = prefetch
        self._source: _Source | None = None
        self._prefetch: Prefetch[Batch] | None = None

    def __next__(self) -> Batch:
        """Raises CorruptArtifact naming a shard that is missing or wrong, StorageError if the store fails."""
        if self._source is None:
            self._source = _Source(self, self._start)
            if self._depth:
                self._prefetch = Prefetch(self._source, self._taken, self._depth)
        try:
            batch = next(self._prefetch) if self._prefetch is not None else self._source(self._taken)
        except BaseException:
            self._stop()
            raise
        self._taken += 1
        return batch

    def validation_batches(self, max_rows: int) -> list[Batch]:
        slices = self._slices
        return validation_batches(self.shards, slices.micro_batch, max_rows, slices.rank, slices.world_size)

    def load_state_dict(self, state: dict[str, int]) -> None:
        super().load_state_dict(state)
        self._stop()

    def close(self) -> None:
        """Ends the threads; a batch that is asked for later starts them again."""
        self._stop()
        self.shards.close()

    def _stop(self) -> None:
        if self._prefetch is not None:
            self._prefetch.close()
        self._prefetch = self._source = None


class _Source:
    """Micro-batch n of a rank, counted from a number of samples. Knows nothing of the loader that takes them."""

    def __init__(self, loader: ShardLoader, start: int) -> None:
        self._shards, self._split, self._order = loader.shards, loader._split, loader._order
        self._slices, self._start = loader._slices, start
        self._most = max(1, _LOCATED // self._slices.micro_batch)
        self._numbers = range(0)
        self._located: tuple[np.ndarray, np.ndarray] = (np.empty(0), np.empty(0))
        self._next_window = -1

    def __call__(self, number: int) -> Batch:
        if number not in self._numbers:
            self._numbers = range(number, number + min(2 * len(self._numbers) or 1, self._most))
            self._located = self._order.locate(self._slices.samples(np.array(self._numbers), self._start))
        first = int(self._slices.samples(np.array([number]), self._start)[0, 0])
        if first >= self._next_window:
            ahead, self._next_window = self._order.ahead(first)
            self._shards.prepare(self._split, ahead)
        shards, rows = (located[number - self._numbers.start] for located in self._located)
        return self._shards.gather(self._split, shards, rows).batch()


def _check_windows_fit(shards: ShardSet, split: Split, cache_bytes: int, shuffle_shards: int | None) -> None:
    sizes = sorted((shards.stored_bytes(shard) for shard in shards.shards(split) if shard.samples), reverse=True)
    needed = sum(sizes if shuffle_shards is None else sizes[: 2 * shuffle_shards])
    if cache_bytes < needed:
        windows = "all shards, which" if shuffle_shards is None else "two windows of shards, as"
        raise ValueError(
            f"cache_bytes={cache_bytes} does not hold {windows} shuffle_shards={shuffle_shards} needs; "
            f"set cache_bytes={needed}, or a smaller shuffle_shards"
        )


@dataclass(frozen=True)
class ShardData:
    """The data of a training: a committed `shards` artifact. See ShardLoader."""

    artifact: Artifact
    shuffle_shards: int | None
    cache_bytes: int | None

    def open(self, slices: RankSlices, seq_len: int, seed: int, cache_dir: Path) -> ShardLoader:
        return ShardLoader(
            self.artifact,
            seq_len=seq_len,
            global_batch=slices.global_batch,
            micro_batch=slices.micro_batch,
            rank=slices.rank,
            world_size=slices.world_size,
            seed=seed,
            shuffle_shards=self.shuffle_shards,
            cache_dir=cache_dir,
            cache_bytes=self.cache_bytes,
        )


def held_out_batches(
    shards: ShardSet,
    batch_size: int,
    *,
    split: Split = "validation",
    max_rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The split's rows in order, once, at most `batch_size` at a time.

    Rank r takes every `world_size`-th row from r on, so ranks may differ in their number of batches. Labels that count
    are the split's targets, each once over all ranks.
    """
    for rows in shards.in_order(split, batch_size, max_rows=max_rows, rank=rank, world_size=world_size):
        yield rows.batch()


def validation_batches(
    shards: ShardSet, batch_size: int, max_rows: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """For the validation loss: at most `max_rows` rows over all ranks, evenly spread over the validation split.

    Every rank gets equally many batches, all of `batch_size` rows, because each of its forward passes is a collective:
    where rows are lacking, some without targets.

    Raises DataError: the split has no row.
    """
    rows = min(max_rows, sum(shard.rows for shard in shards.shards("validation")))
    if rows == 0:
        raise DataError(
            "the validation split has no row; raise data.validation_fraction, or set train.validate_every=0"
        )
    found = list(held_out_batches(shards, batch_size, max_rows=max_rows, rank=rank, world_size=world_size))
    filling = torch.zeros(batch_size, shards.seq_len, dtype=torch.int64)
    empty = Batch(filling, torch.full_like(filling, IGNORE_INDEX))
    lacking = -(-rows // (batch_size * world_size)) - len(found)
    return [_filled(batch, empty) for batch in found] + [empty] * lacking


def _filled(batch: Batch, empty: Batch) -> Batch:
    """As many rows as `empty` has, the last ones its own."""
    rows = len(empty.inputs)
    documents = None if batch.documents is None else torch.cat((batch.documents, empty.inputs))[:rows]
    return Batch(
        torch.cat((batch.inputs, empty.inputs))[:rows], torch.cat((batch.labels, empty.labels))[:rows], documents
    )
