"""The shards stage: documents as fixed-length rows of token ids, ready to be memory-mapped.

    {split}/shard-00000.arrow     uncompressed Arrow IPC file, one record batch:
        tokens      FixedSizeList<uint16 | uint32>[seq_len + 1]
        documents   List<int32>   where in the row a piece of a document begins; ascending, the first is 0
        numbers     List<int32>   for each piece, the document's number in the shard
        length      int32         tokens of the row; behind them is padding
        loss_mask   FixedSizeList<uint8>[seq_len + 1]   1 where a token is to be learned; only if `masked`
    data_report.json, data_report.png     what became of the data, from the sources on (data_report.py)

A shard holds documents of one source and one split: whole parts of what `ingest` wrote and `dedup` left, one after the
other up to about `part_bytes` of text. How documents become tokens is in encode.py, how they lie in rows in packing.py.
The mask is there if any source holds conversations. Preferences are in no shard.

Under a budget of tokens the training split takes the first documents of each source, whole ones, as many as its share
holds (mixture.py). What the shards contain depends on the documents, the tokenizer and the settings, never on the
cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifact import Artifact
from cluster.storage import JSON, FileEntry, Store
from llama.tokenizer import Tokenizer
from pipelines.data_config import DataConfig, Packing
from pipelines.data_report import write_report
from pipelines.documents import SPLITS, KeptPart, Kind, Split, kept_parts, read_part, stage_metadata
from pipelines.encode import Encoded, encode_documents
from pipelines.mixture import Claim, Take, take_parts
from pipelines.packing import Layout, count_targets, lay_out
from pipelines.parts import Written, map_parts
from pipelines.sources import DataError
from pipelines.stage import Stage, StageContext
from pipelines.tally import EXAMPLES
from pipelines.vocabulary import load_tokenizer, tokenizer_fingerprint


@dataclass(frozen=True)
class ShardConfig:
    """`seq_len` in tokens; `part_bytes` of text make a shard; `max_tokens` of training tokens over all sources, divided
    by `claims`, one for each source."""

    seq_len: int
    part_bytes: int
    packing: Packing
    max_tokens: int | None
    claims: tuple[Claim, ...]

    @classmethod
    def of(cls, data: DataConfig, seq_len: int) -> ShardConfig:
        divides = data.max_tokens is not None  # else weights divide bytes, and play no part here
        claims = tuple(Claim(each.weight if divides else 1.0, each.max_tokens) for each in data.sources)
        return cls(seq_len, data.part_bytes, data.packing, data.max_tokens, claims)


@dataclass(frozen=True)
class Shard:
    """A written shard. `tokens` counts its documents', special ones included; `targets` those that some row has as a
    target to be learned; `bytes` is the documents' text as UTF-8. Training draws from the first `samples` rows."""

    path: str
    source: int
    rows: int
    samples: int
    tokens: int
    targets: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: the parts to read, all of one source, split and kind. With a `limit` only its first documents,
    that many tokens at most."""

    name: str
    source: int
    kind: Kind
    documents: Store
    parts: tuple[KeptPart, ...]
    tokenizer: Store
    seq_len: int
    packing: Packing
    masked: bool
    limit: int | None = None


def shards_stage(config: ShardConfig) -> Stage:
    """The stage `shards`, downstream of `ingest`, `dedup` and `tokenizer`."""
    upstream = ("ingest", "dedup", "tokenizer")
    return Stage("shards", 2, config, partial(_write_shards, config), upstream=upstream)


def _write_shards(config: ShardConfig, context: StageContext) -> dict[str, JSON]:
    ingest, dedup = context.inputs["ingest"], context.inputs["dedup"]
    tokenizer = load_tokenizer(context.inputs["tokenizer"])
    parts = {split: kept_parts(ingest, dedup, split) for split in SPLITS}
    uris = [source["uri"] for source in stage_metadata(ingest)["sources"]]
    kinds = {part.source: part.kind for part in chain(*parts.values())}
    if tokenizer.chat_template is None and (chats := [uris[number] for number in kinds if kinds[number] == "chat"]):
        raise DataError(
            f"{chats[0]} holds conversations, and the tokenizer has no chat template; put chat_template.jinja beside "
            "the tokenizer.json of tokenizer.path"
        )
    masked = "chat" in kinds.values()
    tasks = {
        split: [
            ShardTask(
                name=f"{split}/shard-{number:05d}",
                source=group[0].source,
                kind=group[0].kind,
                documents=ingest.files,
                parts=group,
                tokenizer=context.inputs["tokenizer"].store,
                seq_len=config.seq_len,
                packing=config.packing,
                masked=masked,
            )
            for number, group in enumerate(_groups(parts[split], config.part_bytes))
        ]
        for split in SPLITS
    }
    bytes_per_token = stage_metadata(context.inputs["tokenizer"])["bytes_per_token"]
    results, over_tokens = _run(config, context, tasks, bytes_per_token)
    everything = [*chain(*results.values())]
    _keep_files(context, everything)
    shards = {split: [Shard(**each["shard"]) for each in results[split] if each["shard"]] for split in SPLITS}
    refused = [each for result in everything for each in result["refused"]]
    if not shards["train"]:
        raise DataError(_nothing_to_train_on(config, tasks["train"], refused))
    metadata: dict[str, Any] = {
        "seq_len": config.seq_len,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "recipe": context.key,
        "packing": config.packing,
        "masked": masked,
        "splits": {
            split: _totals(found, ("rows", "samples", "tokens", "targets", "documents", "bytes"))
            | {"shards": [asdict(shard) for shard in found]}
            for split, found in shards.items()
        },
        "sources": [
            {"uri": uri, "over_tokens": over_tokens[number]} | _of_source(number, shards, everything)
            for number, uri in enumerate(uris)
        ],
        "length_histogram": _sum_bins(result["histogram"] for result in everything),
        "preferences": sum(part.documents for part in chain(*parts.values()) if part.kind == "preference"),
        "chat_refused": {
            "documents": sum(result["refused_documents"] for result in everything),
            "examples": refused[:EXAMPLES],
        },
    }
    write_report(context, metadata)
    return metadata


def _of_source(number: int, shards: dict[Split, list[Shard]], results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What was written of a source, and how many of its conversations were refused."""
    mine = {split: [shard for shard in found if shard.source == number] for split, found in shards.items()}
    return {
        **_totals([*chain(*mine.values())], ("documents", "tokens", "bytes")),
        "training_tokens": sum(shard.tokens for shard in mine["train"]),
        "validation_tokens": sum(shard.tokens for shard in mine["validation"]),
        "refused": sum(each["refused_documents"] for each in results if each["source"] == number),
    }


def _totals(shards: Sequence[Shard], names: Sequence[str]) -> dict[str, Any]:
    return {name: sum(getattr(shard, name) for shard in shards) for name in names}


def _sum_bins(histograms: Iterable[Sequence[int]]) -> list[int]:
    total: list[int] = []
    for histogram in histograms:
        total += [0] * (len(histogram) - len(total))
        for power, count in enumerate(histogram):
            total[power] += count
    return total


def _nothing_to_train_on(config: ShardConfig, tasks: Sequence[ShardTask], refused: Sequence[dict[str, Any]]) -> str:
    if not tasks:
        return "no training document is left of data.sources; add text or conversations, or loosen data.clean"
    if refused:
        first = refused[0]
        return f"the chat template takes no conversation; {first['path']}, {first['offset']}: {first['reason']}"
    limits = [f"data.max_tokens={config.max_tokens}"] if config.max_tokens is not None else []
    limits += [
        f"data.sources[{number}].max_tokens={claim.at_most}"
        for number, claim in enumerate(config.claims)
        if claim.at_most is not None
    ]
    return f"{' and '.join(limits)}: not even the first document of a source is that short; raise it"


def _groups(parts: Sequence[KeptPart], part_bytes: int) -> list[tuple[KeptPart, ...]]:
    """The parts that are packed, in order, in groups of one source and at most `part_bytes` of text, or of one part."""
    groups: list[list[KeptPart]] = []
    size = 0
    for part in parts:
        if part.kind == "preference":
            continue
        if not groups or groups[-1][-1].source != part.source or size + part.bytes > part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.bytes
    return [tuple(group) for group in groups]


# -- the driver's part: what to write


def _run(
    config: ShardConfig, context: StageContext, tasks: dict[Split, list[ShardTask]], bytes_per_token: float
) -> tuple[dict[Split, list[dict[str, Any]]], list[int]]:
    """The results of the shards that count, in order: of the training split as many as the budget holds. And of each
    source how many documents lie beyond what it holds."""
    by_source = [[task for task in tasks["train"] if task.source == number] for number in range(len(config.claims))]
    validation = {task.name: task for task in tasks["validation"]}
    waiting = dict(validation)  # goes along with the first wave: starting one takes seconds
    results: dict[str, Any] = {}
    total = len(tasks["train"]) + len(validation)
    budgets = (config.max_tokens, *(claim.at_most for claim in config.claims))
    bound = "" if all(budget is None for budget in budgets) else "at most "

    def write(wave: dict[str, ShardTask]) -> None:
        before = len(results)

        def on_result(finished: int) -> None:
            done = min(before + finished, total)
            context.emit(f"wrote {done} of {bound}{total} shards", fraction=done / total)

        results.update(map_parts(context, write_shard, wave, on_result, record=False))

    def run(takes: Sequence[Take]) -> list[dict[str, Any]]:
        wave = [_limited(by_source[take.source][take.index], take.limit) for take in takes]
        write({task.name: task for task in wave} | waiting)
        waiting.clear()
        return [results[task.name] for task in wave]

    sizes = [[_estimated_tokens(task, bytes_per_token) for task in source] for source in by_source]
    taken = take_parts(config.max_tokens, config.claims, sizes, run, lambda result: result["tokens"])
    if waiting:
        write(dict(waiting))
    left_out = [
        sum(result["left_out"] for _, result in found) + sum(_documents(task) for task in source[len(found) :])
        for found, source in zip(taken, by_source, strict=True)
    ]
    counted: dict[Split, list[dict[str, Any]]] = {
        "train": [result for source in taken for _, result in source],
        "validation": [results[name] for name in validation],
    }
    return counted, left_out


def _limited(task: ShardTask, limit: int | None) -> ShardTask:
    return task if limit is None else replace(task, name=f"{task.name}-{limit}", limit=limit)


def _estimated_tokens(task: ShardTask, bytes_per_token: float) -> int:
    return math.ceil(sum(part.bytes for part in task.parts) / bytes_per_token)


def _documents(task: ShardTask) -> int:
    """Without its limit."""
    return sum(part.documents for part in task.parts)


def _keep_files(context: StageContext, results: Iterable[dict[str, Any]]) -> None:
    """Make the files of these results the stage's output, and delete the others: shards beyond the budget."""
    files = [FileEntry(**result["file"]) for result in results if result["file"]]
    context.record(*files)
    output = context.attempt.store
    for path in sorted(set(output.list()) - {file.path for file in files}):
        output.delete(path)


# -- the workers' part: one shard


@lru_cache(maxsize=1)
def _load(tokenizer: Store) -> Tokenizer:
    """Once in a worker process: a large vocabulary takes a second to parse."""
    return load_tokenizer(Artifact(tokenizer))


def write_shard(task: ShardTask, output: Store) -> Written:
    """Encode, pack and write one shard. Its result: the shard and its file, or none if there is nothing to write; its
    source and tokens; documents by length, bin k for 2^k tokens and more; how many conversations were refused, and some
    of them; how many documents its limit leaves out."""
    tokenizer = _load(task.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    documents = chain.from_iterable(read_part(task.documents, part) for part in task.parts)
    encoded = encode_documents(documents, task.kind, tokenizer, dtype, task.limit)
    result: dict[str, Any] = {
        "source": task.source,
        "shard": None,
        "file": None,
        "tokens": len(encoded.stream),
        "histogram": np.bincount(np.frexp(encoded.lengths)[1] - 1).tolist(),
        "refused_documents": len(encoded.refused),
        "left_out": 0 if task.limit is None else _documents(task) - len(encoded.lengths) - len(encoded.refused),
        "refused": [asdict(each) for each in encoded.refused[:EXAMPLES]],
    }
    if not len(encoded.lengths):
        return Written((), result)
    layout = lay_out(task.packing, encoded.lengths, task.seq_len)
    path = f"{task.name}.arrow"
    file = output.write_bytes(path, _to_arrow(layout, encoded, tokenizer.pad_id, task.masked))
    shard = Shard(
        path=path,
        source=task.source,
        rows=layout.num_rows,
        samples=layout.samples,
        tokens=len(encoded.stream),
        targets=count_targets(task.packing, encoded.lengths, encoded.learned),
        documents=len(encoded.lengths),
        bytes=encoded.bytes,
    )
    return Written((file,), result | {"shard": asdict(shard), "file": asdict(file)})


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _to_arrow(layout: Layout, encoded: Encoded, pad_id: int, masked: bool) -> bytes:
    def fixed(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), layout.seq_len + 1)

    def by_row(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values.astype(np.int32)))

    offsets = pa.array(layout.offsets().astype(np.int32))
    columns = {
        "tokens": fixed(layout.fill(encoded.stream, pad_id)),
        "documents": by_row(layout.columns),
        "numbers": by_row(layout.numbers),
        "length": pa.array(layout.row_lengths().astype(np.int32)),
    }
    if masked:
        learned = np.ones(len(encoded.stream), bool) if encoded.learned is None else encoded.learned
        columns["loss_mask"] = fixed(layout.fill(learned.astype(np.uint8), 0))
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
