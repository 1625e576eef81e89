"""Reading shards: a committed `shards` artifact, its files mapped into memory when they are first touched.

The format is that of pipelines/shards.py. Which of a row's tokens are targets is decided here, for training, evaluation
and the baselines alike. Target t of a row, 1 ≤ t ≤ seq_len, counts if it is

- no padding: t < length,
- under `best_fit` not the first token of a piece of a document, which nothing before it in the row foretells,
- in shards with a mask, to be learned: loss_mask[t] = 1.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.artifact import Artifact, CorruptArtifact
from llama.losses import IGNORE_INDEX
from llama.training.batch import Batch
from pipelines.documents import Split
from pipelines.shard_cache import ReadAhead, ShardCache
from pipelines.shards import Shard

_MAX_MAPS = 1 << 14  # Linux gives a process 65,530


@dataclass(frozen=True)
class Rows:
    """Rows of shards, copied: what they hold and what of it is a target."""

    tokens: np.ndarray
    """`[rows, seq_len + 1]` int64."""
    counted: np.ndarray | None
    """`[rows, seq_len]` bool: whether tokens[:, 1:] are targets that count; None if all of them are."""
    documents: np.ndarray | None
    """`[rows, seq_len]` int64 under best_fit: the piece that tokens[:, :-1] belong to, padding being one more."""
    lengths: np.ndarray | None
    """`[rows]` int64: of tokens[:, :-1] those before the padding; None if there is none."""

    def targets(self) -> np.ndarray:
        """Ids of the targets that count, row by row: int64, one axis."""
        targets = self.tokens[:, 1:]
        return targets.reshape(-1) if self.counted is None else targets[self.counted]

    def batch(self) -> Batch:
        labels = self.tokens[:, 1:]
        if self.counted is not None:
            labels = np.where(self.counted, labels, IGNORE_INDEX)
        documents, lengths = (
            None if each is None else torch.from_numpy(each) for each in (self.documents, self.lengths)
        )
        return Batch(torch.from_numpy(self.tokens[:, :-1]), torch.from_numpy(labels), documents, lengths)


@dataclass(frozen=True)
class _MappedShard:
    """The columns of a shard's file as arrays over the map."""

    tokens: np.ndarray
    """`[rows, seq_len + 1]`, uint16 or uint32."""
    lengths: np.ndarray
    """`[rows]` int32."""
    offsets: np.ndarray
    """`[rows + 1]` int32: row r's pieces begin at starts[offsets[r]:offsets[r + 1]]."""
    starts: np.ndarray
    loss_mask: np.ndarray
    """`[rows, seq_len + 1]` uint8; of no rows where shards have none."""

    def check(self) -> None:
        """Raises ValueError for numbers that lead out of a row; they are few beside the tokens."""
        rows, width = self.tokens.shape
        ends = self.offsets[1:]
        whole = len(self.lengths) == len(ends) == rows and self.offsets[0] == 0 and ends[-1] <= len(self.starts)
        within = whole and bool((np.diff(self.offsets) > 0).all() and (self.starts[: ends[-1]] < width).all())
        if not (within and (self.starts >= 0).all() and ((self.lengths > 0) & (self.lengths <= width)).all()):
            raise ValueError("lengths or places of documents are none")


class ShardSet:
    """A committed `shards` artifact, opened for reading.

    Shards of a local store are mapped where they lie. Remote ones are copied to `cache_dir` when they are first
    touched or `prepare` says that they will be, each verified by its checksum.

    Args:
        cache_dir: a folder on this machine's disk, for a remote store; processes share the copies in it.
        cache_bytes: bound of the copies, see ShardCache; 0 keeps one shard at a time, None all.

    Raises:
        CorruptArtifact: names a shard that is missing or not of its size. A wrong byte of a remote shard is found when
            it is copied.
        NotFound: nothing is committed.
        ValueError: a remote store without `cache_dir`.
    """

    def __init__(self, artifact: Artifact, cache_dir: str | Path | None = None, cache_bytes: int | None = None) -> None:
        manifest = artifact.check_sizes()
        files = artifact.attempt_store(manifest.attempt)
        self._uri = artifact.store.uri
        self._folder = files.local_path()
        self._cache: ShardCache | None = None
        if self._folder is None:
            if cache_dir is None:
                raise ValueError(f"{self._uri} is remote; give a cache_dir on this machine's disk")
            self._cache = ShardCache(artifact, manifest, cache_dir, cache_bytes)
        self._ahead: ReadAhead | None = None
        self._sizes = {entry.path: entry.size for entry in manifest.files}
        self._max_mapped = cache_bytes if self._cache else None
        metadata: Any = manifest.metadata
        self.seq_len: int = metadata["seq_len"]
        self.vocab_size: int = metadata["vocab_size"]
        self.tokenizer: str = metadata["tokenizer"]
        self._packed = metadata["packing"] == "best_fit"
        self._masked: bool = metadata["masked"]
        self._shards: dict[str, tuple[Shard, ...]] = {
            split: tuple(Shard(**shard) for shard in found["shards"]) for split, found in metadata["splits"].items()
        }
        self._mapped: OrderedDict[str, _MappedShard] = OrderedDict()
        self._mapping = threading.Lock()

    def shards(self, split: Split) -> tuple[Shard, ...]:
        return self._shards[split]

    @property
    def remote(self) -> bool:
        return self._cache is not None

    def stored_bytes(self, shard: Shard) -> int:
        """Size of the shard's file."""
        return self._sizes[shard.path]

    def gather(self, split: Split, numbers: np.ndarray, rows: np.ndarray) -> Rows:
        """Rows by the number of the shard in the split and of the row in the shard; both `[n]` int64.

        Raises CorruptArtifact or StorageError, also for what went wrong in the background since the last call.
        """
        if self._ahead is not None:
            self._ahead.check()
        shards = self._shards[split]
        mapped = {number: self._map(shards[number].path) for number in sorted(set(numbers.tolist()))}
        places = [(mapped[number], row) for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)]
        tokens = np.empty((len(places), self.seq_len + 1), np.int64)
        for index, (shard, row) in enumerate(places):
            tokens[index] = shard.tokens[row]
        lengths = np.array([shard.lengths[row] for shard, row in places], np.int64)
        counted = documents = None
        if self._packed:
            counted, documents = self._separate(places, lengths)
        elif (lengths <= self.seq_len).any():
            counted = np.arange(1, self.seq_len + 1) < lengths[:, None]
        if self._masked:
            learned = np.stack([shard.loss_mask[row, 1:] for shard, row in places]) > 0
            counted = learned if counted is None else counted & learned
        padded = (lengths < self.seq_len).any()
        return Rows(tokens, counted, documents, lengths.clip(max=self.seq_len) if padded else None)

    def _separate(
        self, places: Sequence[tuple[_MappedShard, int]], lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`Rows.counted` without the mask, and `Rows.documents`."""
        pieces = [shard.starts[shard.offsets[row] : shard.offsets[row + 1]] for shard, row in places]
        begins = np.zeros((len(places), self.seq_len + 2), bool)
        begins[np.repeat(np.arange(len(places)), [len(starts) for starts in pieces]), np.concatenate(pieces)] = True
        begins[np.arange(len(places)), lengths] = True  # of the padding
        counted = ~begins[:, 1:-1] & (np.arange(1, self.seq_len + 1) < lengths[:, None])
        return counted, np.cumsum(begins[:, :-2], axis=1, dtype=np.int64)

    def in_order(
        self, split: Split, count: int, *, max_rows: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Rows]:
        """The split's rows in order, once, the padded ones included, `count` at a time, or what is left.

        Args:
            max_rows: read so many at most over all ranks, evenly spread, so that every source has its share.
            rank: takes every `world_size`-th row from `rank` on.
        """
        starts = np.cumsum([0, *(shard.rows for shard in self._shards[split])])
        there = int(starts[-1])
        total = there if max_rows is None else min(there, max_rows)
        for begin in range(rank, total, count * world_size):
            rows = np.arange(begin, min(begin + count * world_size, total), world_size) * there // total
            numbers = np.searchsorted(starts, rows, side="right") - 1
            yield self.gather(split, numbers, rows - starts[numbers])

    # -- files

    def prepare(self, split: Split, numbers: Sequence[int]) -> None:
        """Fetch these shards in the background, in order, and let go of all others."""
        paths = [self._shards[split][number].path for number in numbers]
        with self._mapping:
            for path in self._mapped.keys() - set(paths):
                del self._mapped[path]
        if self._cache is not None:
            self._ahead = self._ahead or ReadAhead(self._cache)
            self._ahead.want(paths)

    def close(self) -> None:
        """Ends what runs in the background."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _map(self, path: str) -> _MappedShard:
        with self._mapping:
            if path in self._mapped:
                self._mapped.move_to_end(path)
                return self._mapped[path]
        with self._held(path) as file:
            shard = self._open(path, file)
        with self._mapping:
            self._mapped[path] = shard
            while len(self._mapped) > 1 and self._too_many():
                self._mapped.popitem(last=False)
        return shard

    def _too_many(self) -> bool:
        """A copy that was removed takes its disk space until its map goes too."""
        over = self._max_mapped is not None and sum(self._sizes[path] for path in self._mapped) > self._max_mapped
        return over or len(self._mapped) > _MAX_MAPS

    def _held(self, path: str) -> AbstractContextManager[Path]:
        if self._cache is not None:
            return self._cache.held(path)
        assert self._folder is not None
        return nullcontext(self._folder / path)

    def _open(self, path: str, file: Path) -> _MappedShard:
        width = self.seq_len + 1
        try:
            with pa.memory_map(str(file)) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
            tokens = batch.column("tokens").values.to_numpy(zero_copy_only=True).reshape(-1, width)
            documents = batch.column("documents")
            mask = batch.column("loss_mask").values.to_numpy(zero_copy_only=True) if self._masked else np.empty(0, "u1")
            shard = _MappedShard(
                tokens,
                batch.column("length").to_numpy(zero_copy_only=True),
                documents.offsets.to_numpy(zero_copy_only=True),
                documents.values.to_numpy(zero_copy_only=True),
                mask.reshape(-1, width),
            )
            shard.check()
            return shard
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise CorruptArtifact(
                f"{self._uri}: {path} is no shard of rows of {width} tokens ({error}); delete the artifact and run "
                "its stage again"
            ) from error
