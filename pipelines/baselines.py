"""What a model must beat: compressors that know little, on the same held-out bytes.

A token's bytes are known exactly under a byte-level tokenizer, so bits per byte can be stated for any set of target
tokens: the summed bits over the summed bytes. Special tokens stand for no text and count no bytes; a model pays for
predicting them all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import zstandard
from tokenizers import pre_tokenizers

from llama.tokenizer import Tokenizer
from pipelines.ingest import Split
from pipelines.loader import ShardSet, held_out_rows

ZSTD_LEVEL = 19


@dataclass(frozen=True)
class Baselines:
    """Of the held-out targets: how many tokens and bytes they are, and bits per byte of each baseline."""

    tokens: int
    bytes: int
    unigram_bits_per_byte: float
    zstd_bits_per_byte: float


def measure_baselines(shards: ShardSet, tokenizer: Tokenizer, max_rows: int | None = None) -> Baselines:
    """Both baselines on the validation split, or its first `max_rows` rows."""
    targets = held_out_targets(shards, max_rows)
    pieces = token_bytes(tokenizer)
    text = b"".join(pieces[target] for target in targets.tolist())
    return Baselines(
        len(targets),
        len(text),
        unigram_bits(count_tokens(shards, "train"), targets) / len(text),
        zstd_bits(text) / len(text),
    )


def held_out_targets(shards: ShardSet, max_rows: int | None = None) -> np.ndarray:
    """Ids of the validation split's targets in order: what `held_out_batches` has as labels, padding left out."""
    return np.concatenate([row[1:] for row in held_out_rows(shards, "validation", max_rows)])


def count_tokens(shards: ShardSet, split: Split) -> np.ndarray:
    """How often each id is a target in the split: int64 `[vocab_size]`."""
    counts = np.zeros(shards.vocab_size, np.int64)
    for shard in shards.shards(split):
        targets = shards.rows(shard)[:, 1:].reshape(-1)[: shard.tokens - 1]
        counts += np.bincount(targets, minlength=shards.vocab_size)
    return counts


def unigram_bits(train_counts: np.ndarray, targets: np.ndarray) -> float:
    """Bits of `targets` under the training frequencies with one added to each count (Laplace)."""
    smoothed = train_counts + 1.0
    bits = np.log2(smoothed.sum()) - np.log2(smoothed)
    return float(bits[targets].sum())


def zstd_bits(data: bytes) -> int:
    """Bits of `data` as one zstd frame."""
    return 8 * len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data))


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id of a byte-level tokenizer stands for; none for special tokens."""
    byte_of = byte_alphabet()
    special = {token_id for token_id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    pieces = []
    for token_id in range(tokenizer.vocab_size):
        token = tokenizer.backend.id_to_token(token_id) or ""
        pieces.append(b"" if token_id in special else bytes(byte_of[character] for character in token))
    return pieces


def byte_alphabet() -> dict[str, int]:
    """Which byte each character of byte-level BPE's alphabet stands for (GPT-2, Radford et al. 2019).

    Bytes that are printable in Latin-1 stand for themselves; the others follow in order as characters from 256 on.
    """
    printable = [ord(character) for character in pre_tokenizers.ByteLevel.alphabet() if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
