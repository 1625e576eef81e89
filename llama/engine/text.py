"""Text from a growing list of tokens: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes bytes to that form no character (yet)."""


class TextTokenizer(Protocol):
    """What the engine needs of a tokenizer; `llama.tokenizer.Tokenizer` has it."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class BytesTokenizer(TextTokenizer, Protocol):
    """What a constrained output needs besides: which bytes each token adds to the text."""

    @property
    def token_bytes(self) -> Sequence[bytes | None]:
        """By token id; None for control tokens and unused ids, which no text is made of."""
        ...


class IncrementalDecoder:
    """Decodes token by token; the pieces joined are `decode` of all tokens.

    Each call decodes the new tokens behind some earlier ones, because the first token of a text may lose its space, and
    hands out what lies behind the earlier ones' text. Replacement characters at the end are held back: they may be the
    beginning of a character, one of them for all its bytes or one for each, as decoders differ. After `PATIENCE`
    tokens they are no beginning, and only the last can still turn into something else.

    A byte-fallback decoder makes replacement characters of a whole run of bytes once one of them is wrong. Text that
    was handed out stays as it is then, and the wrong bytes are decoded by themselves.
    """

    PATIENCE = 8
    """More than the four bytes of a character, since tokens without text may lie between them."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._prefix = tokenizer.decode([])
        """Text of `_context`."""
        self._pending: list[int] = []
        self._emitted = 0
        """Characters handed out of `_pending`'s text."""

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self._pending.append(token_id)
        text = self._pending_text()
        if not text and token_id in self._pending[:-1]:
            self._pending.pop()  # a special token, again: nothing to come depends on it
        held = len(text) - len(text.rstrip(REPLACEMENT))
        if held and len(self._pending) >= self.PATIENCE:
            held = 1
        new = text[self._emitted : len(text) - held]
        self._emitted += len(new)
        if text and not held:
            self._context, self._pending, self._emitted = self._pending, [], 0
            self._prefix = self._tokenizer.decode(self._context)
        return new

    def finish(self) -> str:
        """What was held back: the replacement characters of an unfinished one, as `decode` gives them."""
        return self._pending_text()[self._emitted :]

    def _pending_text(self) -> str:
        text = self._tokenizer.decode(self._context + self._pending)
        if text.startswith(self._prefix):
            return text[len(self._prefix) :]
        return self._tokenizer.decode(self._pending)


class StopMatcher:
    """Holds back text that may be the beginning of a stop string.

    The result does not depend on how the text is cut into pieces: the stop string whose end comes first wins, among
    those the one that begins first.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, bool]:
        """Returns the text to hand out and whether a stop string was completed; it ends before that string then.

        One that is completed by a piece with `armed=False` does not count, though it may begin in one.
        """
        known = len(self._held)
        text = self._held + text
        # What ended in an earlier piece did not count.
        starts = [(text.find(stop, max(0, known + 1 - len(stop))), stop) for stop in self._stop if armed]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        hold = max((self._overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


class OutputText:
    """The text of one request's generated tokens."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str]) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._matcher = StopMatcher(stop)

    def push(self, token_id: int, armed: bool = True) -> tuple[str, bool]:
        """Returns the new text and whether a stop string ends it; none does unless `armed`."""
        return self._matcher.push(self._decoder.push(token_id), armed)

    def finish(self, armed: bool = True) -> tuple[str, bool]:
        """The rest of the text when generation ends for another reason; it may complete a stop string too."""
        text, stopped = self._matcher.push(self._decoder.finish(), armed)
        return (text, True) if stopped else (text + self._matcher.finish(), False)
