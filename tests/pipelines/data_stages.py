"""A small corpus and the four data stages over it, for the tests that need shards."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines.data_config import DataConfig, SourceConfig
from pipelines.dedup import dedup_stage
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.ingest import ingest_stage
from pipelines.recipe import TokenizerConfig
from pipelines.runs import Run
from pipelines.shards import ShardConfig, shards_stage
from pipelines.vocabulary import tokenizer_stage

SEQ_LEN = 64
PART_BYTES = 1 << 16
_WORDS = [
    "def",
    "return",
    "self",
    "naïve",
    "模型",
    "🙂",
    "<|bos|>",
    "<|eos|>",
    "0x7f",
    "(",
    ")",
    ":",
    "=",
    "\t",
    "\r\n",
    "\n\n",
]


def write_corpus(folder: Path, documents: int = 120, seed: int = 0) -> list[str]:
    """Files of random text, every tenth a copy of an earlier one, and two that are no text; the texts, normalised."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    texts: list[str] = []
    for number in range(documents):
        if number % 10 == 9:
            text = generator.choice(texts)
        else:
            text = f"document {number}\n" + " ".join(generator.choices(_WORDS, k=generator.randint(20, 700)))
        texts.append(text)
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    (folder / "latin1.txt").write_bytes("café".encode("latin-1") * 20)
    (folder / "binary.txt").write_bytes(b"text with a \0 in it, long enough not to be dropped")
    (folder / "short.txt").write_bytes(b"short")
    return [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]


def data_config(folder: Path, **changes: Any) -> DataConfig:
    values = {"sources": (SourceConfig(uri=str(folder)),), "validation_fraction": 0.15, "part_bytes": PART_BYTES}
    return DataConfig(**(values | changes))


def data_graph(
    config: DataConfig, vocab_size: int = 350, seq_len: int = SEQ_LEN, tokenizer: TokenizerConfig | None = None
) -> Graph:
    return Graph(
        [
            ingest_stage(config),
            dedup_stage(config),
            tokenizer_stage(tokenizer or TokenizerConfig(vocab_size=vocab_size)),
            shards_stage(ShardConfig.of(config, seq_len)),
        ]
    )


@contextmanager
def in_this_process(backwards: bool = False) -> Iterator[None]:
    """The stages' tasks one after the other in this process, perhaps in the opposite order, in place of a cluster."""

    def run_here(function: Callable[[Any], Any], items: Sequence[Any], on_result: Any = lambda finished: None) -> list:
        order = list(range(len(items)))[:: -1 if backwards else 1]
        results = {}
        for index in order:
            results[index] = function(items[index])
            on_result(len(results))
        return [results[index] for index in range(len(items))]

    with patch("pipelines.parts.map_on_cluster", run_here):
        yield


def run_stages(graph: Graph, store: Store) -> dict[str, Artifact]:
    """The stages' committed artifacts by name."""
    results = drive(graph, store, Run.create(store, "name: test\n"))
    return {name: result.artifact for name, result in results.items() if result.artifact is not None}


def checksums(artifact: Artifact) -> dict[str, str]:
    manifest = artifact.manifest()
    assert manifest is not None
    return {file.path: file.checksum for file in manifest.files}
