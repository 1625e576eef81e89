"""Shard files written from the description of their format alone, for tests of what reads them."""

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from cluster.artifact import Artifact
from cluster.storage import FileEntry, Store

PAD = 0
VOCAB_SIZE = 1000


class FarStore(Store):
    """A folder that is treated as if it were remote; each download takes a while."""

    seconds = 0.0

    def local_path(self, path: str = "") -> Path | None:
        return None

    def child(self, *parts: str) -> "FarStore":
        child = FarStore(super().child(*parts).uri)
        child.seconds = self.seconds
        return child

    def download(self, path: str, local_path: str | os.PathLike[str]) -> FileEntry:
        time.sleep(self.seconds)
        return super().download(path, local_path)


def used(folder: Path) -> int:
    """Bytes in the folder; what is renamed meanwhile is counted at most once."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def far(artifact: Artifact, seconds: float = 0.0) -> Artifact:
    """The same artifact in a remote store."""
    store = FarStore(artifact.store.uri)
    store.seconds = seconds
    return Artifact(store)


@dataclass
class Row:
    """A row before it is padded: its tokens, where pieces begin, of which documents they are, what is to be learned."""

    tokens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)

    def targets(self, packing: str, masked: bool) -> list[int]:
        """Places of the targets that count."""
        return [
            place
            for place in range(1, len(self.tokens))
            if not (packing == "best_fit" and place in self.starts) and (self.mask[place] or not masked)
        ]


def concatenated(documents: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], seq_len: int) -> list[Row]:
    stream = [
        (token, place == 0, number, learn)
        for number, (tokens, mask) in enumerate(zip(documents, masks, strict=True))
        for place, (token, learn) in enumerate(zip(tokens, mask, strict=True))
    ]
    rows = []
    for begin in range(0, len(stream) - 1, seq_len):
        part = stream[begin : begin + seq_len + 1]
        starts = [place for place, (_, first, *_) in enumerate(part) if first or place == 0]
        rows.append(Row([each[0] for each in part], starts, [part[at][2] for at in starts], [each[3] for each in part]))
    return rows


def packed(documents: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], seq_len: int) -> list[Row]:
    """Each piece into the first row that has room."""
    rows: list[Row] = []
    for number, (tokens, mask) in enumerate(zip(documents, masks, strict=True)):
        for begin in range(0, len(tokens) - 1, seq_len):
            piece = tokens[begin : begin + seq_len + 1]
            fitting = [row for row in rows if len(row.tokens) + len(piece) <= seq_len + 1]
            row = fitting[0] if fitting else Row()
            if not fitting:
                rows.append(row)
            row.starts.append(len(row.tokens))
            row.numbers.append(number)
            row.tokens += piece
            row.mask += mask[begin : begin + seq_len + 1]
    return rows


def to_arrow(rows: Sequence[Row], seq_len: int, masked: bool) -> bytes:
    width = seq_len + 1
    columns = {
        "tokens": pa.array(
            [row.tokens + [PAD] * (width - len(row.tokens)) for row in rows], pa.list_(pa.uint16(), width)
        ),
        "documents": pa.array([row.starts for row in rows], pa.list_(pa.int32())),
        "numbers": pa.array([row.numbers for row in rows], pa.list_(pa.int32())),
        "length": pa.array([len(row.tokens) for row in rows], pa.int32()),
    }
    if masked:
        masks = [row.mask + [0] * (width - len(row.mask)) for row in rows]
        columns["loss_mask"] = pa.array(masks, pa.list_(pa.uint8(), width))
    batch = pa.record_batch(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def write_shards(
    store: Store,
    splits: dict[str, list[list[Row]]],
    seq_len: int,
    packing: str = "concatenate",
    masked: bool = False,
    vocab_size: int = VOCAB_SIZE,
) -> Artifact:
    """Commits shards of these rows, by split."""
    artifact, metadata, entries = Artifact(store), {}, []
    attempt = artifact.begin()
    for split, shards in splits.items():
        listed = []
        for index, rows in enumerate(shards):
            path = f"{split}/shard-{index:05d}.arrow"
            entries.append(attempt.store.write_bytes(path, to_arrow(rows, seq_len, masked)))
            full = [row for row in rows if len(row.tokens) == seq_len + 1]
            listed.append(
                {
                    "path": path,
                    "source": 0,
                    "rows": len(rows),
                    "samples": len(full) if packing == "concatenate" else len(rows),
                    "tokens": sum(len(row.tokens) for row in rows),
                    "targets": sum(len(row.targets(packing, masked)) for row in rows),
                    "documents": len({number for row in rows for number in row.numbers}),
                    "bytes": sum(len(row.tokens) for row in rows),
                }
            )
        metadata[split] = {"shards": listed}
    attempt.commit(
        {
            "seq_len": seq_len,
            "vocab_size": vocab_size,
            "bos_id": 1,
            "pad_id": PAD,
            "tokenizer": "none",
            "packing": packing,
            "masked": masked,
            "splits": metadata,
        },
        entries,
    )
    return artifact


def random_shards(
    store: Store,
    train: int = 5,
    validation: int = 2,
    *,
    seq_len: int = 16,
    documents: int = 12,
    longest: int = 60,
    packing: str = "concatenate",
    masked: bool = False,
    seed: int = 0,
) -> tuple[Artifact, dict[str, list[list[Row]]]]:
    """Shards of a random number of documents of random length, and their rows."""
    generator = random.Random(seed)
    lay_out = concatenated if packing == "concatenate" else packed
    splits: dict[str, list[list[Row]]] = {}
    for split, count in (("train", train), ("validation", validation)):
        splits[split] = []
        for _ in range(count):
            texts = [
                [generator.randrange(2, VOCAB_SIZE) for _ in range(generator.randint(2, longest))]
                for _ in range(generator.randint(1, documents))
            ]
            masks = [[int(generator.random() < 0.6) for _ in text] for text in texts]
            splits[split].append(lay_out(texts, masks, seq_len))
    return write_shards(store, splits, seq_len, packing, masked), splits
