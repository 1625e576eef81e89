"""Micro-batches of pairs for an encoder–decoder, in the order of pipelines/permutation.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.artifact import Artifact
from llama.training.batch import Batch
from pipelines.loader import RankLoader, RankSlices
from pipelines.pair_set import PairSet
from pipelines.permutation import SampleOrder
from pipelines.sources import DataError


class PairLoader(RankLoader):
    """The training pairs of a committed `pairs` artifact, which each rank holds in memory.

    Args:
        seq_len: tokens of a target with the one that begins it; longer ones are not there (pipelines/pairs.py).
    """

    def __init__(self, artifact: Artifact, slices: RankSlices, seq_len: int, seed: int) -> None:
        self._artifact = artifact
        self._pairs = PairSet(artifact, "train")
        super().__init__(len(self._pairs), slices)
        self._order = SampleOrder([len(self._pairs)], seed)
        self._seq_len = seq_len

    def __next__(self) -> Batch:
        samples = self._slices.samples(np.array([self._taken]), self._start)
        _, rows = self._order.locate(samples[0])
        self._taken += 1
        return self._pairs.batch(rows, self._seq_len)

    def validation_batches(self, max_rows: int) -> list[Batch]:
        """The first held-out pairs; of the last ones, too few for a micro-batch of every rank, none.

        Raises DataError: there are fewer than that.
        """
        held_out = PairSet(self._artifact, "held_out")
        slices = RankSlices(
            self._slices.micro_batch * self._slices.world_size,
            self._slices.micro_batch,
            self._slices.rank,
            self._slices.world_size,
        )
        count = min(max_rows, len(held_out)) // slices.global_batch
        if count == 0:
            raise DataError(
                f"{min(max_rows, len(held_out))} held-out pairs are no micro-batch for each of {slices.world_size} "
                "workers; raise train.validate_rows and pairs.held_out_pairs, or set train.validate_every=0"
            )
        return [held_out.batch(rows, self._seq_len) for rows in slices.samples(np.arange(count), 0)]

    def close(self) -> None:
        """Nothing runs beside it."""


@dataclass(frozen=True)
class PairData:
    """The data of a training: a committed `pairs` artifact."""

    artifact: Artifact

    def open(self, slices: RankSlices, seq_len: int, seed: int, cache_dir: Path) -> PairLoader:
        return PairLoader(self.artifact, slices, seq_len, seed)
