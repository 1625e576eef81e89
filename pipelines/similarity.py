"""Exact similarities of candidate pairs, on the cluster, with bounded memory.

The n-grams of two candidates lie in different part files, and nothing is fetched by the document. So the documents
are put in groups of bounded size: those that pairs connect into one, if it can hold them. Tasks over the parts write
the n-grams of each group's documents; tasks over the groups read their own back from all parts and compare. Pairs
whose documents are in two groups, because too many are connected, are compared by a task that reads the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.storage import Store
from pipelines.data_config import NearDuplicateConfig
from pipelines.documents import Part, read_table, write_table
from pipelines.minhash import Candidates
from pipelines.ngrams import distinct, hash_words, ngram_set, plain_text
from pipelines.parts import Written, map_parts
from pipelines.stage import StageContext
from pipelines.survey import NumberedParts

GROUP_BYTES = 64 << 20
_PAIRS = 1 << 16  # Python objects made at once

_NGRAMS = pa.schema([("document", pa.int64()), ("ngrams", pa.large_list(pa.uint64()))])


@dataclass(frozen=True)
class Pairs:
    """`first` and `second` are documents' numbers (int64), `similarity` is their n-grams' Jaccard similarity."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray


def find_similar(
    context: StageContext,
    corpus: NumberedParts,
    candidates: Candidates,
    sizes: np.ndarray,
    config: NearDuplicateConfig,
    scratch: str,
) -> Pairs:
    """Those of the candidate pairs whose similarity reaches the threshold.

    Args:
        sizes: distinct n-grams of each document of the corpus.
        scratch: folder in the attempt for files that are not part of the output.
    """
    if not len(candidates.first):
        return Pairs(candidates.first, candidates.second, np.empty(0))
    documents, indices = np.unique(np.concatenate([candidates.first, candidates.second]), return_inverse=True)
    first, second = np.split(indices, 2)
    groups = group_documents(first, second, sizes[documents] * np.dtype(np.uint64).itemsize, GROUP_BYTES)
    batches = _write_groups(context, corpus, documents, groups, config.ngram, scratch)

    low, high = np.sort(np.stack([groups[first], groups[second]]), axis=0)
    order = np.lexsort((high, low))
    changes = np.flatnonzero((np.diff(low[order]) != 0) | (np.diff(high[order]) != 0)) + 1
    tasks = {}
    for chosen in np.split(order, changes):
        one, other = int(low[chosen[0]]), int(high[chosen[0]])
        name = f"{one:05d}-{other:05d}"
        pairs = pa.table({"first": candidates.first[chosen], "second": candidates.second[chosen]})
        write_table(context.attempt.store, f"{scratch}/candidates/{name}.parquet", pairs)
        tasks[f"compare/{name}"] = CompareTask(
            f"{scratch}/candidates/{name}.parquet",
            tuple(batches[one] if one == other else batches[one] + batches[other]),
            config.threshold,
            f"{scratch}/similar/{name}.parquet",
        )

    def on_result(finished: int) -> None:
        context.emit(
            f"compared {finished} of {len(tasks)} groups of candidates", fraction=0.9 + 0.1 * finished / len(tasks)
        )

    map_parts(context, compare, tasks, on_result, record=False)
    found = pa.concat_tables(read_table(context.attempt.store, task.path) for task in tasks.values())
    return Pairs(*(column.to_numpy() for column in found.columns))


def _write_groups(
    context: StageContext, corpus: NumberedParts, documents: np.ndarray, groups: np.ndarray, ngram: int, scratch: str
) -> dict[int, list[tuple[str, int]]]:
    """Have the n-grams of the documents written; the record batches (file, number) that hold each group's."""
    parts, rows = corpus.locate(documents)
    tasks = {}
    batches: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for index in distinct(parts).tolist():
        begin, end = np.searchsorted(parts, [index, index + 1])
        path = f"{scratch}/ngrams/{index:05d}.arrow"
        task = NgramsTask(
            corpus.files, corpus.parts[index], ngram, rows[begin:end], documents[begin:end], groups[begin:end], path
        )
        tasks[f"ngrams/{index:05d}"] = task
        for number, group in enumerate(batches_of(task.groups)):
            batches[group].append((path, number))

    def on_result(finished: int) -> None:
        context.emit(f"wrote n-grams of {finished} of {len(tasks)} parts", fraction=0.6 + 0.3 * finished / len(tasks))

    map_parts(context, write_ngrams, tasks, on_result, record=False)
    return batches


def group_documents(first: np.ndarray, second: np.ndarray, sizes: np.ndarray, limit: int) -> np.ndarray:
    """The group of each document.

    Args:
        first, second: pairs of documents 0 to n - 1.
        sizes: int64 [n], in bytes.
        limit: a group has at most twice as many bytes, and perhaps one document more. What pairs connect shares a
            group unless it is larger than this.
    """
    labels = _components(first, second, len(sizes))
    order = np.argsort(labels, kind="stable")
    _, component, members = np.unique(labels[order], return_inverse=True, return_counts=True)
    begins = np.cumsum(sizes[order]) - sizes[order]
    totals = np.bincount(component, sizes[order])[component]
    component_begins = begins[(np.cumsum(members) - members)[component]]
    groups = np.empty(len(sizes), np.int64)
    groups[order] = np.where(totals <= limit, component_begins, begins) // limit
    return groups


def _components(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """For each of `count` nodes a number that it shares with those it is connected to, and with no others."""
    labels = np.arange(count)
    while True:
        low = np.minimum(labels[first], labels[second])
        if np.array_equal(low, np.maximum(labels[first], labels[second])):
            return labels
        np.minimum.at(labels, labels[first], low)
        np.minimum.at(labels, labels[second], low)
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]


@dataclass(frozen=True)
class NgramsTask:
    """Rows of a part file, the documents' numbers in the corpus and their groups: int64 [rows] each."""

    files: Store
    part: Part
    ngram: int
    rows: np.ndarray
    documents: np.ndarray
    groups: np.ndarray
    path: str


def write_ngrams(task: NgramsTask, output: Store) -> Written:
    """The n-grams of a part's documents, a record batch for each group, ascending: `batches_of` says which."""
    texts = read_table(task.files, task.part.path, ("text",))["text"]
    with output.open_output(task.path) as file, pa.ipc.new_file(file, _NGRAMS) as writer:
        for group in batches_of(task.groups):
            chosen = np.flatnonzero(task.groups == group)
            found = [
                ngram_set(hash_words(plain_text(texts[int(row)].as_py(), task.part.kind)), task.ngram)
                for row in task.rows[chosen]
            ]
            ends = np.cumsum([0, *map(len, found)])
            ngrams = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(np.concatenate(found)))
            writer.write_batch(pa.record_batch([pa.array(task.documents[chosen]), ngrams], schema=_NGRAMS))
    return Written((file.entry,), None)


def batches_of(groups: np.ndarray) -> list[int]:
    """The group of each record batch in the file of a task with these groups."""
    found: list[int] = distinct(groups).tolist()
    return found


@dataclass(frozen=True)
class CompareTask:
    """The file with the pairs to compare, and the record batches (file, number) with their documents' n-grams."""

    candidates: str
    batches: tuple[tuple[str, int], ...]
    threshold: float
    path: str


def compare(task: CompareTask, output: Store) -> Written:
    """Writes those of the pairs whose similarity reaches the threshold."""
    first, second = (column.to_numpy() for column in read_table(output, task.candidates, ("first", "second")).columns)
    wanted = set(np.concatenate([first, second]).tolist())
    ngrams = {number: found for batch in task.batches for number, found in _read_batch(output, batch, wanted)}
    similarity = np.empty(len(first))
    for chosen in np.split(np.arange(len(first)), np.flatnonzero(np.diff(first)) + 1):
        others = [ngrams[number] for number in second[chosen].tolist()]
        similarity[chosen] = jaccard(ngrams[int(first[chosen[0]])], others)
    similar = similarity >= task.threshold
    found = Pairs(first[similar], second[similar], similarity[similar])
    return Written((write_table(output, task.path, pa.table(vars(found))),), None)


def _read_batch(output: Store, batch: tuple[str, int], wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    path, index = batch
    with output.open_input(path) as file, pa.ipc.open_file(file) as reader:
        table = reader.get_batch(index)
    ngrams = table["ngrams"].values.to_numpy()
    ends = table["ngrams"].offsets.to_numpy()
    for row, number in enumerate(table["document"].to_pylist()):
        if number in wanted:
            yield number, ngrams[ends[row] : ends[row + 1]]


def jaccard(ngrams: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Jaccard similarity of a set with each of the others, all ascending arrays of distinct hashes and none empty."""
    sizes = np.array([len(other) for other in others])
    joined = np.concatenate(others)
    places = np.minimum(np.searchsorted(ngrams, joined), len(ngrams) - 1)
    common = np.add.reduceat(ngrams[places] == joined, np.cumsum(sizes) - sizes, dtype=np.int64)
    return common / (len(ngrams) + sizes - common)


def drop_similar(pairs: Pairs) -> Pairs:
    """Which documents go, `second`, each with the most similar one that stays, `first`; ascending.

    In the order of the corpus, a document stays unless one that stays is before it and similar to it.
    """
    order = np.lexsort((pairs.first, -pairs.similarity, pairs.second))
    chosen: list[int] = []
    dropped: set[int] = set()
    for some in np.split(order, range(_PAIRS, len(order), _PAIRS)):
        for index, first, second in zip(
            some.tolist(), pairs.first[some].tolist(), pairs.second[some].tolist(), strict=True
        ):
            if second not in dropped and first not in dropped:
                dropped.add(second)
                chosen.append(index)
    return Pairs(pairs.first[chosen], pairs.second[chosen], pairs.similarity[chosen])
