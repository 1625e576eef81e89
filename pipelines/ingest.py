"""Ingest: the sources' text, cleaned, as documents, divided into training and validation.

    {split}/00-00000-000.parquet    source number, task number, file number of the task; see documents.py
    quarantine/{task}.jsonl         what could not be read: path, offset, reason, records; of what is not even listed:
                                    listing
    left_out.jsonl                  files of the sources that are not read on purpose, with the reason

A document's id is the hash of its cleaned text and its split a function of the id, so neither a duplicate nor a rerun
with more data can move a text from one split to the other. The rules of `data.clean` and `data.min_document_chars` are
for text: a conversation or a pair of answers is taken as it is, once it is valid.

A task reads a stretch of one source and writes files of at most about `data.part_bytes` of text, however much comes out
of a compressed file: a worker holds a file for each split and the document at hand. With `data.max_bytes` sources are
read only as far as their shares go, in bytes of cleaned text (mixture.py).

Tasks run wherever Ray puts them. Local files must therefore be the same on every machine; a task that finds another
file than the driver listed stops the stage (see `read_piece`). What is written depends on corpus and configuration
alone, never on the number of workers.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import Any, Self

from cluster.storage import JSON, FileEntry, Store
from pipelines.clean import Cleaner, Dropped, Kept
from pipelines.data_config import DataConfig
from pipelines.documents import PARTS, SPLITS, Document, Part, Split, document_id, write_part
from pipelines.formats import read_piece
from pipelines.language import check_language
from pipelines.mixture import Claim, Take, take_parts
from pipelines.parts import Written, map_parts
from pipelines.records import Limits, Record
from pipelines.sources import Corpus, DataError, LeftOut, Piece, Quarantined, Source, find_corpus, group_pieces
from pipelines.stage import Stage, StageContext
from pipelines.tally import IN_MANIFEST, Tally, describe, in_order

_PART_DOCUMENTS = 1 << 16  # short documents cost more than their text
_SPOOL_BYTES = 1 << 20


@dataclass(frozen=True)
class IngestTask:
    """Pieces of one source. With `limit`, only the first documents that come to at most so many bytes."""

    name: str
    source: Source
    pieces: tuple[Piece, ...]
    limit: int | None = None


def ingest_stage(config: DataConfig) -> Stage:
    """The stage `ingest`. Lists the sources now: a missing one is a DataError before anything runs, and a file that
    changed gives the stage another key."""
    corpus = find_corpus(config.sources)
    return Stage("ingest", 2, _key(config, corpus), partial(_ingest, config, corpus))


def _key(config: DataConfig, corpus: Corpus) -> dict[str, Any]:
    """All that decides what is written: not how documents are told apart, packed and counted in tokens later."""
    later = {"dedup", "decontaminate", "packing", "max_tokens", "sources"}
    unused = {"max_tokens"} if config.max_bytes is not None else {"max_tokens", "weight"}
    return {
        "data": config.model_dump(mode="json", exclude=later),
        "sources": [source.model_dump(mode="json", exclude=unused) for source in config.sources],
        "files": corpus.fingerprint,
        "unicode": unicodedata.unidata_version if config.clean.unicode else None,
        "language_model": check_language(config.clean.language) if config.clean.language else None,
    }


def _ingest(config: DataConfig, corpus: Corpus, context: StageContext) -> dict[str, JSON]:
    if config.strict and corpus.quarantined:
        raise _strict(describe(corpus.quarantined[0]))
    by_source, cut = _read_sources(config, corpus, context)
    total = Tally()
    for tally, unreadable in zip(by_source, corpus.unreadable, strict=True):
        for item in unreadable:
            tally.put_in_quarantine(item)
        total.add(tally)
    if config.strict and total.quarantined:
        raise _strict(total.quarantine[0])
    splits = {split: _totals(total.parts, split) for split in SPLITS}
    _check_splits(config, total, splits, any(cut))
    if total.quarantined:
        context.emit(
            f"{total.quarantined} records could not be read: they are in quarantine, the folder of this stage's output"
        )
    for source, tally, short in zip(corpus.sources, by_source, cut, strict=True):
        if not tally.documents:
            limit = f", or raise data.max_bytes={config.max_bytes}" if short else ""
            context.emit(
                f"data.sources[{source.index}].uri={source.uri!r} yields no document: {_losses(tally)}; check its "
                f"settings{limit}"
            )
    left_out = [item for items in corpus.left_out for item in items]
    output = context.attempt.store
    context.record(*_write_lines(corpus.quarantined, output, "quarantine/listing.jsonl"))
    context.record(*_write_lines(left_out, output, "left_out.jsonl"))
    metadata: dict[str, Any] = {
        "sources": [_source(index, corpus, tally) for index, tally in enumerate(by_source)],
        PARTS: [asdict(part) for part in total.parts],
        "dropped": {rule: asdict(drops) for rule, drops in in_order(total.dropped).items()},
        "changed": in_order(total.changed),
        "quarantined": total.quarantined,
        "quarantine": total.quarantine,
        "left_out": [f"{item.path}: {item.reason}" for item in left_out[:IN_MANIFEST]],
        "splits": splits,
    }
    return metadata


def _read_sources(config: DataConfig, corpus: Corpus, context: StageContext) -> tuple[list[Tally], list[bool]]:
    """What became of each source, as far as its share of the budget goes, and whether that ended before the source."""
    groups = [group_pieces(pieces, config.part_bytes) for pieces in corpus.pieces]
    sizes = [[sum(piece.size for piece in group) for group in of] for of in groups]
    parts = sum(map(len, groups))
    ran: list[Tally] = []
    read = 0  # bytes of storage

    def run(takes: Sequence[Take]) -> list[Tally]:
        nonlocal read
        size = sum(sizes[take.source][take.index] for take in takes)

        def on_result(finished: int) -> None:
            if config.max_bytes is None:
                context.emit(f"read {finished} of {parts} parts", fraction=finished / parts)
                return
            # a byte of storage comes to so many of text as before: what it did is known only when a wave has ended
            found = sum(tally.bytes for tally in ran)
            yielded = found / read if found else 1.0
            goal = min(config.max_bytes, yielded * sum(map(sum, sizes)))
            fraction = min(1.0, (found + yielded * size * finished / len(takes)) / goal)
            context.emit(f"read {len(ran) + finished} parts, {fraction:.0%} of what is wanted", fraction=fraction)

        tasks = [
            IngestTask(_name(take), corpus.sources[take.source], groups[take.source][take.index], take.limit)
            for take in takes
        ]
        results = map_parts(context, partial(read_task, config), {task.name: task for task in tasks}, on_result)
        tallies = [Tally.from_json(results[task.name]) for task in tasks]
        ran.extend(tallies)
        read += size
        return tallies

    claims = [Claim(source.config.weight) for source in corpus.sources]
    taken = take_parts(config.max_bytes, claims, sizes, run, lambda tally: tally.bytes)
    by_source = []
    cut = []
    for found, of in zip(taken, groups, strict=True):
        tally = Tally()
        for _, each in found:
            tally.add(each)
        by_source.append(tally)
        cut.append(len(found) < len(of) or any(take.limit is not None for take, _ in found))
    context.forget({path for tally in ran for path in tally.files}.difference(*(tally.files for tally in by_source)))
    return by_source, cut


def _name(take: Take) -> str:
    """The limit follows from the corpus and the budget, which are in the stage's key."""
    return f"{take.source:02d}-{take.index:05d}" + ("" if take.limit is None else "-limited")


def _source(index: int, corpus: Corpus, tally: Tally) -> dict[str, Any]:
    source = corpus.sources[index]
    return {
        "uri": source.uri,
        "format": source.format,
        "kind": source.kind,
        "files": len({piece.file.path for piece in corpus.pieces[index]}),
        "left_out": len(corpus.left_out[index]),
        "documents_in": tally.documents_in,
        "bytes_in": tally.bytes_in,
        "documents": tally.documents,
        "bytes": tally.bytes,
        "dropped": {rule: drops.documents for rule, drops in in_order(tally.dropped).items()},
        "quarantined": tally.quarantined,
    }


def _totals(parts: Sequence[Part], split: Split) -> dict[str, int]:
    chosen = [part for part in parts if part.split == split]
    return {"documents": sum(part.documents for part in chosen), "bytes": sum(part.bytes for part in chosen)}


def _losses(tally: Tally) -> str:
    """What was read and not kept, with the first reason."""
    rules = ", ".join(f"{rule}: {drops.documents}" for rule, drops in in_order(tally.dropped).items())
    dropped = sum(drops.documents for drops in tally.dropped.values())
    return (
        f"{tally.quarantined} records could not be read{f' ({tally.quarantine[0]})' if tally.quarantine else ''} and "
        f"{dropped} were dropped{f' ({rules})' if rules else ''}"
    )


def _check_splits(config: DataConfig, total: Tally, splits: dict[Split, dict[str, int]], cut: bool) -> None:
    """Raises DataError if one is empty. `cut`: reading ended with the budget."""
    if not total.documents:
        limit = f", data.max_bytes={config.max_bytes}" if cut else ""
        raise DataError(
            f"the corpus is empty: {_losses(total)}; check data.sources and their text_column, "
            f"data.min_document_chars, data.clean{limit}"
        )
    for split in SPLITS:
        if not splits[split]["documents"]:
            remedy = "lower" if split == "train" else "raise"
            raise DataError(
                f"the {split} split is empty: data.validation_fraction={config.validation_fraction} of "
                f"{total.documents} documents; add text, or {remedy} data.validation_fraction"
            )


def split_of(document_id: str, validation_fraction: float) -> Split:
    """A document's split: its id's upper 64 bits as a number in [0, 1), against the fraction."""
    return "validation" if int(document_id[:16], 16) / 2**64 < validation_fraction else "train"


def read_task(config: DataConfig, task: IngestTask, output: Store) -> Written:
    """Read, clean and write the documents of a task; its result is a Tally. Idempotent.

    Raises DataError for a file that is not the one that was listed, with `data.strict` for the first thing that cannot
    be read, and StorageError."""
    with _Lines() as quarantine:
        reading = _Reading(config, task, output, quarantine)
        reading.read()
        entries = (*reading.files.entries, *quarantine.write(output, f"quarantine/{task.name}.jsonl"))
    reading.tally.parts = reading.files.parts
    reading.tally.files = [entry.path for entry in entries]
    return Written(entries, reading.tally.to_json())


class _Reading:
    """A task at work."""

    def __init__(self, config: DataConfig, task: IngestTask, output: Store, quarantine: _Lines) -> None:
        self._config = config
        self._task = task
        self._quarantine = quarantine
        self._clean = Cleaner(config.clean, config.min_document_chars) if task.source.kind == "text" else Kept
        self.files = _PartFiles(task, config.part_bytes, output)
        self.tally = Tally()

    def read(self) -> None:
        limits = Limits(self._config.max_document_bytes, self._config.max_decompressed_bytes)
        for piece in self._task.pieces:
            for found in read_piece(self._task.source, piece, limits):
                if isinstance(found, Quarantined):
                    self._put_in_quarantine(found)
                elif not self._take(found):
                    return self.files.finish()
        self.files.finish()

    def _take(self, record: Record) -> bool:
        """False if the limit is reached: this document and those behind it are as if they were not there."""
        outcome = self._clean(record.text)
        size_in = len(record.text.encode())
        if isinstance(outcome, Dropped):
            self.tally.drop(size_in, outcome, record.path, record.offset, record.text)
            return True
        size = len(outcome.text.encode()) if outcome.changed else size_in
        if size > max(size_in, self._config.max_document_bytes):
            limit = f"data.max_document_bytes={self._config.max_document_bytes}"
            reason = f"{size} bytes in normal form {self._config.clean.unicode}, more than {limit}"
            self._put_in_quarantine(Quarantined(record.path, record.offset, reason))
            return True
        if self._task.limit is not None and self.tally.bytes + size > self._task.limit:
            return False
        self.tally.keep(size_in, size, outcome.changed)
        document = Document(document_id(outcome.text), outcome.text, record.path, record.offset, record.metadata)
        self.files.add(document, size, split_of(document.id, self._config.validation_fraction))
        return True

    def _put_in_quarantine(self, item: Quarantined) -> None:
        if self._config.strict and self._config.max_bytes is None:  # else what lies here may be beyond the budget
            raise _strict(describe(item))
        self.tally.put_in_quarantine(item)
        self._quarantine.add(item)


class _PartFiles:
    """A task's documents on their way into part files."""

    def __init__(self, task: IngestTask, part_bytes: int, output: Store) -> None:
        self._task = task
        self._part_bytes = part_bytes
        self._output = output
        self._waiting: dict[Split, list[Document]] = {split: [] for split in SPLITS}
        self._bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self.entries: list[FileEntry] = []
        self.parts: list[Part] = []

    def add(self, document: Document, size: int, split: Split) -> None:
        """`size` of its text in bytes."""
        waiting = self._waiting[split]
        size += len(document.metadata)
        if waiting and (self._bytes[split] + size > self._part_bytes or len(waiting) >= _PART_DOCUMENTS):
            self._write(split)
        self._waiting[split].append(document)
        self._bytes[split] += size

    def finish(self) -> None:
        for split in SPLITS:
            if self._waiting[split]:
                self._write(split)

    def _write(self, split: Split) -> None:
        path = f"{split}/{self._task.name}-{len(self.parts):03d}.parquet"
        source = self._task.source
        entry, part = write_part(self._output, path, source.index, split, source.kind, self._waiting[split])
        self.entries.append(entry)
        self.parts.append(part)
        self._waiting[split], self._bytes[split] = [], 0


class _Lines:
    """JSON lines, on the local disk if they are many, for a file that is there only if there is a line."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, item: Quarantined | LeftOut) -> None:
        self._file.write(json.dumps(asdict(item)).encode() + b"\n")

    def write(self, output: Store, path: str) -> tuple[FileEntry, ...]:
        if not self._file.tell():
            return ()
        self._file.seek(0)
        with output.open_output(path) as target:
            shutil.copyfileobj(self._file, target)
        return (target.entry,)


def _write_lines(items: Iterable[Quarantined | LeftOut], output: Store, path: str) -> tuple[FileEntry, ...]:
    with _Lines() as lines:
        for item in items:
            lines.add(item)
        return lines.write(output, path)


def _strict(described: str) -> DataError:
    return DataError(f"{described}; mend it, or turn data.strict off: what cannot be read is then put in quarantine")
