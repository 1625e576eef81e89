"""Generation: a model continues its prompts token by token, with a contiguous key/value cache.

Legend: B rows of a batch, L tokens of a forward pass, S cached tokens, H query heads, G key/value heads, D head
dimension, V vocabulary.

For one prompt or a batch of equally long ones, such as experiments need; many requests of any length are the engine's
work (llama/engine). A step costs the forward pass of one token and the reading of the cache; without the cache, that of
the whole sequence.
"""

from __future__ import annotations

import math
import operator
import random
import reprlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama.attention import CausalAttend, Scoring, attend_visible, visible_keys
from llama.sampling import apply_temperature, draw, keep_min_p, keep_top, penalize_repetition

if TYPE_CHECKING:
    from llama.model import Transformer
    from llama.seq2seq import BoundDecoder

Prompt = Sequence[int] | Sequence[Sequence[int]] | Tensor
"""One prompt's token ids, `[L]`, or those of a batch, `[B, L]`."""


def generate(
    model: Transformer | BoundDecoder,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int | Sequence[int] | None = None,
    use_cache: bool = True,
) -> list[int] | list[list[int]]:
    """The tokens that follow the prompt: a list for one prompt, a list of lists for a batch.

    Runs in eval and inference mode; the modules' training flags are afterwards what they were.

    Args:
        prompt: token ids, `[L]`, or `[B, L]` of equal lengths.
        max_new_tokens: a row ends here, or earlier with a stop id.
        temperature: 0 is greedy.
        top_k, top_p, min_p, repetition_penalty: see `llama.sampling`; the defaults turn them off.
        stop_ids: tokens that end a row; the one that does is its last token. The other rows go on.
        seed: makes the samples reproducible. One number serves every row, so that a row gets the tokens that it would
            get alone, and equal prompts get equal ones; a sequence has one for each row. None draws fresh ones.
        use_cache: False computes the whole sequence anew for every token: slower, for comparison. With dynamic NTK
            scaling the cache serves up to `original_max_seq_len` tokens only: every longer length has frequencies of
            its own, to which all earlier keys have to be turned anew, so each further token costs a whole sequence.

    Raises:
        ValueError: an argument is of the wrong kind or out of range, prompt and output do not fit into
            `model.max_seq_len`, or the model computes logits that are no numbers.
    """
    choice = _Choice(temperature, top_k, top_p, min_p, repetition_penalty)
    generation = _Generation(model, prompt, max_new_tokens, choice, stop_ids, seed, use_cache)
    rows: list[list[int]] = [[] for _ in generation.randoms]
    for tokens in generation.steps():
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows[0] if generation.single else rows


def stream(
    model: Transformer,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int | Sequence[int] | None = None,
    use_cache: bool = True,
) -> Iterator[int] | Iterator[list[int | None]]:
    """`generate`, token by token, as they are computed.

    Yields a token for one prompt; for a batch a list of one token a row, None for rows that have ended. Between two
    tokens the model is in the mode it was in before, and the caller may drop the iterator at any time.

    Raises:
        ValueError: as `generate`, for its arguments at the call.
    """
    choice = _Choice(temperature, top_k, top_p, min_p, repetition_penalty)
    generation = _Generation(model, prompt, max_new_tokens, choice, stop_ids, seed, use_cache)
    steps = generation.steps()
    return (token for (token,) in steps if token is not None) if generation.single else steps


class KVCacheAttend:
    """The `Attend` (llama/attention.py) of rows that grow together: a layer's keys and values lie side by side.

    A forward pass stores its tokens behind the `length` cached ones, at the positions `length` onwards, and attends to
    all; then `advance` makes them cached ones. The memory, `[B, G, capacity, D]` twice a layer, is taken at a layer's
    first call, in its keys' type.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def advance(self, tokens: int) -> None:
        """Called after every forward pass with the number of its tokens a row."""
        self.length += tokens

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, scoring: Scoring) -> Tensor:
        start, end = self.length, self.length + q_BLHD.shape[1]
        if end > self.capacity:
            raise ValueError(f"capacity={self.capacity} tokens of the cache are below the {end} to keep; raise it")
        keys_BGSD = self._store(self._keys, layer, k_BLGD, start)
        values_BGSD = self._store(self._values, layer, v_BLGD, start)
        if start == 0:
            return CausalAttend()(layer, q_BLHD, k_BLGD, v_BLGD, scoring)
        # Keys that have left the window of every query.
        first = 0 if scoring.window is None else max(0, start + 1 - scoring.window)
        query_positions = torch.arange(start, end, device=q_BLHD.device)
        key_positions = torch.arange(first, end, device=q_BLHD.device)
        # A single query sees every key that is left.
        visible = visible_keys(query_positions, key_positions, scoring.window) if end > start + 1 else None
        bias = None if scoring.bias is None else scoring.bias(query_positions, key_positions)
        k_BGSD, v_BGSD = keys_BGSD[:, :, first:end], values_BGSD[:, :, first:end]
        return attend_visible(q_BLHD.transpose(1, 2), k_BGSD, v_BGSD, visible, scoring, bias).transpose(1, 2)

    def _store(self, cache: dict[int, Tensor], layer: int, x_BLGD: Tensor, start: int) -> Tensor:
        if layer not in cache:
            batch, _, heads, dim = x_BLGD.shape
            cache[layer] = x_BLGD.new_empty(batch, heads, self.capacity, dim)
        cache[layer][:, :, start : start + x_BLGD.shape[1]] = x_BLGD.transpose(1, 2)
        return cache[layer]


@dataclass(frozen=True)
class _Choice:
    """How a token is chosen; every field is an argument of `generate`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            _require(hasattr(value, "__float__"), f"{name}={value!r} is not a number; give one")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        _require(finite, f"temperature={self.temperature} must be a number of at least 0; 0 is greedy")
        top_k = _integer("top_k", self.top_k, "give a number of tokens; 0 turns it off")
        _require(top_k >= 0, f"top_k={top_k} must not be negative; 0 turns it off")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 turns it off")
        _require(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1]; 0 turns it off")
        penalty = self.repetition_penalty
        _require(
            math.isfinite(penalty) and penalty > 0, f"repetition_penalty={penalty} must be positive; 1 turns it off"
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def tokens(self, logits_BV: Tensor, seen_BV: Tensor | None, uniforms: Sequence[float]) -> Tensor:
        """`[B]` int64; `seen_BV` is wanted with a repetition penalty, `uniforms` unless greedy."""
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        if seen_BV is not None:
            logits_BV = penalize_repetition(logits_BV, seen_BV, self.repetition_penalty)
        if self.greedy:
            return logits_BV.argmax(dim=-1)
        logits_BV = apply_temperature(logits_BV, self.temperature)
        if self.top_k or self.top_p < 1:
            logits_BV = keep_top(logits_BV, top_k=self.top_k, top_p=self.top_p)
        if self.min_p:
            logits_BV = keep_min_p(logits_BV, self.min_p)
        return draw(logits_BV, torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device))


class _Generation:
    """The state of one call: the tokens so far, the cache, and each row's random numbers."""

    def __init__(
        self,
        model: Transformer | BoundDecoder,
        prompt: Prompt,
        max_new_tokens: int,
        choice: _Choice,
        stop_ids: Collection[int],
        seed: int | Sequence[int] | None,
        use_cache: bool,
    ) -> None:
        config = model.config
        device = model.tok_embeddings.weight.device
        prompt_BL, self.single = _as_batch(prompt, config.vocab_size)
        batch, self.length = prompt_BL.shape
        max_new_tokens = _integer("max_new_tokens", max_new_tokens, "give a number of tokens")
        total = self.length + max_new_tokens
        _require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
        _require(
            total <= config.max_seq_len,
            f"model.max_seq_len={config.max_seq_len} is below the prompt's {self.length} tokens and "
            f"max_new_tokens={max_new_tokens}; lower max_new_tokens or shorten the prompt",
        )
        self.model = model
        self.choice = choice
        self.stop_ids = _stop_ids(stop_ids, config.vocab_size)
        self.max_new_tokens = max_new_tokens
        self.randoms = _randoms(seed, batch)
        self.tokens_BS = torch.zeros(batch, total, dtype=torch.int64, device=device)
        self.tokens_BS[:, : self.length] = prompt_BL
        self.seen_BV: Tensor | None = None
        if choice.repetition_penalty != 1:
            self.seen_BV = torch.zeros(batch, config.vocab_size, dtype=torch.bool, device=device)
            self.seen_BV.scatter_(1, self.tokens_BS[:, : self.length], True)
        self.last_B = torch.arange(batch, device=device)
        self.cache = KVCacheAttend(total) if use_cache else None
        self.cacheable_length = total
        scaling = config.rope_scaling
        if scaling is not None and scaling.kind == "dynamic_ntk" and scaling.original_max_seq_len is not None:
            self.cacheable_length = scaling.original_max_seq_len

    def steps(self) -> Iterator[list[int | None]]:
        """One token a row at a time, None for the rows that have ended, until all have."""
        running = [True] * len(self.randoms)
        for _ in range(self.max_new_tokens):
            tokens = self._step()
            yield [token if runs else None for token, runs in zip(tokens, running, strict=True)]
            running = [runs and token not in self.stop_ids for token, runs in zip(tokens, running, strict=True)]
            if not any(running):
                return

    @torch.inference_mode()
    def _step(self) -> list[int]:
        with evaluating(self.model):
            logits_BV = self._logits()
        _require(
            bool(logits_BV.amax(dim=-1).isfinite().all()),
            f"the model's logits after {self.length} tokens are NaN or infinite; check its weights, or use a wider "
            "type than " + str(logits_BV.dtype).removeprefix("torch."),
        )
        uniforms = [] if self.choice.greedy else [source.random() for source in self.randoms]
        tokens_B = self.choice.tokens(logits_BV, self.seen_BV, uniforms)
        self.tokens_BS[:, self.length] = tokens_B
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, tokens_B[:, None], True)
        self.length += 1
        return tokens_B.tolist()

    def _logits(self) -> Tensor:
        """`[B, V]`, of the token that comes next."""
        if self.length > self.cacheable_length:
            self.cache = None
        cache = self.cache
        start = 0 if cache is None else cache.length
        tokens_BL = self.tokens_BS[:, start : self.length]
        length = tokens_BL.shape[1]
        logits_BV = self.model(
            tokens_BL,
            positions=torch.arange(start, self.length, device=tokens_BL.device).expand_as(tokens_BL),
            attend=cache,
            output_index=self.last_B * length + length - 1,
            rope_length=self.length,
        )
        if cache is not None:
            cache.advance(length)
        return logits_BV


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _integer(name: str, value: Any, remedy: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name}={value!r} is not an integer; {remedy}") from error


def _stop_ids(stop_ids: Collection[int], vocab_size: int) -> frozenset[int]:
    remedy = f"give a list of token ids in [0, model.vocab_size={vocab_size})"
    try:
        entries = list(stop_ids)
    except TypeError as error:
        raise ValueError(f"stop_ids={stop_ids!r} is not a list; {remedy}") from error
    # Of a tensor's elements each hashes by what object it is, not by its value.
    ids = frozenset(_integer("a token of stop_ids", entry, remedy) for entry in entries)
    outside = sorted(token_id for token_id in ids if not 0 <= token_id < vocab_size)
    _require(not outside, f"stop_ids has {outside[:1]}, which the model has no token for; {remedy}")
    return ids


def _as_tensor(prompt: Prompt, vocab_size: int) -> Tensor:
    try:
        return torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        rows = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, str) else ()
        lengths = {
            len(row) if isinstance(row, Sequence | Tensor) and not isinstance(row, str) else None for row in rows
        }
        if len(lengths) > 1 and None not in lengths:
            raise ValueError("the prompts' lengths differ; give one prompt at a time, or equally long ones") from error
        raise ValueError(
            f"prompt={reprlib.repr(prompt)} holds something else than token ids; give integers in "
            f"[0, model.vocab_size={vocab_size}), in a list or a tensor"
        ) from error


def _as_batch(prompt: Prompt, vocab_size: int) -> tuple[Tensor, bool]:
    """The prompt as `[B, L]` int64, and whether it was a single one."""
    prompt_BL = _as_tensor(prompt, vocab_size)
    single = prompt_BL.dim() == 1
    _require(
        prompt_BL.dim() in (1, 2) and prompt_BL.numel() > 0,
        f"prompt of shape {list(prompt_BL.shape)} is neither [tokens] nor [batch, tokens] with at least one token; "
        "begin with the begin-of-text token",
    )
    integers = not (prompt_BL.is_floating_point() or prompt_BL.is_complex() or prompt_BL.dtype == torch.bool)
    _require(integers, f"prompt is of {prompt_BL.dtype}; give integer token ids")
    # Of the unsigned types torch computes with uint8 alone.
    prompt_BL = prompt_BL.long()
    lowest, highest = (int(bound) for bound in prompt_BL.aminmax())
    _require(
        lowest >= 0 and highest < vocab_size,
        f"prompt has the token id {lowest if lowest < 0 else highest}; ids lie in [0, model.vocab_size={vocab_size})",
    )
    return (prompt_BL[None] if single else prompt_BL), single


def _randoms(seed: int | Sequence[int] | None, batch: int) -> list[random.Random]:
    if seed is None:
        return [random.Random() for _ in range(batch)]
    remedy = "give an integer, or one for each prompt"
    try:
        seeds = [_integer("a number of seed", number, remedy) for number in seed]  # type: ignore[union-attr]
    except TypeError:  # no sequence
        seeds = [_integer("seed", seed, remedy)] * batch
    _require(len(seeds) == batch, f"seed has {len(seeds)} numbers for {batch} prompts; give one, or one for each")
    # As text: of a negative integer `random.Random` takes the absolute value.
    return [random.Random(str(number)) for number in seeds]
