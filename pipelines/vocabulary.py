"""The tokenizer stage: a byte-level tokenizer learned from the training split, or one from outside.

The artifact is a tokenizer directory (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, and
`generation_config.json` where several tokens end a generation), as `llama.tokenizer.Tokenizer` and `transformers` read
it. Training is deterministic: the same documents give the same bytes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from cluster.artifact import Artifact
from cluster.storage import JSON, Store
from llama.tokenizer import GENERATION_CONFIG_FILE, Tokenizer, stretches
from llama.tokenizer_training import train_tokenizer
from pipelines.adopted_tokenizer import AdoptedTokenizer, adopt_tokenizer, what_is_lost
from pipelines.conversations import chat_contents
from pipelines.documents import KeptPart, kept_parts, read_part
from pipelines.sources import DataError
from pipelines.stage import Stage, StageContext

if TYPE_CHECKING:
    from pipelines.recipe import TokenizerConfig

_VERSION = 2
_READ_TIMES = 4  # the text that is read to choose a sample from, relative to the sample
_MEASURED_BYTES = 1 << 20
_UPSTREAM = ("ingest", "dedup")


def tokenizer_stage(config: TokenizerConfig) -> Stage:
    """The stage `tokenizer`, downstream of `ingest` and `dedup`. One from outside is read now, and its files' content
    is part of the stage's key: DataError if it cannot be used."""
    if config.path is None:
        return Stage("tokenizer", _VERSION, config, partial(_train, config), _UPSTREAM)
    adopted = adopt_tokenizer(config.path, config.eos_token)
    found = adopted.tokenizer.vocab_size
    if config.vocab_size < found:
        raise DataError(
            f"tokenizer.vocab_size={config.vocab_size} is less than the {found} tokens of "
            f"tokenizer.path={config.path}; leave it out, or set at least {found}"
        )
    key = {"files": adopted.fingerprint, "eos_token": config.eos_token}
    return Stage("tokenizer", _VERSION, key, partial(_adopt, adopted), _UPSTREAM)


def _train(config: TokenizerConfig, context: StageContext) -> dict[str, JSON]:
    assert config.kind is not None and config.sample_bytes is not None  # as TokenizerConfig fills them in
    documents, parts = context.inputs["ingest"].files, _text_parts(context)
    if not parts:
        raise DataError("no training text is left of data.sources to learn a tokenizer from; add text")
    context.emit(f"learning {config.vocab_size} tokens ({config.kind})")
    read = [0]
    texts = _counted(_sample(documents, parts, config.sample_bytes), read)
    tokenizer = train_tokenizer(texts, config.vocab_size, config.kind)
    if not read[0]:
        raise DataError(
            f"tokenizer.sample_bytes={config.sample_bytes} is less than single documents have, and none was chosen; "
            "raise it"
        )
    if tokenizer.vocab_size < config.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size={config.vocab_size}, but the training split yields only {tokenizer.vocab_size} "
            f"tokens; add text, or set tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return _write(context, tokenizer, trained_on_bytes=read[0])


def _adopt(adopted: AdoptedTokenizer, context: StageContext) -> dict[str, JSON]:
    if lost := what_is_lost(adopted.tokenizer):
        context.emit(f"warning: the tokenizer does not bring these back as they were written: {', '.join(lost)}")
    return _write(context, adopted.tokenizer, trained_on_bytes=0)


def _write(context: StageContext, tokenizer: Tokenizer, trained_on_bytes: int) -> dict[str, JSON]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        if len(tokenizer.eos_ids) > 1:
            ends = {"eos_token_id": sorted(tokenizer.eos_ids)}
            Path(folder, GENERATION_CONFIG_FILE).write_text(json.dumps(ends) + "\n", "utf-8")
        for path in sorted(Path(folder).iterdir()):
            context.record(context.attempt.store.upload(path, path.name))
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "trained_on_bytes": trained_on_bytes,
        "bytes_per_token": _bytes_per_token(tokenizer, context.inputs["ingest"].files, _text_parts(context)),
    }


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that make the same ids of texts and of conversations."""
    content = [
        tokenizer.backend.to_str(),
        [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, sorted(tokenizer.eos_ids)],
        tokenizer.chat_template,
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


def load_tokenizer(artifact: Artifact) -> Tokenizer:
    """The tokenizer of a committed `tokenizer` artifact, wherever it is stored."""
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(artifact.fetch(folder))


def _text_parts(context: StageContext) -> list[KeptPart]:
    """What of the training split shards are made of; preferences are not."""
    parts = kept_parts(context.inputs["ingest"], context.inputs["dedup"], "train")
    return [part for part in parts if part.kind != "preference"]


def _texts(documents: Store, part: KeptPart) -> Iterator[tuple[str, str]]:
    """Id and text of each document; of a conversation what is said in it."""
    for document in read_part(documents, part):
        yield document.id, chat_contents(document.text) if part.kind == "chat" else document.text


def _sample(documents: Store, parts: Sequence[KeptPart], sample_bytes: int) -> Iterator[str]:
    """Training texts, in order: all of them, or of a larger corpus about `sample_bytes`.

    Every source is sampled in proportion to its text: of some part files, evenly over the source, the `stretches` of
    the documents whose hash falls into a fraction. Part files are read for a few times `sample_bytes`, and at least
    one of each source, however large the corpus is."""
    of_source: dict[int, list[KeptPart]] = {}
    for part in parts:
        of_source.setdefault(part.source, []).append(part)
    total = sum(_bytes(each) * _said(documents, each[0]) for each in of_source.values())
    for each in of_source.values():
        read = _spread(each, _READ_TIMES * sample_bytes / total)
        fraction = sample_bytes / total * (_bytes(each) / _bytes(read))
        for part in read:
            for document_id, text in _texts(documents, part):
                for number, stretch in enumerate(stretches(text)):
                    if xxhash.xxh3_64_intdigest(f"{document_id}/{number}".encode()) / 2**64 < fraction:
                        yield stretch


def _spread(parts: Sequence[KeptPart], fraction: float) -> list[KeptPart]:
    """At least that fraction of a source's parts, as evenly over its text as whole parts allow."""
    count = math.ceil(min(fraction, 1) * len(parts))
    if count == len(parts):
        return list(parts)
    ends = np.cumsum([part.bytes for part in parts])
    middles = (np.arange(count) + 0.5) / count * ends[-1]
    return [parts[index] for index in np.unique(np.searchsorted(ends, middles, side="right")).tolist()]


def _said(documents: Store, part: KeptPart) -> float:
    """Text in a byte of a part; conversations lie in it as JSON."""
    if part.kind == "text":
        return 1.0
    return sum(len(text.encode()) for _, text in _texts(documents, part)) / part.bytes


def _bytes(parts: Iterable[KeptPart]) -> int:
    return sum(part.bytes for part in parts)


def _counted(texts: Iterable[str], total: list[int]) -> Iterator[str]:
    for text in texts:
        total[0] += len(text.encode())
        yield text


def _bytes_per_token(tokenizer: Tokenizer, documents: Store, parts: Sequence[KeptPart]) -> float:
    """Measured on the first training texts of every source, about a megabyte; 1 if there are none."""
    first = {part.source: part for part in reversed(parts)}
    texts = []
    for source in sorted(first):
        left = _MEASURED_BYTES // len(first)
        for _, text in _texts(documents, first[source]):
            texts.append(text[:left])
            left -= len(texts[-1].encode())
            if left <= 0:
                break
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return round(sum(len(text.encode()) for text in texts) / tokens, 4) if tokens else 1.0
