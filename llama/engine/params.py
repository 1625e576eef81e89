"""How a caller wants its tokens chosen, and which of these wishes a model and its tokenizer can fulfil."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llama.engine.text import TextTokenizer

ConstraintKind = Literal["json_schema", "regex", "grammar"]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name}={reprlib.repr(value)} {remedy}")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    What is done to the logits, and in which order, is told in `llama/sampling.py`.

    At most one of `json_schema`, `regex` and `grammar` constrains the output: every token keeps it a beginning of a
    text that the constraint describes, and it ends, with `finish_reason` "stop", only as a whole one: at an end-of-text
    token, or without one as soon as nothing else may follow. Where `max_tokens`, the context or a stop string cuts it
    ("length", "stop") it need not parse, nor does it when the vocabulary holds no token to go on with or the grammar
    becomes too complex there ("length", and the log says why).

    Raises:
        ValueError: a field is out of range; names it, its value and the remedy.
    """

    max_tokens: int = 16
    """Tokens to generate at most; the context may end it earlier."""
    min_tokens: int = 0
    """Until so many are generated, end-of-text and `stop_token_ids` are not chosen and stop strings do not count. A
    constraint that is complete or has nothing else to offer prevails."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling (Holtzman et al., arXiv:1904.09751, §3.1); 1 turns it off."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 turns it off."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest (arXiv:2407.01082, §3); 0 turns it off."""
    repetition_penalty: float = 1.0
    """Of tokens in the prompt or the output (CTRL, arXiv:1909.05858, §4.1, as transformers does); 1 turns it off."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens in the output, as OpenAI's API defines it; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit once for each time that it is in the output, as OpenAI's API defines it; in [-2, 2]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these token ids, as OpenAI's API defines it; in [-100, 100]."""
    seed: int | None = None
    """Makes the samples reproducible, whatever else is in the batch; None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it. The one completed first wins."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end generation, beside the tokenizer's end-of-text; part of `token_ids`, not of the text."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report each token's log-probability, and those of this many likeliest ones; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, as vLLM does: None for the first, which nothing predicts."""
    n: int = 1
    """Completions of the prompt, which is computed once. The first is what `seed` gives alone, the others differ."""
    json_schema: str | Mapping[str, Any] | None = None
    """The output is JSON on one line, valid under this schema (Draft 2020-12, as far as llguidance supports it;
    properties come in the schema's order). An object or its text, and kept as text."""
    regex: str | None = None
    """The whole output matches this expression (syntax of Rust's regex crate, without look-around)."""
    grammar: str | None = None
    """The output is derived from `start` of this Lark grammar, as llguidance reads it."""

    def __post_init__(self) -> None:
        self._check_int("max_tokens", 1)
        self._check_int("n", 1)
        self._check_int("min_tokens", 0)
        enough = self.min_tokens <= self.max_tokens
        _check(enough, "min_tokens", self.min_tokens, f"exceeds max_tokens={self.max_tokens}; lower it")
        self._check_int("top_k", 0)
        self._check_int("seed", None, optional=True)
        self._check_int("logprobs", 0, optional=True)
        self._check_int("prompt_logprobs", 0, optional=True)
        self._check_range("temperature", 0, math.inf, "use 0 for greedy")
        self._check_range("top_p", 0, 1, "use 1 to turn it off")
        _check(self.top_p > 0, "top_p", self.top_p, "is not in (0, 1]; use 1 to turn it off")
        self._check_range("min_p", 0, 1, "use 0 to turn it off")
        # No model needs more, and no logit becomes infinite.
        self._check_range("repetition_penalty", 1e-3, 1e3, "use 1 to turn it off")
        self._check_range("presence_penalty", -2, 2, "use 0 to turn it off")
        self._check_range("frequency_penalty", -2, 2, "use 0 to turn it off")
        _check(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "is not True or False")
        self._normalise_bias()
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        strings = isinstance(stop, tuple | list) and all(isinstance(text, str) and text for text in stop)
        _check(strings, "stop", stop, "is not a tuple of non-empty strings")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids
        integers = isinstance(ids, tuple | list) and all(_is_int(token_id) and token_id >= 0 for token_id in ids)
        _check(integers, "stop_token_ids", ids, "is not a tuple of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        self._normalise_constraint()

    def _check_int(self, name: str, least: int | None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        kind = "an integer" if least is None else f"an integer ≥ {least}"
        _check(_is_int(value) and (least is None or value >= least), name, value, f"is not {kind}")

    def _check_range(self, name: str, least: float, most: float, remedy: str) -> None:
        value = getattr(self, name)
        _check(_is_finite(value), name, value, "is not a finite number")
        bounds = f"[{least:g}, {most:g}]" if math.isfinite(most) else f"[{least:g}, ∞)"
        _check(least <= value <= most, name, value, f"is not in {bounds}; {remedy}")

    def _normalise_bias(self) -> None:
        bias = self.logit_bias
        _check(isinstance(bias, Mapping), "logit_bias", bias, "is not a mapping of token ids to numbers")
        for token_id, value in bias.items():
            _check(_is_int(token_id) and token_id >= 0, "logit_bias", bias, f"has {token_id!r}, which is no token id")
            small = _is_finite(value) and -100 <= value <= 100
            _check(small, f"logit_bias[{token_id}]", value, "is not a number in [-100, 100]")
        object.__setattr__(self, "logit_bias", dict(bias))

    def _normalise_constraint(self) -> None:
        schema = self.json_schema
        if isinstance(schema, Mapping):
            try:
                object.__setattr__(self, "json_schema", json.dumps(schema, allow_nan=False, ensure_ascii=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"json_schema={reprlib.repr(schema)} is not JSON: {error}") from error
        schema = self.json_schema
        _check(schema is None or isinstance(schema, str), "json_schema", schema, "is neither an object nor its text")
        kinds = [kind for kind in ("json_schema", "regex", "grammar") if getattr(self, kind) is not None]
        _check(len(kinds) <= 1, " and ".join(kinds), "...", "exclude each other; give one")
        for kind in kinds:
            text = getattr(self, kind)
            _check(isinstance(text, str), kind, text, "is not text")
            # Its end is the text's end: there is nothing to generate after it.
            _check(not self.ignore_eos, "ignore_eos", True, f"contradicts {kind}; drop one of them")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def constraint(self) -> tuple[ConstraintKind, str] | None:
        """The field that constrains the output, and its text."""
        if isinstance(self.json_schema, str):
            return "json_schema", self.json_schema
        if self.regex is not None:
            return "regex", self.regex
        return None if self.grammar is None else ("grammar", self.grammar)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_params(params: SamplingParams, vocab_size: int, tokenizer: TextTokenizer | None) -> None:
    """Whether a model of `vocab_size` tokens with this tokenizer can obey; a constraint is checked by compiling it.

    Raises:
        ValueError: it cannot; names the field, its value and the remedy.
    """
    _check(not params.stop or tokenizer is not None, "stop", params.stop, "needs a tokenizer; use stop_token_ids")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        _check(count is None or count <= vocab_size, name, count, f"exceeds the vocabulary of {vocab_size} tokens")
    for name in ("logit_bias", "stop_token_ids"):
        for token_id in getattr(params, name):
            _check(token_id < vocab_size, name, token_id, f"is not a token id in [0, {vocab_size})")
