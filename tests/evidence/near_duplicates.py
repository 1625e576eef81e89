"""Evidence for the removal of near-duplicates: what it finds beside brute force, and how its time grows.

    python -m tests.evidence.near_duplicates

Plants edited copies among stretches of Python's manual and standard library, and runs the stage's tasks in this
process. Times are of the CPU. Needs no cluster and about three minutes. Exits non-zero when a bar is missed.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from unittest.mock import patch

from cluster.storage import Store
from pipelines.data_config import DataConfig, DedupConfig, NearDuplicateConfig, SourceConfig
from pipelines.dedup import dedup_stage
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.runs import Run
from pipelines.similarity import Pairs, drop_similar
from tests.pipelines.data_stages import in_this_process
from tests.pipelines.near_duplicates import documents_stage, planted, similar_pairs

LEAST_RECALL, LEAST_PRECISION, MARGIN = 0.95, 0.98, 0.05
LARGEST_GROWTH = 5.0
COMPARED = 2500  # brute force compares all with all
SMALL, TIMES, ROUNDS = 5000, 4, 5


def run(texts: Sequence[str], near: NearDuplicateConfig) -> tuple[float, set[tuple[int, int]], set[int]]:
    """CPU seconds of the stage, the similar pairs that it found among the different texts, and which it dropped."""
    found: list[Pairs] = []

    def keep(pairs: Pairs) -> Pairs:
        found.extend((pairs, drop_similar(pairs)))
        return found[-1]

    config = DataConfig(sources=(SourceConfig(uri="stdlib"),), dedup=DedupConfig(near=near))
    graph = Graph([documents_stage(texts, part_documents=500), dedup_stage(config)])
    with tempfile.TemporaryDirectory() as folder, patch("pipelines.dedup.drop_similar", keep), in_this_process():
        store = Store(folder)
        stages = Run.create(store, "name: evidence\n")
        drive(graph, store, stages, until="ingest")
        started = time.process_time()
        drive(graph, store, stages)
        seconds = time.process_time() - started
    pairs, dropped = found
    return seconds, set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)), set(dropped.second.tolist())


def alike(count: int) -> list[str]:
    """Texts of which half is the same in all: no near-duplicates, and crowded buckets."""
    generator = random.Random(0)
    shared = " ".join(f"shared{number}" for number in range(60))
    return [f"{shared} {' '.join(str(generator.random()) for _ in range(15))}" for _ in range(count)]


def main() -> None:
    failed = 0

    def check(claim: str, figure: str, holds: bool) -> None:
        nonlocal failed
        failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'}  {claim:<94} {figure}", flush=True)

    texts = list(dict.fromkeys(planted(COMPARED, seed=2)))
    for threshold in (0.7, 0.8, 0.9):
        near = NearDuplicateConfig(threshold=threshold)
        similar = similar_pairs(texts, near.ngram, threshold)
        _, found, dropped = run(texts, near)
        certain = {pair for pair, value in similar.items() if value >= threshold + MARGIN}
        recall = len(certain & found) / len(certain)
        claim = f"threshold {threshold}: of the pairs at {threshold + MARGIN:.2f} or above, found"
        check(f"{claim}, at least {LEAST_RECALL}", f"{recall:.4f} of {len(certain)}", recall >= LEAST_RECALL)
        justified = {second for first, second in similar if first not in dropped}
        precision = len(dropped & justified) / len(dropped)
        claim = f"threshold {threshold}: of the dropped, like an earlier one at {threshold} or above that stays"
        check(
            f"{claim}, at least {LEAST_PRECISION}", f"{precision:.4f} of {len(dropped)}", precision >= LEAST_PRECISION
        )
        missed = {second for first, second in certain if first not in dropped} - dropped
        check(
            f"threshold {threshold}: of what stays, like such a one at {threshold + MARGIN:.2f}",
            f"{len(missed)}",
            not missed,
        )
        share = len(found & similar.keys()) / len(similar)
        print(f"      of all {len(similar)} pairs at {threshold} or above, found: {share:.4f}")

    corpora = {
        # not the first quarter of the larger: it would have few of the originals of its copies
        "half of them planted": [planted(count, seed=3, words=100) for count in (SMALL, SMALL * TIMES)],
        "half of each shared": [alike(count) for count in (SMALL, SMALL * TIMES)],
    }
    for title, corpora_by_size in corpora.items():
        seconds: dict[int, list[float]] = {len(corpus): [] for corpus in corpora_by_size}
        for _ in range(ROUNDS):
            for corpus in corpora_by_size:
                seconds[len(corpus)].append(run(corpus, NearDuplicateConfig())[0])
        growth = [large / small for small, large in zip(*seconds.values(), strict=True)]
        figure = f"{statistics.median(growth):.2f}× ({min(growth):.2f}–{max(growth):.2f}), "
        figure += " and ".join(f"{statistics.median(measured):.2f} s" for measured in seconds.values())
        claim = f"{TIMES}× {SMALL} documents, {title}: at most {LARGEST_GROWTH:g}× the time"
        check(claim, figure, statistics.median(growth) <= LARGEST_GROWTH)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
