"""Activation checkpointing: a block keeps little of its forward pass and computes the rest again in backward.

full (Chen et al., arXiv:1604.06174, §4): only the block's input is kept, and its whole forward pass is repeated, tokens
sent to experts included. selective (Korthikanti et al., arXiv:2205.05198, §5): what is costly to repeat is kept as
well, the results of matrix products, attention and the all-to-alls; norms, rotations, activations, gathers and type
casts are repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import llama.all_to_all  # noqa: F401  (registers the operator)

ActivationCheckpointing = Literal["none", "full", "selective"]

_aten = torch.ops.aten
_KEPT = {
    # Not bmm: llama/training/attention.py writes into its results, and attention there is one of its own on the CPU.
    _aten.mm.default,
    _aten.addmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.caravan.all_to_all.default,
}


# FSDP's hooks on the experts, inside the block, open one range more for the profiler when they run again, and torch
# takes an operator that it has not seen the first time for an error.
SAC_IGNORED_OPS.update(
    getattr(operator, overload)
    for operator in (torch.ops.profiler._record_function_enter_new, torch.ops.profiler._record_function_exit)
    for overload in operator.overloads()
)


def recompute_activations(block: nn.Module, kind: ActivationCheckpointing, *, random: bool) -> None:
    """Makes the block's forward pass save as `kind` says; the block stays itself, and so do its parameters' names.

    Args:
        random: the block draws random numbers, which the repetition must draw again.
    """
    if kind == "none":
        return
    forward = block.forward

    # Only the non-reentrant kind keeps the graph of what leaves through the routing record.
    def full(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random)

    def selective(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, context_fn=_selective)

    block.forward = full if kind == "full" else selective  # type: ignore[method-assign]


def _selective() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    contexts: Callable[..., Any] = create_selective_checkpoint_contexts
    first, again = contexts(_policy)
    return first, again


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
