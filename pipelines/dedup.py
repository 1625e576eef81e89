"""Dedup: which documents go because an earlier one has their text, or nearly, or because an evaluation set has.

    dropped.parquet     part, row, rule (exact, contaminated, near), of_part, of_row, similarity; in corpus order

No text is written: a reader of the documents leaves out the rows that the file names (documents.py). Three rules
apply one after the other, over all sources and both splits together, to the documents in the order of the corpus:

exact          of equal texts the first stays
contaminated   a document goes that shares more than `max_matches` distinct n-grams with the evaluation sets
near           a document goes if one that stays is before it, was found as a candidate by MinHash-LSH, and shares at
               least `threshold` of its n-grams (the exact Jaccard similarity of the sets)

Exact compares conversations by their canonical JSON, the others go by the words in them. Tasks over the parts hash the
texts; the driver holds some numbers for each document, of the bands' hashes one column at a time, and text only of the
few examples in the metadata.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cluster.storage import JSON, Store
from pipelines.data_config import DataConfig, NearDuplicateConfig
from pipelines.decontaminate import read_evaluation
from pipelines.documents import DROPPED, KEPT, SPLITS, ingest_parts, kept_entry, read_table, write_table
from pipelines.formats import Limits
from pipelines.minhash import Candidates, find_candidates
from pipelines.similarity import drop_similar, find_similar
from pipelines.sources import Corpus, DataError, find_corpus
from pipelines.stage import Stage, StageContext
from pipelines.survey import NumberedParts, Survey, read_ids, survey_parts, survey_path
from pipelines.tally import EXAMPLE_CHARS, EXAMPLES

Rule = Literal["exact", "contaminated", "near"]

_SCRATCH = "scratch"
_EVALUATION = f"{_SCRATCH}/evaluation.npz"


def dedup_stage(config: DataConfig) -> Stage:
    """The stage `dedup`, downstream of `ingest`. Lists the evaluation sets now: a missing one is a DataError before
    anything runs, and a file that changed gives the stage another key."""
    evaluation = (
        find_corpus(config.decontaminate.sources, "data.decontaminate.sources") if config.decontaminate else None
    )
    key = {
        "dedup": config.dedup,
        "decontaminate": config.decontaminate,
        "evaluation": evaluation.fingerprint if evaluation else None,
    }
    return Stage("dedup", 1, key, partial(_dedup, config, evaluation), upstream=("ingest",))


@dataclass(frozen=True)
class Drops:
    """Documents that go by a rule, ascending; for each the one that it is like, or -1, and their similarity, or NaN."""

    documents: np.ndarray
    of: np.ndarray
    similarity: np.ndarray

    @classmethod
    def none(cls) -> Drops:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def _dedup(config: DataConfig, evaluation: Corpus | None, context: StageContext) -> dict[str, JSON]:
    scratch = context.attempt.store
    ingest = context.inputs["ingest"]
    corpus = NumberedParts(ingest.files, tuple(ingest_parts(ingest)))
    too_short = _write_evaluation(config, evaluation, context) if evaluation else 0
    survey = _survey(config, context, corpus)
    stays = np.ones(corpus.documents, bool)
    drops: dict[Rule, Drops] = {}
    metadata: dict[str, Any] = {"exact": None, "contaminated": None, "near": None}
    sources = np.array([part.source for part in corpus.parts], np.int64)

    def drop(rule: Rule, dropped: Drops) -> None:
        stays[dropped.documents] = False
        drops[rule] = dropped
        parts, _ = corpus.locate(dropped.documents)
        metadata[rule] = {
            "documents": len(dropped.documents),
            "bytes": int(survey.bytes[dropped.documents].sum()),
            "by_source": {str(source): count for source, count in Counter(sources[parts].tolist()).items()},
        }

    drop("exact", find_equal(survey.ids) if config.dedup.exact else Drops.none())
    metadata["exact"]["examples"] = _examples(corpus, drops["exact"])
    if config.decontaminate and survey.matches is not None:
        found = np.flatnonzero(stays & (survey.matches > config.decontaminate.max_matches))
        drop("contaminated", Drops(found, np.full(len(found), -1), np.full(len(found), np.nan)))
        metadata["contaminated"] |= {
            "examples": _contaminated_examples(scratch, corpus, found),
            "too_short": too_short,
        }
    if config.dedup.near and survey.ngrams is not None:
        candidates = _find_candidates(survey, stays, config.dedup.near)
        pairs = find_similar(context, corpus, candidates, survey.ngrams, config.dedup.near, _SCRATCH)
        chosen = drop_similar(pairs)
        drop("near", Drops(chosen.second, chosen.first, chosen.similarity))
        metadata["near"] |= {"compared": len(candidates.first), "not_compared": candidates.not_compared}
        metadata["near"]["examples"] = _examples(corpus, drops["near"])

    context.record(write_table(scratch, DROPPED, _table(corpus, drops)))
    metadata[KEPT] = _kept(corpus, survey.bytes, stays)
    metadata["splits"] = _totals(corpus, metadata)
    scratch.delete(_SCRATCH)
    counts = ", ".join(f"{len(dropped.documents):,} {rule}" for rule, dropped in drops.items())
    context.emit(f"dropped {counts} of {corpus.documents:,} documents", fraction=1.0)
    return metadata


def _write_evaluation(config: DataConfig, evaluation: Corpus, context: StageContext) -> int:
    """Put the evaluation sets' n-grams where the workers find them; how many of their texts are too short for one."""
    assert config.decontaminate is not None
    context.emit("reading the evaluation sets")
    limits = Limits(config.max_document_bytes, config.max_decompressed_bytes)
    ngrams = read_evaluation(evaluation, config.decontaminate.ngram, limits)
    if ngrams.too_short:
        context.emit(f"{ngrams.too_short} evaluation texts have too few words for an n-gram and are ignored")
    context.attempt.store.write_bytes(_EVALUATION, ngrams.to_bytes())
    return ngrams.too_short


def _survey(config: DataConfig, context: StageContext, corpus: NumberedParts) -> Survey:
    if not (config.decontaminate or config.dedup.near):
        return read_ids(corpus)
    return survey_parts(context, corpus, config.dedup.near, _EVALUATION if config.decontaminate else None, _SCRATCH)


def find_equal(ids: np.ndarray) -> Drops:
    """All but the first of each run of equal ids, which are uint64 [documents, 2]; each goes for the first."""
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: equal ids stay in the order of the corpus
    ranked = ids[order]
    begins = np.r_[True, (ranked[1:] != ranked[:-1]).any(axis=1)]
    first = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    later = np.flatnonzero(~begins)
    later = later[np.argsort(order[later])]
    return Drops(order[later], first[later], np.ones(len(later)))


def _find_candidates(survey: Survey, stays: np.ndarray, config: NearDuplicateConfig) -> Candidates:
    """Pairs among the documents that stay so far and have words."""
    assert survey.ngrams is not None and survey.bands is not None
    documents = np.flatnonzero(stays & (survey.ngrams > 0))
    bands = (band[documents] for band in survey.bands)
    found = find_candidates(bands, survey.ngrams[documents], config.threshold)
    return Candidates(documents[found.first], documents[found.second], found.not_compared)


def _table(corpus: NumberedParts, drops: dict[Rule, Drops]) -> pa.Table:
    """DROPPED."""
    rules = np.concatenate([np.full(len(dropped.documents), rule, object) for rule, dropped in drops.items()])
    documents, of, similarity = (
        np.concatenate([getattr(dropped, name) for dropped in drops.values()])
        for name in ("documents", "of", "similarity")
    )
    order = np.argsort(documents)
    part, row = corpus.locate(documents[order])
    of_part, of_row = corpus.locate(np.maximum(of[order], 0))
    alone = of[order] < 0
    columns = {
        "part": pa.array(part, pa.int64()),
        "row": pa.array(row, pa.int64()),
        "rule": pa.array(rules[order], pa.string()),
        "of_part": pa.array(of_part, pa.int64(), mask=alone),
        "of_row": pa.array(of_row, pa.int64(), mask=alone),
        "similarity": pa.array(similarity[order], pa.float64(), mask=alone),
    }
    return pa.table(columns)


def _kept(corpus: NumberedParts, sizes: np.ndarray, stays: np.ndarray) -> list[dict[str, Any]]:
    return [kept_entry(int(stays[rows].sum()), int(sizes[rows][stays[rows]].sum())) for _, rows in corpus.rows()]


def _totals(corpus: NumberedParts, metadata: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Documents and bytes that stay of each split. Raises DataError if that is nothing of a split that was there."""
    totals: dict[str, dict[str, int]] = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    for part, kept in zip(corpus.parts, metadata[KEPT], strict=True):
        for name in ("documents", "bytes"):
            totals[part.split][name] += kept[name]
    for split in {part.split for part in corpus.parts}:
        if not totals[split]["documents"]:
            rules = {rule: metadata[rule]["documents"] for rule in ("exact", "contaminated", "near") if metadata[rule]}
            raise DataError(
                f"nothing is left of the {split} split: over both splits data.dedup and data.decontaminate dropped "
                f"{rules} documents; add text, raise data.dedup.near.threshold or data.decontaminate.max_matches"
            )
    return totals


def _examples(corpus: NumberedParts, drops: Drops) -> list[dict[str, Any]]:
    origins = _origins(corpus, drops.documents[:EXAMPLES])
    others = _origins(corpus, drops.of[:EXAMPLES])
    return [
        origin | {f"of_{name}": value for name, value in other.items()} | {"similarity": similarity}
        for origin, other, similarity in zip(origins, others, drops.similarity[:EXAMPLES].tolist(), strict=True)
    ]


def _contaminated_examples(scratch: Store, corpus: NumberedParts, documents: np.ndarray) -> list[dict[str, Any]]:
    examples = _origins(corpus, documents[:EXAMPLES])
    for example, part, row in zip(examples, *corpus.locate(documents[:EXAMPLES]), strict=True):
        example["ngram"] = read_table(scratch, survey_path(_SCRATCH, part), ("match",))["match"][int(row)].as_py()
    return examples


def _origins(corpus: NumberedParts, documents: np.ndarray) -> list[dict[str, Any]]:
    """Path, offset and the beginning of the text of each document."""
    origins: list[dict[str, Any]] = [{} for _ in documents]
    parts, rows = corpus.locate(documents)
    for part in set(parts.tolist()):
        table = read_table(corpus.files, corpus.parts[part].path, ("path", "offset", "text"))
        for place in np.flatnonzero(parts == part).tolist():
            (origin,) = table.slice(rows[place], 1).to_pylist()
            origins[place] = origin | {"text": origin["text"][:EXAMPLE_CHARS]}
    return origins
