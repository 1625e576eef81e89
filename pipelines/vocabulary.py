"""The tokenizer stage: a byte-level tokenizer of the wanted kind, learned from the training split.

The artifact is a tokenizer directory (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`), as
`llama.tokenizer.Tokenizer` and `transformers` read it. Training is deterministic: the same documents give the same
bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from cluster.storage import JSON, Artifact
from llama.tokenizer import Tokenizer
from llama.tokenizer_training import train_tokenizer
from pipelines.graph import Stage, StageContext
from pipelines.ingest import list_parts, read_parts
from pipelines.sources import DataError

if TYPE_CHECKING:
    from pipelines.recipe import TokenizerConfig


def tokenizer_stage(config: TokenizerConfig) -> Stage:
    """The stage `tokenizer`, downstream of `ingest`."""
    return Stage("tokenizer", 1, config, partial(_train, config), upstream=("ingest",))


def _train(config: TokenizerConfig, context: StageContext) -> dict[str, JSON]:
    documents = context.inputs["ingest"]
    context.emit(f"learning {config.vocab_size} tokens ({config.kind})")
    read = [0]
    texts = _counted(_sample(documents, config.sample_bytes), read)
    tokenizer = train_tokenizer(texts, config.vocab_size, config.kind)
    if tokenizer.vocab_size < config.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size={config.vocab_size}, but the training split yields only {tokenizer.vocab_size} "
            f"tokens; add text, or set tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for path in sorted(Path(folder).iterdir()):
            context.record(context.attempt.store.upload(path, path.name))
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "trained_on_bytes": read[0],
    }


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give equal ids."""
    return xxhash.xxh3_128_hexdigest(tokenizer.backend.to_str().encode())


def load_tokenizer(artifact: Artifact) -> Tokenizer:
    """The tokenizer of a committed `tokenizer` artifact, wherever it is stored."""
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(artifact.fetch(folder))


def _sample(documents: Artifact, sample_bytes: int) -> Iterator[str]:
    """Training texts, in order: all of them, or of a larger corpus those whose id falls into the sampled fraction.

    By id, so that every source is sampled alike; the lower half of it, since the upper half decides the split."""
    parts = list_parts(documents, "train")
    fraction = sample_bytes / sum(part.bytes for part in parts)
    for document_id, text in read_parts(documents, [part.path for part in parts]):
        if int(document_id[16:], 16) / 2**64 < fraction:
            yield text


def _counted(texts: Iterable[str], total: list[int]) -> Iterator[str]:
    for text in texts:
        total[0] += len(text.encode())
        yield text
