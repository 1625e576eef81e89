"""What a model must beat: compressors that know little, on the same held-out bytes.

A token's bytes are known, so bits per byte can be stated for any set of target tokens: the summed bits over the summed
bytes. Special tokens stand for no text and count no bytes; a model pays for predicting them all the same. Where a mask
says what is to be learned, only that counts, for the baselines as for the model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np
import zstandard
from tokenizers import pre_tokenizers

from llama.tokenizer import Tokenizer
from pipelines.documents import Split
from pipelines.shard_set import ShardSet
from pipelines.sources import DataError

ZSTD_LEVEL = 19
_ROWS = 256  # read at a time


@dataclass(frozen=True)
class Baselines:
    """Of the held-out targets: how many tokens and bytes they are, and bits per byte of each baseline."""

    tokens: int
    bytes: int
    unigram_bits_per_byte: float
    zstd_bits_per_byte: float


def measure_baselines(shards: ShardSet, tokenizer: Tokenizer, max_rows: int | None = None) -> Baselines:
    """Both baselines on the validation split, or `max_rows` of its rows. Raises DataError if they hold no text."""
    targets = held_out_targets(shards, max_rows)
    pieces = token_bytes(tokenizer)
    text = b"".join(pieces[target] for target in targets.tolist())
    if not text:
        raise DataError("the validation split has no text to predict; raise data.validation_fraction or add text")
    return Baselines(
        len(targets),
        len(text),
        unigram_bits(count_tokens(shards, "train"), targets) / len(text),
        zstd_bits(text) / len(text),
    )


def held_out_targets(shards: ShardSet, max_rows: int | None = None) -> np.ndarray:
    """Ids of the validation split's targets in order: the labels of `held_out_batches` that count."""
    found = [rows.targets() for rows in shards.in_order("validation", _ROWS, max_rows=max_rows)]
    return np.concatenate(found or [np.empty(0, np.int64)])


def count_tokens(shards: ShardSet, split: Split) -> np.ndarray:
    """How often each id is a target in the split: int64 `[vocab_size]`."""
    counts = np.zeros(shards.vocab_size, np.int64)
    for rows in shards.in_order(split, _ROWS):
        counts += np.bincount(rows.targets(), minlength=shards.vocab_size)
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
    """The bytes of text that each id stands for; none for special tokens.

    Exact for byte-level tokenizers. SentencePiece's "▁" is a space, the one it puts before a text's first word too.
    """
    backend = tokenizer.backend
    spell = _byte_level if '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"]) else _sentence_piece
    pieces = [spell(backend.id_to_token(token_id) or "") for token_id in range(tokenizer.vocab_size)]
    for token_id, token in backend.get_added_tokens_decoder().items():  # they are spelt as they are written
        pieces[token_id] = b"" if token.special else token.content.encode()
    for token_id in tokenizer.eos_ids | {tokenizer.bos_id, tokenizer.pad_id}:
        pieces[token_id] = b""
    return pieces


def _byte_level(token: str) -> bytes:
    return b"".join(_BYTE_OF.get(character) or character.encode() for character in token)


def _sentence_piece(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, bytes]:
    """Which byte each character of byte-level BPE's alphabet stands for (GPT-2, Radford et al. 2019).

    Bytes that are printable in Latin-1 stand for themselves; the others follow in order as characters from 256 on.
    """
    printable = [ord(character) for character in pre_tokenizers.ByteLevel.alphabet() if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in printable]
    standing = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    return {character: bytes([byte]) for character, byte in standing.items()}


_BYTE_OF = _byte_alphabet()
