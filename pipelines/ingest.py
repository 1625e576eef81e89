"""Ingest: the sources' text as documents, each text once, divided into training and validation.

    {split}/part-00000.parquet    columns id, text, source, split; parts and rows in the order of the corpus
    quarantine.json               what could not be read: file, byte offset, reason

A document's id is the hash of its text. Equal ids keep only the first document. The split is a function of the id, so
neither a duplicate nor a rerun with more data can move a text from one split to the other.

Parts are read by Ray Data tasks wherever they run. Local files must therefore be the same on every machine; a task
that finds a file of another size than the driver listed stops the stage (see `read_documents`). Parts, rows and bytes
depend on corpus and configuration alone, never on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage import JSON, Artifact, FileEntry, NotFound, Store
from pipelines.graph import Stage, StageContext
from pipelines.ray_map import map_on_cluster
from pipelines.sources import Corpus, DataError, Piece, Quarantined, Source, find_corpus, read_documents

if TYPE_CHECKING:
    from pipelines.recipe import DataConfig

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("source", pa.string()), ("split", pa.string())])
_QUARANTINED_IN_MANIFEST = 20


@dataclass(frozen=True)
class PartTask:
    """Part number `index`: what to read, where to write, and the rules."""

    index: int
    sources: tuple[Source, ...]
    pieces: tuple[Piece, ...]
    output: Store
    validation_fraction: float
    min_document_chars: int


@dataclass(frozen=True)
class PartFile:
    """A written part; `ids` are its documents' in order, `sizes` the bytes (UTF-8) of their texts."""

    entry: FileEntry
    split: Split
    ids: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class PartResult:
    files: tuple[PartFile, ...]
    too_short: int
    quarantined: tuple[Quarantined, ...]


def ingest_stage(config: DataConfig) -> Stage:
    """The stage `ingest`. Lists the sources now: a missing one is a DataError before anything runs, and a file that
    changed gives the stage another key."""
    corpus = find_corpus(config.sources, config.max_bytes)
    return Stage(
        name="ingest",
        version=1,
        config={"data": config, "files": corpus.fingerprint},
        run=partial(_ingest, config, corpus),
    )


def _ingest(config: DataConfig, corpus: Corpus, context: StageContext) -> dict[str, JSON]:
    output = context.attempt.store
    tasks = [
        PartTask(index, corpus.sources, pieces, output, config.validation_fraction, config.min_document_chars)
        for index, pieces in enumerate(corpus.parts(config.part_bytes))
    ]

    def on_result(finished: int) -> None:
        context.emit(f"read {finished} of {len(tasks)} parts", fraction=finished / len(tasks))

    results = map_on_cluster(write_part, tasks, on_result)
    files, duplicates = _drop_duplicates(results, output)
    quarantined = [item for result in results for item in result.quarantined]
    if quarantined:
        context.emit(f"{len(quarantined)} documents could not be read and are left out: see quarantine.json")
    metadata: dict[str, Any] = {
        "splits": {split: _totals(split, files) for split in SPLITS},
        "sources": [{"uri": source.uri} | _read_from(index, corpus) for index, source in enumerate(corpus.sources)],
        "duplicates": duplicates,
        "too_short": sum(result.too_short for result in results),
        "quarantined": len(quarantined),
        "quarantine": [f"{item.path}: {item.reason}" for item in quarantined[:_QUARANTINED_IN_MANIFEST]],
    }
    _check_splits(config, metadata)
    context.record(*(file.entry for file in files))
    context.record(output.write_json("quarantine.json", [asdict(item) for item in quarantined]))
    return metadata


def _read_from(index: int, corpus: Corpus) -> dict[str, int]:
    pieces = [piece for piece in corpus.pieces if piece.file.source == index]
    return {"files": len(pieces), "bytes": sum(piece.size for piece in pieces)}


def _totals(split: Split, files: list[PartFile]) -> dict[str, Any]:
    chosen = [file for file in files if file.split == split]
    return {
        "documents": sum(len(file.ids) for file in chosen),
        "bytes": sum(sum(file.sizes) for file in chosen),
        "parts": [{"path": file.entry.path, "bytes": sum(file.sizes)} for file in chosen],
    }


def _check_splits(config: DataConfig, metadata: dict[str, Any]) -> None:
    documents = {split: metadata["splits"][split]["documents"] for split in SPLITS}
    if not any(documents.values()):
        raise DataError(
            f"the corpus is empty: {metadata['quarantined']} documents could not be read and {metadata['too_short']} "
            f"are shorter than data.min_document_chars={config.min_document_chars}; check data.sources"
        )
    for split in SPLITS:
        if not documents[split]:
            remedy = "lower" if split == "train" else "raise"
            raise DataError(
                f"the {split} split is empty: data.validation_fraction={config.validation_fraction} of "
                f"{sum(documents.values())} documents; add text, or {remedy} data.validation_fraction"
            )


def split_of(document_id: str, validation_fraction: float) -> Split:
    """A document's split: its id's upper 64 bits as a number in [0, 1), against the fraction."""
    return "validation" if int(document_id[:16], 16) / 2**64 < validation_fraction else "train"


def write_part(task: PartTask) -> PartResult:
    """Read a part's pieces and write its documents, one file for each split that has any. Idempotent."""
    rows: dict[Split, list[dict[str, str]]] = {split: [] for split in SPLITS}
    quarantined = []
    too_short = 0
    for piece in task.pieces:
        for found in read_documents(task.sources[piece.file.source], piece):
            if isinstance(found, Quarantined):
                quarantined.append(found)
            elif len(found.text) < task.min_document_chars:
                too_short += 1
            else:
                split = split_of(found.id, task.validation_fraction)
                source = found.path if piece.whole else f"{found.path}@{found.offset}"
                rows[split].append({"id": found.id, "text": found.text, "source": source, "split": split})
    name = f"part-{task.index:05d}.parquet"
    files = tuple(
        _write_table(pa.Table.from_pylist(rows[split], _SCHEMA), task.output, f"{split}/{name}", split)
        for split in SPLITS
        if rows[split]
    )
    return PartResult(files, too_short, tuple(quarantined))


def _write_table(table: pa.Table, output: Store, path: str, split: Split) -> PartFile:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    entry = output.write_bytes(path, buffer.getvalue().to_pybytes())
    sizes = pc.binary_length(table["text"]).to_pylist()
    return PartFile(entry, split, tuple(table["id"].to_pylist()), tuple(sizes))


def _drop_duplicates(results: list[PartResult], output: Store) -> tuple[list[PartFile], int]:
    """Keep each id's first document. A part that loses rows is written anew under another name: a straggling task
    that writes the old one again then changes nothing that counts."""
    seen: set[str] = set()
    keep: list[list[int]] = []
    files = [file for result in results for file in result.files]
    for file in files:
        rows = []
        for row, document_id in enumerate(file.ids):
            if document_id not in seen:
                seen.add(document_id)
                rows.append(row)
        keep.append(rows)
    losing = [index for index, file in enumerate(files) if len(keep[index]) < len(file.ids)]
    rewritten = map_on_cluster(
        partial(_keep_rows, output), [(files[index], keep[index]) for index in losing if keep[index]]
    )
    replacements = dict(zip([index for index in losing if keep[index]], rewritten, strict=True))
    for index in losing:
        output.delete(files[index].entry.path)
    kept = [replacements.get(index, file) for index, file in enumerate(files) if keep[index]]
    return kept, sum(len(file.ids) - len(rows) for file, rows in zip(files, keep, strict=True))


def _keep_rows(output: Store, task: tuple[PartFile, list[int]]) -> PartFile:
    file, rows = task
    table = _read_table(output, file.entry.path).take(pa.array(rows, pa.int64()))
    return _write_table(table, output, file.entry.path.replace(".parquet", "-unique.parquet"), file.split)


def _read_table(store: Store, path: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(store.read_bytes(path)))


@dataclass(frozen=True)
class Part:
    """A committed file of documents; `bytes` of their texts as UTF-8."""

    path: str
    bytes: int


def list_parts(documents: Artifact, split: Split) -> list[Part]:
    """The split's parts of a committed `ingest` artifact, in order. Raises NotFound if nothing is committed."""
    manifest = documents.manifest()
    if manifest is None:
        raise NotFound(f"{documents.store.uri}: nothing is committed here; run the stage ingest")
    metadata: Any = manifest.metadata
    return [Part(**part) for part in metadata["splits"][split]["parts"]]


def read_parts(documents: Artifact, paths: list[str]) -> Iterator[tuple[str, str]]:
    """(id, text) of every document in the given parts of a committed `ingest` artifact, in order, part by part."""
    files = documents.files
    for path in paths:
        table = _read_table(files, path)
        yield from zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)
