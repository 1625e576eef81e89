"""The peer of the shards stage: `tokenizers` and pyarrow in one process, as one would write it in an afternoon.

    python -m pipelines.bench.plain JOB

JOB is a JSON file: see `Job`. The process reads the same part files, encodes with the same tokenizer on as many threads
as the cluster has workers, and writes rows of the same length in the same Arrow format. It keeps no record of
documents, no checksums and no manifest, and leaves it to the system when bytes reach the disk: it does less, so it is
no easy peer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama.bench.harness import peak_memory_mib, serve

if TYPE_CHECKING:
    import tokenizers

_BATCH_CHARS = 4 << 20
"""Encoded at once: more keeps all threads busy to the end of a batch, and costs memory."""


@dataclass(frozen=True)
class Job:
    parts: list[tuple[str, list[int]]]
    """Part files, and which of their rows are dropped."""
    tokenizer: str
    """Path of its `tokenizer.json`."""
    bos_id: int
    eos_id: int
    pad_id: int
    vocab_size: int
    output: str
    """Path of the Arrow file."""
    seq_len: int
    threads: int


def write_rows(job: Job, tokenizer: tokenizers.Tokenizer) -> int:
    """All documents, each between bos and eos, as one stream in rows of seq_len + 1 that share a token with the next.

    Returns the number of tokens."""
    width = job.seq_len + 1
    dtype = np.dtype(np.uint16 if job.vocab_size <= 1 << 16 else np.uint32)
    schema = pa.schema([("tokens", pa.list_(pa.from_numpy_dtype(dtype), width))])
    rest = np.empty(0, dtype)
    tokens = 0
    with pa.OSFile(job.output, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for texts in _batches(job.parts):
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            documents = [np.array([job.bos_id, *encoding.ids, job.eos_id], dtype) for encoding in encodings]
            tokens += sum(map(len, documents))
            stream = np.concatenate([rest, *documents])
            rows = max(0, (len(stream) - 1) // job.seq_len)
            _write(writer, schema, stream[: rows * job.seq_len + 1], job.seq_len)
            rest = stream[rows * job.seq_len :]
        if len(rest) > 1:
            _write(writer, schema, np.append(rest, np.full(width - len(rest), job.pad_id, dtype)), job.seq_len)
    return tokens


def _write(writer: Any, schema: pa.Schema, stream: np.ndarray, seq_len: int) -> None:
    if len(stream) > seq_len:
        rows = np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len]
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), seq_len + 1)
        writer.write_batch(pa.record_batch([column], schema=schema))


def _batches(parts: list[tuple[str, list[int]]]) -> Iterator[list[str]]:
    for path, dropped in parts:
        texts = pq.read_table(path, columns=["text"]).column("text")
        if dropped:
            stays = np.ones(len(texts), bool)
            stays[dropped] = False
            texts = texts.filter(pa.array(stays))
        batch, size = [], 0
        for text in texts.to_pylist():
            batch.append(text)
            size += len(text)
            if size >= _BATCH_CHARS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def main(path: str) -> None:
    job = Job(**json.loads(Path(path).read_text("utf-8")))
    os.environ["RAYON_NUM_THREADS"] = str(job.threads)  # read when the first batch is encoded
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(job.tokenizer)
    tokenizer.encode_special_tokens = True
    serve({}, lambda: {"tokens": write_rows(job, tokenizer), "peak_mib": peak_memory_mib()})


if __name__ == "__main__":
    main(sys.argv[1])
