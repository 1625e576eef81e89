"""What is asked of the engine, at the door: there a mistake hurts nobody else."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

from llama.engine.blocks import BlockManager
from llama.engine.params import SamplingParams


class PromptTooLong(ValueError):
    """The prompt leaves no room for a single generated token, in the model's context or in the cache."""


def check_prompt(token_ids: Sequence[int], *, vocab_size: int, max_seq_len: int, blocks: BlockManager) -> list[int]:
    """The token ids as Python integers.

    Raises:
        ValueError: there are none, or one is no integer in [0, `vocab_size`); names its position.
        PromptTooLong: with one more token they exceed `max_seq_len` or what the cache can hold at all.
    """
    checked: list[int] = []
    for position, token_id in enumerate(token_ids):
        try:
            value = operator.index(token_id)
        except TypeError:
            value = -1
        if not 0 <= value < vocab_size:
            raise ValueError(f"prompt[{position}]={token_id!r} is not a token id in [0, {vocab_size})")
        checked.append(value)
    if not checked:
        raise ValueError("prompt is empty; give at least one token")
    if len(checked) + 1 > max_seq_len:
        raise PromptTooLong(
            f"the prompt has {len(checked)} tokens; with at least 1 generated it exceeds the model's context of "
            f"{max_seq_len} tokens, shorten it"
        )
    if blocks.max_tokens is not None and len(checked) + 1 > blocks.max_tokens:
        raise PromptTooLong(
            f"the prompt has {len(checked)} tokens; with at least 1 generated it exceeds the cache of "
            f"engine.num_blocks={blocks.num_blocks} × engine.block_size={blocks.block_size} tokens, shorten it or "
            "enlarge the cache"
        )
    return checked


def check_order(request_id: str | None, salt: str, priority: int, timeout_s: float | None) -> None:
    """Whether the queue can obey.

    Raises:
        ValueError: it cannot; names the field and its value.
    """
    if request_id is not None:
        check_name("request_id", request_id)
    check_name("salt", salt)
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise ValueError(f"priority={priority!r} is not an integer")
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool) and not math.isnan(timeout_s)
    if timeout_s is not None and not (number and timeout_s > 0):
        raise ValueError(f"timeout_s={timeout_s!r} is not a positive number of seconds")


def check_name(field: str, name: str) -> None:
    """Whether it is text that UTF-8 can hold, as `generation_root` needs it.

    Raises:
        ValueError: it is not; names the field and its value.
    """
    if not isinstance(name, str):
        raise ValueError(f"{field}={name!r} is not a string")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field}={name!r} is no text: half of a surrogate pair at {error.start}") from error


def with_params(
    prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[tuple[str | Sequence[int], SamplingParams]]:
    """Each prompt with its parameters: the ones for all, or its own.

    Raises:
        ValueError: the prompts are one string, or the parameters are as many as neither.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts!r} is one string; give a list of prompts")
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"params holds {len(each)} settings for {len(prompts)} prompts; give one, or one for each")
    return list(zip(prompts, each, strict=True))
