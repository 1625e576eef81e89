"""What dedup has to know of each document: a few numbers, which tasks over the parts make from the texts.

The bands' hashes are the most of it, 8 bytes each. The driver keeps them in a file on its disk, and reads one band at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.storage import Store
from pipelines.data_config import NearDuplicateConfig
from pipelines.decontaminate import EvaluationNgrams
from pipelines.documents import Part, read_table, write_table
from pipelines.minhash import Signer, band_hashes, choose_bands
from pipelines.ngrams import hash_words, ngram_set, plain_text
from pipelines.parts import Written, map_parts
from pipelines.stage import StageContext

_READERS = 8


@dataclass(frozen=True)
class NumberedParts:
    """The part files of a corpus, whose documents are numbered from 0 on through all of them."""

    files: Store
    parts: tuple[Part, ...]

    @cached_property
    def begins(self) -> np.ndarray:
        """The number of each part's first document, and of the first after the last part: int64 [parts + 1]."""
        return np.cumsum([0, *(part.documents for part in self.parts)])

    @property
    def documents(self) -> int:
        return int(self.begins[-1])

    def rows(self) -> Iterator[tuple[Part, slice]]:
        """Each part and its documents' numbers."""
        for part, begin in zip(self.parts, self.begins.tolist(), strict=False):
            yield part, slice(begin, begin + part.documents)

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of documents' numbers the parts' and the rows' in them."""
        parts = np.searchsorted(self.begins, documents, "right") - 1
        return parts, documents - self.begins[parts]


@dataclass(frozen=True)
class Survey:
    """The documents of a corpus in columns.

    `ids` are the hashes of the texts: uint64 [documents, 2]; `bytes` their lengths: int64 [documents]. Of the rest is
    there what was asked for: `ngrams`, distinct ones in a document, and `bands`, hashes of its signature: uint64
    [bands, documents], of no meaning where there are no n-grams; `matches`, distinct n-grams that it shares with the
    evaluation sets.
    """

    ids: np.ndarray
    bytes: np.ndarray
    ngrams: np.ndarray | None = None
    bands: np.ndarray | None = None
    matches: np.ndarray | None = None


def read_ids(corpus: NumberedParts) -> Survey:
    """A survey that needs no text, and so no cluster."""
    ids = np.empty((corpus.documents, 2), np.uint64)
    sizes = np.empty(corpus.documents, np.int64)

    def read(part: Part, rows: slice) -> None:
        table = read_table(corpus.files, part.path, ("id", "bytes"))
        ids[rows], sizes[rows] = _numbers(table["id"]), table["bytes"].to_numpy()

    _for_each_part(read, corpus)
    return Survey(ids, sizes)


def _for_each_part(read: Callable[[Part, slice], None], corpus: NumberedParts) -> None:
    """Call `read` with every part and its documents' numbers, a few at a time: a remote file takes a while to open."""
    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(read, *zip(*corpus.rows(), strict=True)):
            pass


def _numbers(ids: pa.ChunkedArray) -> np.ndarray:
    """128-bit ids in hexadecimal as uint64 [ids, 2]."""
    return np.frombuffer(bytes.fromhex("".join(ids.to_pylist())), ">u8").reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True)
class SurveyTask:
    """A part file, what to find out, and the file in the attempt to write it to; `evaluation` is the file there that
    has the n-grams of the evaluation sets."""

    files: Store
    part: Part
    near: NearDuplicateConfig | None
    evaluation: str | None
    path: str


def survey_parts(
    context: StageContext, corpus: NumberedParts, near: NearDuplicateConfig | None, evaluation: str | None, scratch: str
) -> Survey:
    """What the texts have to say of near-duplicates and contamination; see SurveyTask.

    Args:
        scratch: folder in the attempt for files that are not part of the output.
    """
    tasks = {
        f"survey/{index:05d}": SurveyTask(corpus.files, part, near, evaluation, survey_path(scratch, index))
        for index, part in enumerate(corpus.parts)
    }

    def on_result(finished: int) -> None:
        context.emit(f"hashed {finished} of {len(tasks)} parts", fraction=0.6 * finished / len(tasks))

    map_parts(context, survey_part, tasks, on_result, record=False)
    ids = np.empty((corpus.documents, 2), np.uint64)
    counted = {"bytes": np.empty(corpus.documents, np.int64)}
    bands = None
    if near:
        counted["ngrams"] = np.empty(corpus.documents, np.int64)
        shape = choose_bands(near.threshold, near.num_perm).count, corpus.documents
        with TemporaryFile() as file:  # the map keeps it
            bands = np.memmap(file, np.uint64, "w+", shape=shape)
    if evaluation:
        counted["matches"] = np.empty(corpus.documents, np.int64)
    paths = {task.part: task.path for task in tasks.values()}

    def read(part: Part, rows: slice) -> None:
        table = read_table(context.attempt.store, paths[part])
        ids[rows, 0], ids[rows, 1] = table["id_high"], table["id_low"]
        for name, column in counted.items():
            column[rows] = table[name]
        if bands is not None:
            for index, band in enumerate(bands):
                band[rows] = table[_band(index)]

    _for_each_part(read, corpus)
    return Survey(ids, bands=bands, **counted)


def survey_path(scratch: str, part: int) -> str:
    """The survey of a part, by its index. It also has `match`, the first n-gram that each document shares with the
    evaluation sets, as text."""
    return f"{scratch}/survey/{part:05d}.parquet"


def _band(index: int) -> str:
    return f"band_{index:03d}"


def survey_part(task: SurveyTask, output: Store) -> Written:
    """Hash a part's texts and write what comes of it, a row for each document."""
    table = read_table(task.files, task.part.path, ("id", "text", "bytes"))
    ids = _numbers(table["id"])
    columns: dict[str, Any] = {"id_high": ids[:, 0], "id_low": ids[:, 1], "bytes": table["bytes"]}
    texts = (plain_text(text.as_py(), task.part.kind) for text in table["text"])
    evaluation = _load(output, task.evaluation) if task.evaluation else None
    near = _NearColumns(task.near, len(table)) if task.near else None
    matches, match = [], []
    for row, text in enumerate(texts):
        hashes = hash_words(text)
        if near:
            near.add(row, hashes)
        if evaluation:
            count, ngram = evaluation.match(text, hashes)
            matches.append(count)
            match.append(ngram)
    if near:
        columns |= near.columns()
    if evaluation:
        columns |= {"matches": pa.array(matches, pa.int64()), "match": pa.array(match, pa.large_string())}
    return Written((write_table(output, task.path, pa.table(columns)),), None)


class _NearColumns:
    """Collects what LSH has to know of a part's documents."""

    def __init__(self, config: NearDuplicateConfig, documents: int) -> None:
        self._ngram = config.ngram
        self._bands = choose_bands(config.threshold, config.num_perm)
        self._sign = Signer(self._bands)
        self._ngrams = np.zeros(documents, np.int64)
        self._signatures = np.zeros((documents, self._bands.count * self._bands.rows), np.uint32)

    def add(self, row: int, hashes: np.ndarray) -> None:
        ngrams = ngram_set(hashes, self._ngram)
        self._ngrams[row] = len(ngrams)
        if len(ngrams):
            self._signatures[row] = self._sign(ngrams)

    def columns(self) -> dict[str, np.ndarray]:
        bands = band_hashes(self._signatures, self._bands)
        return {"ngrams": self._ngrams} | {_band(index): hashes for index, hashes in enumerate(bands)}


@lru_cache(maxsize=1)
def _load(store: Store, path: str) -> EvaluationNgrams:
    """Once in a worker process, for all of its parts."""
    return EvaluationNgrams.from_bytes(store.read_bytes(path))
