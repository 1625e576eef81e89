"""What the project's own autograd functions share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a `backward` that autograd cannot differentiate again: asked to, it raises instead of being wrong in silence.

    `torch.autograd.function.once_differentiable` does so only where the incoming gradient has a graph.
    """

    @wraps(backward)
    def refusing(ctx: Any, *gradients: Any) -> Any:
        # Grad mode is on in a backward pass only with create_graph; a compiler traces it with grad mode on.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{backward.__qualname__.split('.')[0].lstrip('_')} has no second derivative; "
                "call backward without create_graph=True"
            )
        return backward(ctx, *gradients)

    return refusing
