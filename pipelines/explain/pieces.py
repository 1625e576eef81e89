"""Tokens as labels of a picture."""

from __future__ import annotations

from llama.tokenizer import Tokenizer
from llama.tokenizer_training import SMALLEST_VOCABULARY, train_tokenizer
from pipelines.explain.registry import ExplainError

_MARKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def label(piece: bytes) -> str:
    """A token's bytes as text, white space as signs; in hexadecimal if they are no characters."""
    try:
        text = piece.decode().translate(_MARKS)
    except UnicodeDecodeError:
        return f"‹{piece.hex()}›"
    return text if text.isprintable() else f"‹{piece.hex()}›"


def labels(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Raises ExplainError if the tokenizer's tokens are no bytes."""
    try:
        table = tokenizer.token_bytes
    except ValueError as error:
        raise ExplainError(str(error)) from error
    return [label(table[token_id] or b"") for token_id in ids]


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Raises ExplainError for text without a token, or with half of a surrogate pair."""
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise ExplainError(f"--text: {error}") from error
    if not ids:
        raise ExplainError(f"--text={text!r} has no tokens; give it a few words")
    return ids


def learned_from(text: str, merges: int) -> Tokenizer:
    """BPE of at most so many merges, learned from the text itself. Raises ExplainError as `encoded` does."""
    try:
        return train_tokenizer([text], SMALLEST_VOCABULARY + merges)
    except UnicodeEncodeError as error:
        raise ExplainError(f"--text has half of a surrogate pair at {error.start}, no character; remove it") from error
