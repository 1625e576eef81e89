"""What a caller asks of the engine, what it gets back, and the state of a request in between."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from llama.engine.blocks import BlockTable
from llama.engine.params import SamplingParams

if TYPE_CHECKING:
    from llama.engine.constraint import Constraint

FinishReason = Literal["stop", "length", "abort", "timeout"]


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
    index: int = 0
    """Which of the `SamplingParams.n` completions of its prompt it is."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One for each prompt token, None for the first; None when not asked for."""


@dataclass(frozen=True)
class RequestTiming:
    """How a request fared in the engine."""

    queue_s: float
    """Seconds from its arrival until a step first computed some of it; until its end when none did."""
    steps: int
    """Steps that computed some of it."""
    preemptions: int


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
    index: int = 0
    """Which of the `SamplingParams.n` completions this belongs to."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One for each prompt token, None for the first; in completion 0's first chunk with a token, when asked for."""
    timing: RequestTiming | None = None
    """In the last chunk."""


@dataclass(frozen=True)
class ComputedTokens:
    """What a step computed for one `ScheduledTokens`."""

    token_id: int | None
    """Sampled; None where the part does not reach the request's last token."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: Sequence[TokenLogprob] = ()
    """Of the next prompt tokens, where they are wanted."""


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
    priority: int = 0
    """The lowest is served first."""
    salt: str = ""
    """The tenant: cached blocks are shared within it only, and the queue is fair between tenants."""
    deadline: float = math.inf
    """Time on the engine's clock, seconds."""
    index: int = 0
    """Which of its prompt's completions this is."""
    first: Request | None = None
    """Completion 0 of the same prompt, which computes it for all; None is this one."""
    constraint: Constraint | None = None
    """Where the output stands in what constrains it; advanced with `token_ids`."""
    arrived: float = 0.0
    """Time on the engine's clock, seconds."""
    arrival: int = field(init=False, default=0)
    """Counts requests in order of arrival; `admission` likewise, None before the first."""
    admission: int | None = field(init=False, default=None)
    awaited: bytes | None = field(init=False, default=None)
    """Hash of a block that another request computes for this one."""
    found_cached: int = field(init=False, default=0)
    """Leading tokens that were in the cache when it arrived."""
    first_scheduled: float | None = field(init=False, default=None)
    """Time on the engine's clock, seconds."""
    num_steps: int = field(init=False, default=0)
    num_preemptions: int = field(init=False, default=0)
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0
    """Leading tokens whose keys and values are in the cache."""
    num_cached_tokens: int | None = None
    """Set at the first admission, and kept when the request is preempted."""
    status: Status = Status.WAITING
    random: random.Random = field(init=False)
    """One draw per sampled token: the samples depend on the seed and on nothing else in the batch."""
    prompt_logprobs: list[TokenLogprob | None] = field(init=False)
    """Of the first prompt tokens, as far as they are computed and wanted; kept when the request is preempted."""
    _draw: tuple[int, float] = (0, 0.0)
    """Where the last draw samples a token, and the draw."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.prompt_logprobs = [] if self.params.prompt_logprobs is None or self.index else [None]
        seed = self.params.seed
        # Of a negative integer `random.Random` takes the absolute value: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
        natural = None if seed is None else 2 * seed if seed >= 0 else -2 * seed - 1
        # Completion 0 is what the seed gives without the others.
        self.random = random.Random(natural if natural is None or not self.index else f"{natural}/{self.index}")

    def uniform(self) -> float:
        """The number in [0, 1) that samples the next token; the same again if a step has to be done again."""
        position, number = self._draw
        if position != len(self.token_ids):
            number = self.random.random()
            self._draw = (len(self.token_ids), number)
        return number

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed: no cached prefix has them."""
        return 0 < len(self.prompt_logprobs) < self.num_prompt_tokens

    def prompt_targets(self, start: int, end: int) -> range:
        """The prompt tokens that computing the tokens `[start, end)` predicts and whose log-probabilities lack."""
        if not self.scores_prompt:
            return range(0)
        return range(max(start + 1, len(self.prompt_logprobs)), min(end + 1, self.num_prompt_tokens))

    @property
    def num_missing(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def started(self) -> bool:
        """Whether it, or the first completion of its prompt, has been admitted."""
        return self.admission is not None or (self.first is not None and self.first.admission is not None)

    def order(self) -> tuple[int, int]:
        """The order of the running: who comes first is preempted last."""
        assert self.admission is not None
        return self.priority, self.admission

    def timing(self, now: float) -> RequestTiming:
        """How it has fared up to `now`."""
        begun = now if self.first_scheduled is None else self.first_scheduled
        return RequestTiming(max(0.0, begun - self.arrived), self.num_steps, self.num_preemptions)

    @property
    def decoding(self) -> bool:
        """Only the newest token is missing."""
        return self.num_missing == 1 and self.num_computed > 0
