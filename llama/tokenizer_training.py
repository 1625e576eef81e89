"""Learning a tokenizer from text: byte-level BPE, WordPiece or Unigram.

All three share one form. Text is cut into words by GPT-2's pattern (Radford et al. 2019, §2.2), each byte of a word
becomes one printable character, and the kinds differ in how they choose pieces of such words. Nothing is normalised,
every byte is a piece, and there is no unknown token: any text round-trips exactly, and a token's bytes can be read off
its name. The classical forms give that up, so two things differ from them:

- WordPiece marks no piece as a continuation ("##"): that a word begins is said by the space before it, which belongs to
  the word. Without the marks one set of 256 bytes serves every place, and "##" in a text stays what it is.
- Unigram works on the bytes of words, where SentencePiece works on the characters of sentences with "▁" for a space:
  that adds a space in front and cannot tell a "▁" of the text from a space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import chain
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from llama.tokenizer import SPECIAL_TOKENS, Tokenizer, stretches

TokenizerKind = Literal["bpe", "wordpiece", "unigram"]

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""The bytes and the special tokens, which every vocabulary has."""

_LONGEST_WORD = 100
"""Bytes of a word that WordPiece looks at together; its search is cubic in them. Longer words are cut."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: TokenizerKind = "bpe") -> Tokenizer:
    """Learn a tokenizer of at most `vocab_size` tokens, special tokens and the 256 bytes among them.

    The special tokens have the first ids. Deterministic: the same texts give the same tokenizer. It has fewer tokens
    where the texts have no more pieces to offer.

    bpe: merges the most frequent pair of neighbours, again and again (Sennrich et al., arXiv:1508.07909).
    wordpiece: as `tokenizers` has it, the pieces are found as BPE's are, and a word is cut into the longest pieces from
    its beginning on (Wu et al., arXiv:1609.08144, §4.1; Song et al., arXiv:2012.15524, §2).
    unigram: starts from all frequent substrings and drops those whose loss costs the least likelihood; a word is cut
    into its likeliest pieces (Kudo, arXiv:1804.10959, §3.2).

    Raises:
        ValueError: the vocabulary does not hold the bytes, the kind is unknown, or a text has half of a surrogate pair.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size} does not hold the 256 bytes and {len(SPECIAL_TOKENS)} special tokens; "
            f"use at least {SMALLEST_VOCABULARY}"
        )
    texts = chain.from_iterable(map(stretches, texts))  # which have the same words, in bounded memory
    if kind == "bpe":
        backend = _train_bpe(texts, vocab_size)
    elif kind == "wordpiece":
        backend = _train_wordpiece(texts, vocab_size)
    elif kind == "unigram":
        backend = _train_unigram(texts, vocab_size)
    else:
        raise ValueError(f"tokenizer.kind={kind!r} is not one of bpe, wordpiece, unigram")
    return Tokenizer(backend)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_names() -> list[str]:
    """The characters that stand for the 256 bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_byte_names(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return backend


def _train_wordpiece(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = _byte_level(models.WordPiece(max_input_chars_per_word=_LONGEST_WORD))
    cut = pre_tokenizers.Split(Regex(f".{{1,{_LONGEST_WORD}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, cut])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_byte_names(),
        continuing_subword_prefix="",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return backend


def _train_unigram(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    trained = _byte_level(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_byte_names(),
        unk_token=None,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer=trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"][len(SPECIAL_TOKENS) :]
    # Of no text the trainer knows no probabilities: NaN, null in JSON.
    pieces = [(piece, -math.log(len(pieces)) if score is None else score) for piece, score in pieces]
    vocab = [(token, 0.0) for token in SPECIAL_TOKENS]
    vocab += _settled(pieces, vocab_size - len(SPECIAL_TOKENS))
    backend = _byte_level(models.Unigram(vocab, None, False))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return backend


def _settled(pieces: list[tuple[str, float]], count: int) -> list[tuple[str, float]]:
    """The `count` best pieces, every byte among them, likeliest first, freed of what differs from one run to the next.

    The trainer sums the log-probabilities in an order that hashing draws anew, which changes their last digits: they
    are rounded. The bytes that it did not need have the lowest one plus 0.0001 for each before it, in an order of that
    kind too: they get the lowest. Which pieces it chooses has not been seen to differ.
    """
    lowest = min(score for _, score in pieces)
    spare = lowest + 256 * 1e-4
    settled = [(piece, round(lowest if len(piece) == 1 and score <= spare else score, 4)) for piece, score in pieces]
    settled.sort(key=lambda entry: (-entry[1], entry[0]))
    longer = [entry for entry in settled if len(entry[0]) > 1][: count - 256]
    kept = {piece for piece, _ in longer}
    return [entry for entry in settled if len(entry[0]) == 1 or entry[0] in kept]
