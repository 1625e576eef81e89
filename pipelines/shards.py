"""The shards stage: documents as fixed-length rows of token ids, ready to be memory-mapped.

    {split}/shard-00000.arrow     uncompressed Arrow IPC file, one record batch:
        tokens      FixedSizeList<uint16 | uint32>[seq_len + 1]
        documents   List<int32>: where in the row's first seq_len tokens a document begins

A shard's documents, in order, each between `<|bos|>` and `<|eos|>`, form one stream of tokens: a model learns where
texts end, and a generation ends there. Row i holds the stream's tokens i·seq_len to (i+1)·seq_len inclusive.
Neighbours share one token, the last target of one and the first input of the next, so over a split every token but a
shard's first is a target exactly once. The last row of a shard is filled up with `<|pad|>`; the manifest counts full
rows and tokens, so a reader knows what is padding without looking for it. Training reads full rows only.

A shard is made of whole documents parts, grouped by their bytes: its content depends on the documents, the tokenizer
and `seq_len`, never on the cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers

from cluster.storage import JSON, Artifact, FileEntry, Store
from llama.tokenizer import Tokenizer
from pipelines.graph import Stage, StageContext
from pipelines.ingest import SPLITS, Part, Split, list_parts, read_parts
from pipelines.ray_map import map_on_cluster
from pipelines.vocabulary import load_tokenizer, tokenizer_fingerprint

_ENCODE_CHARS = 1 << 20  # an encoding costs about a hundred times its token ids until it is dropped


@dataclass(frozen=True)
class ShardConfig:
    """`seq_len` in tokens; `part_bytes` of text make a shard."""

    seq_len: int
    part_bytes: int


@dataclass(frozen=True)
class ShardTask:
    """Shard number `index` of a split: which parts to read, where to write."""

    split: Split
    index: int
    documents: Artifact
    parts: tuple[str, ...]
    output: Store
    seq_len: int


@dataclass(frozen=True)
class Shard:
    """A written shard. `tokens` counts its stream, special tokens included; `bytes` is its documents' text as UTF-8."""

    path: str
    rows: int
    full_rows: int
    tokens: int
    documents: int
    bytes: int


def shards_stage(config: ShardConfig) -> Stage:
    """The stage `shards`, downstream of `ingest` and `tokenizer`."""
    return Stage("shards", 1, config, partial(_write_shards, config), upstream=("ingest", "tokenizer"))


def _write_shards(config: ShardConfig, context: StageContext) -> dict[str, JSON]:
    documents = context.inputs["ingest"]
    tokenizer = load_tokenizer(context.inputs["tokenizer"])
    output = context.attempt.store
    tasks = [
        ShardTask(split, index, documents, parts, output, config.seq_len)
        for split in SPLITS
        for index, parts in enumerate(_group_parts(list_parts(documents, split), config.part_bytes))
    ]

    def on_result(finished: int) -> None:
        context.emit(f"wrote {finished} of {len(tasks)} shards", fraction=finished / len(tasks))

    written = map_on_cluster(partial(write_shard, tokenizer.backend.to_str()), tasks, on_result)
    context.record(*(entry for entry, _ in written))
    by_split: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
    for task, (_, shard) in zip(tasks, written, strict=True):
        by_split[task.split].append(shard)
    metadata: dict[str, Any] = {
        "seq_len": config.seq_len,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "splits": {split: _totals(shards) for split, shards in by_split.items()},
    }
    return metadata


def _totals(shards: Sequence[Shard]) -> dict[str, Any]:
    counted = ("rows", "full_rows", "tokens", "documents", "bytes")
    totals: dict[str, Any] = {name: sum(getattr(shard, name) for shard in shards) for name in counted}
    return totals | {"shards": [asdict(shard) for shard in shards]}


def _group_parts(parts: Sequence[Part], part_bytes: int) -> Iterator[tuple[str, ...]]:
    """Paths of the parts, in order, in groups of at most `part_bytes` of text or of one part."""
    group: list[str] = []
    size = 0
    for part in parts:
        if group and size + part.bytes > part_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append(part.path)
        size += part.bytes
    if group:
        yield tuple(group)


@lru_cache(maxsize=1)
def _load(tokenizer_json: str) -> Tokenizer:
    """Once in a worker process: a large vocabulary takes a second to parse."""
    return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json))


def write_shard(tokenizer_json: str, task: ShardTask) -> tuple[FileEntry, Shard]:
    """Encode, pack and write one shard with the tokenizer given as `tokenizer.json` text. Idempotent."""
    tokenizer = _load(tokenizer_json)
    dtype = token_dtype(tokenizer.vocab_size)
    encoded: list[np.ndarray] = []
    text_bytes = 0
    for texts in _batches(text for _, text in read_parts(task.documents, list(task.parts))):
        encoded.extend(np.array(ids, dtype) for ids in tokenizer.encode_batch(texts))
        text_bytes += sum(len(text.encode()) for text in texts)
    stream, starts = join_documents(encoded, tokenizer.bos_id, tokenizer.eos_id, dtype)
    rows = pack(stream, task.seq_len, tokenizer.pad_id)
    path = f"{task.split}/shard-{task.index:05d}.arrow"
    entry = task.output.write_bytes(path, _to_arrow(rows, starts, task.seq_len))
    full_rows = (len(stream) - 1) // task.seq_len
    return entry, Shard(path, len(rows), full_rows, len(stream), len(encoded), text_bytes)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _ENCODE_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def join_documents(
    documents: Sequence[np.ndarray], bos_id: int, eos_id: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The stream of the documents' ids, each between `bos_id` and `eos_id`, and where in it each document begins."""
    bos, eos = np.array([bos_id], dtype), np.array([eos_id], dtype)
    stream = np.concatenate([part for ids in documents for part in (bos, ids, eos)])
    lengths = np.array([len(ids) + 2 for ids in documents], np.int64)
    return stream, np.cumsum(lengths) - lengths


def pack(stream: np.ndarray, seq_len: int, pad_id: int) -> np.ndarray:
    """`[rows, seq_len + 1]`: row i is the stream from i·seq_len to (i+1)·seq_len inclusive, the last one padded."""
    rows = -(-(len(stream) - 1) // seq_len)
    padded = np.full(rows * seq_len + 1, pad_id, stream.dtype)
    padded[: len(stream)] = stream
    return np.lib.stride_tricks.sliding_window_view(padded, seq_len + 1)[::seq_len]


def _to_arrow(rows: np.ndarray, starts: np.ndarray, seq_len: int) -> bytes:
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), seq_len + 1)
    offsets = np.searchsorted(starts, np.arange(len(rows) + 1) * seq_len).astype(np.int32)
    documents = pa.ListArray.from_arrays(pa.array(offsets), pa.array((starts % seq_len).astype(np.int32)))
    batch = pa.record_batch([tokens, documents], names=["tokens", "documents"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
