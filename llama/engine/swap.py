"""New weights for a model, in place."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import torch
from torch import Tensor

from llama.model import Transformer


class WeightSwap:
    """Weights that wait to be loaded; `done` tells when they are.

    Raises:
        ValueError: a name is missing or unknown, a shape or the kind of number is another, or a tensor holds no
            numbers; nothing has changed.
    """

    def __init__(self, model: Transformer, weights: Mapping[str, Tensor], weights_id: str) -> None:
        self.weights_id = weights_id
        self.done: Future[None] = Future()
        # Not to be cancelled, as `asyncio.wrap_future` does when its task is: the swap comes, and must be able to tell.
        self.done.set_running_or_notify_cancel()
        self._own = model.state_dict()
        self._weights = dict(weights)
        for name in self._own.keys() - self._weights.keys():
            raise ValueError(f"weights[{name!r}] is missing; give every weight of the model")
        for name, tensor in self._weights.items():
            own = self._own.get(name)
            if own is None:
                raise ValueError(f"weights[{name!r}] is no weight of the model; leave it out")
            if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout is not torch.strided:
                raise ValueError(f"weights[{name!r}] is {_kind(tensor)}; give a dense tensor with its numbers")
            if tensor.shape != own.shape or tensor.is_floating_point() != own.is_floating_point():
                raise ValueError(
                    f"weights[{name!r}] is {tensor.dtype} of shape {list(tensor.shape)}, the model's is {own.dtype} of "
                    f"shape {list(own.shape)}; a swap keeps the model's config"
                )

    @torch.no_grad()
    def apply(self) -> None:
        """Writes them over the old ones. The model must not be running."""
        for name, own in self._own.items():
            own.copy_(self._weights[name])
        self._weights.clear()


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor on {value.device} in layout {value.layout}"
