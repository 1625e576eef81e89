"""How a caller wants its tokens chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} {remedy}")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    The order is that of Hugging Face: temperature, then `top_k`, then `top_p` on what is left, renormalised.

    Raises:
        ValueError: a field is out of range; names it, its value and the remedy.
    """

    max_tokens: int = 16
    """Tokens to generate at most; the context may end it earlier."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling (Holtzman et al., arXiv:1904.09751, §3.1); 1 turns it off."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 turns it off."""
    seed: int | None = None
    """Makes the samples reproducible, whatever else is in the batch; None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it. The one completed first wins."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end generation, beside the tokenizer's end-of-text; part of `token_ids`, not of the text."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report each token's log-probability, and those of this many likeliest ones; None reports nothing."""
    n: int = 1
    """Completions of the prompt, which is computed once. The first is what `seed` gives alone, the others differ."""

    def __post_init__(self) -> None:
        self._check_int("max_tokens", 1)
        self._check_int("n", 1)
        self._check_int("top_k", 0)
        self._check_int("seed", None, optional=True)
        self._check_int("logprobs", 0, optional=True)
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _check(number and math.isfinite(value), name, value, "is not a finite number")
        _check(self.temperature >= 0, "temperature", self.temperature, "is negative; use 0 for greedy")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "is not in (0, 1]; use 1 to turn it off")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        strings = isinstance(stop, tuple | list) and all(isinstance(text, str) and text for text in stop)
        _check(strings, "stop", stop, "is not a tuple of non-empty strings")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids
        integers = isinstance(ids, tuple | list) and all(_is_int(token_id) and token_id >= 0 for token_id in ids)
        _check(integers, "stop_token_ids", ids, "is not a tuple of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    def _check_int(self, name: str, least: int | None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        kind = "an integer" if least is None else f"an integer ≥ {least}"
        _check(_is_int(value) and (least is None or value >= least), name, value, f"is not {kind}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
