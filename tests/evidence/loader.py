"""Evidence for the training loader: how fast one core reads, and how soon the first batch is there.

    python tests/evidence/loader.py [--rounds N]

Shards are made on the fly in a temporary folder: 128 MB of random tokens for each sequence length, and a set of 10 GB
of which the disk holds only what is not zero. Everything runs on one core, which is also all that torch may use; the
file system's cache is warm. The comparison is the loop one would write by hand: memory maps, a list of all rows,
shuffled once, a row at a time. One minute. Exits non-zero when a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402

from cluster.artifact import Artifact  # noqa: E402
from cluster.storage import FileEntry, Store  # noqa: E402
from pipelines.loader import ShardLoader  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402

RATE = 20e6
"""Tokens per second at the longest sequence length."""
SECONDS = 1.0
SEQ_LENS = (2048, 512, 128)
BATCH_TOKENS = 1 << 14
SPARSE_SHARDS, SPARSE_BYTES = 160, 64 << 20
BY_HAND = "concatenate, by hand"
SET_BYTES = 128 << 20
DOCUMENT = 700
"""Tokens of a document, about."""


def shard_bytes(rows: np.ndarray, packed: bool) -> bytes:
    """A shard file of full rows; where it is packed, with documents of about DOCUMENT tokens."""
    count, width = rows.shape
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)
    starts = np.arange(0, width if packed else 1, DOCUMENT)
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * len(starts))
    documents = pa.ListArray.from_arrays(offsets, pa.array(np.tile(starts, count).astype(np.int32)))
    numbers = pa.ListArray.from_arrays(offsets, pa.array(np.arange(count * len(starts), dtype=np.int32)))
    length = pa.array(np.full(count, width, np.int32))
    batch = pa.record_batch([tokens, documents, numbers, length], ["tokens", "documents", "numbers", "length"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def commit(
    folder: Path, seq_len: int, packed: bool, rows: int, write: Callable[[Store, str], FileEntry], shards: int
) -> Artifact:
    artifact = Artifact(Store(folder))
    attempt = artifact.begin()
    entries = [write(attempt.store, f"train/shard-{number:05d}.arrow") for number in range(shards)]
    counts = {"source": 0, "rows": rows, "samples": rows, "tokens": rows * (seq_len + 1), "targets": rows * seq_len}
    listed = [{"path": entry.path, **counts, "documents": rows, "bytes": rows} for entry in entries]
    attempt.commit(
        {
            "seq_len": seq_len,
            "vocab_size": 1 << 16,
            "bos_id": 1,
            "pad_id": 0,
            "tokenizer": "none",
            "packing": "best_fit" if packed else "concatenate",
            "masked": False,
            "splits": {"train": {"shards": listed}, "validation": {"shards": []}},
        },
        entries,
    )
    return artifact


def random_set(folder: Path, seq_len: int, packed: bool, shards: int = 16) -> Artifact:
    rows = SET_BYTES // shards // (2 * (seq_len + 1))
    generator = np.random.default_rng(0)

    def write(store: Store, path: str) -> FileEntry:
        tokens = generator.integers(1 << 16, size=(rows, seq_len + 1), dtype=np.uint16)
        return store.write_bytes(path, shard_bytes(tokens, packed))

    return commit(folder, seq_len, packed, rows, write, shards)


def sparse_set(folder: Path, seq_len: int) -> Artifact:
    rows = SPARSE_BYTES // (2 * (seq_len + 1))
    data = np.frombuffer(shard_bytes(np.zeros((rows, seq_len + 1), np.uint16), False), np.uint8)
    blocks = [begin for begin in range(0, len(data), 4096) if data[begin : begin + 4096].any()]

    def write(store: Store, path: str) -> FileEntry:
        file = store.local_path(path)
        assert file is not None
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as output:
            output.truncate(len(data))
            for begin in blocks:
                output.seek(begin)
                output.write(data[begin : begin + 4096])
        return FileEntry(path, len(data), "xxh3_128:never read")

    return commit(folder, seq_len, False, rows, write, SPARSE_SHARDS)


def batches(artifact: Artifact, seq_len: int, **options: int | None) -> ShardLoader:
    micro_batch = BATCH_TOKENS // seq_len
    return ShardLoader(artifact, seq_len=seq_len, global_batch=4 * micro_batch, micro_batch=micro_batch, **options)


def by_hand(artifact: Artifact, seq_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets; no documents, no state, no epochs."""
    mapped = []
    for entry in artifact.manifest().files:
        with pa.memory_map(str(artifact.files.local_path(entry.path))) as source:
            tokens = pa.ipc.open_file(source).get_batch(0).column("tokens")
        mapped.append(tokens.values.to_numpy(zero_copy_only=True).reshape(-1, seq_len + 1))
    rows = [(number, row) for number, shard in enumerate(mapped) for row in range(len(shard))]
    np.random.default_rng(0).shuffle(rows)
    size = BATCH_TOKENS // seq_len
    for begin in range(0, len(rows) - size, size):
        batch = np.stack([mapped[number][row] for number, row in rows[begin : begin + size]]).astype(np.int64)
        yield torch.from_numpy(batch[:, :-1]), torch.from_numpy(batch[:, 1:])


def rate(source: Iterator, count: int) -> float:
    """Tokens per second."""
    began = time.perf_counter()
    for _ in range(count):
        next(source)
    return count * BATCH_TOKENS / (time.perf_counter() - began)


def measure_rates(folder: Path, seq_len: int, rounds: int, claims: Claims) -> None:
    contestants: dict[str, Callable[[], Iterator]] = {}
    for packed in (False, True):
        artifact = random_set(folder / f"{seq_len}-{packed}", seq_len, packed)
        packing = "best_fit" if packed else "concatenate"
        for name, options in (
            ("", {}),
            (", no prefetch", {"prefetch": 0}),
            (", windows of 4 shards", {"shuffle_shards": 4}),
        ):
            contestants[packing + name] = lambda artifact=artifact, options=options: batches(
                artifact, seq_len, **options
            )
        if not packed:
            contestants[BY_HAND] = lambda artifact=artifact: by_hand(artifact, seq_len)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    count = SET_BYTES // 2 // BATCH_TOKENS // 2
    for turn in range(rounds + 1):
        for name, make in contestants.items():
            source = make()
            next(iter(source))
            found = rate(iter(source), count)
            if turn:  # the first warms the cache
                rates[name].append(found)
            if isinstance(source, ShardLoader):
                source.close()
    for name, found in rates.items():
        bar = RATE if seq_len == SEQ_LENS[0] and name != BY_HAND else 0.0
        claim = f"{seq_len} tokens, {name}" + (f": >= {bar / 1e6:.0f} M tokens/s" if bar else "")
        figure = f"{median(found) / 1e6:.0f} M tokens/s ({min(found) / 1e6:.0f}-{max(found) / 1e6:.0f})"
        claims.check(claim, figure, median(found) >= bar)


def measure_openings(folder: Path, claims: Claims) -> None:
    seq_len = SEQ_LENS[0]
    artifact = sparse_set(folder, seq_len)
    size = sum(entry.size for entry in artifact.manifest().files)
    generator = np.random.default_rng(0)
    for name, options in (("all shards mixed", {}), ("windows of 8 shards", {"shuffle_shards": 8})):
        seconds = []
        for step in (0, *generator.integers(10**7, size=8).tolist()):
            began = time.perf_counter()
            with batches(artifact, seq_len, **options) as loader:
                if step:
                    loader.load_state_dict({"samples_consumed": 4 * BATCH_TOKENS // seq_len * step})
                next(loader)
                seconds.append(time.perf_counter() - began)
        what = f"of {size / 1e9:.1f} GB in {SPARSE_SHARDS} shards, {name}: < {SECONDS:.0f} s"
        claims.check(f"first batch {what}", f"{seconds[0] * 1000:.0f} ms", seconds[0] < SECONDS)
        worst = max(seconds[1:])
        claims.check(f"resumed at any step {what}", f"{worst * 1000:.0f} ms at worst", worst < SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    claims = Claims()
    with tempfile.TemporaryDirectory(prefix="caravan-loader-") as scratch:
        measure_openings(Path(scratch) / "sparse", claims)
        for seq_len in SEQ_LENS:
            measure_rates(Path(scratch), seq_len, rounds, claims)
    sys.exit(bool(claims.failed))


if __name__ == "__main__":
    main()
