"""Prompts at the door."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from llama.engine.blocks import BlockManager


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
