"""What a caller asks of the engine, what it gets back, and the state of a request in between."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from llama.engine.blocks import BlockTable

FinishReason = Literal["stop", "length", "abort"]


class PromptTooLong(ValueError):
    """The prompt leaves no room for a single generated token, in the model's context or in the cache."""


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

    def __post_init__(self) -> None:
        self._check_int("max_tokens", 1)
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


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities, before temperature and filters."""

    token_id: int
    logprob: float
    top: dict[int, float]
    """The likeliest tokens, most likely first; as many as `SamplingParams.logprobs`."""


@dataclass
class Completion:
    """A finished request."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    """Generated tokens, the one that ended it included."""
    text: str
    """Their text up to the stop string or stop token; "" without a tokenizer."""
    finish_reason: FinishReason
    num_cached_tokens: int
    """Prompt tokens whose keys and values were in the cache when the request was first admitted."""
    logprobs: list[TokenLogprob] | None


@dataclass
class Chunk:
    """What one step added to one request. The last chunk of a request has a `finish_reason`."""

    request_id: str
    token_ids: list[int]
    text: str
    """Never half a character, never part of a stop string; so it may lag behind `token_ids`."""
    finish_reason: FinishReason | None
    num_cached_tokens: int
    prompt_tokens: int
    completion_tokens: int
    """Generated so far."""
    logprobs: list[TokenLogprob] | None
    """Of `token_ids`; None when not asked for."""
    event_seq: int
    """Sequence number of the last block event when the step ended: those up to it cover all this request computed."""


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """The state of a request inside the engine; the scheduler moves it through its `status`."""

    request_id: str
    params: SamplingParams
    token_ids: list[int]
    """Prompt, then generated tokens."""
    table: BlockTable
    max_total_tokens: int
    """Prompt and generated tokens end here at the latest."""
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0
    """Leading tokens whose keys and values are in the cache."""
    num_cached_tokens: int | None = None
    """Set at the first admission, and kept when the request is preempted."""
    status: Status = Status.WAITING
    random: random.Random = field(init=False)
    """One draw per sampled token: the samples depend on the seed and on nothing else in the batch."""
    _draw: tuple[int, float] = (0, 0.0)
    """Where the last draw samples a token, and the draw."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        seed = self.params.seed
        # Of a negative integer `random.Random` takes the absolute value: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
        self.random = random.Random(None if seed is None else 2 * seed if seed >= 0 else -2 * seed - 1)

    def uniform(self) -> float:
        """The number in [0, 1) that samples the next token; the same again if a step has to be done again."""
        position, number = self._draw
        if position != len(self.token_ids):
            number = self.random.random()
            self._draw = (len(self.token_ids), number)
        return number

    @property
    def num_missing(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def decoding(self) -> bool:
        """Only the newest token is missing."""
        return self.num_missing == 1 and self.num_computed > 0
