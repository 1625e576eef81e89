"""The linear layer: torch's own, but for few rows in bf16 on a CPU, where decoding spends its time.

There the weights are all that is read, and torch 2.13 reads them at half the speed of the memory: the kernel
(llama/kernels/linear.cpp) is 1.2 to 2.4 times as fast. It reads the weights as they are, without a packed copy, so
weights may change in place.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from llama.kernels import cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x·Wᵀ + b`: `[..., in]` and `[out, in]` → `[..., out]`."""
    native = cpu.linear(x, (weight, bias))
    return functional.linear(x, weight, bias) if native is None else native[0]


class Linear(nn.Linear):
    """`nn.Linear` with the same parameters, start values and gradients."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`."""
        return linear(input, self.weight, self.bias)


def linears(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each of the layers makes of x; plain ones in one go, which saves the time of calling them."""
    if all(type(layer) is Linear and not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers):
        native = cpu.linear(x, *((layer.weight, layer.bias) for layer in layers))  # type: ignore[arg-type]  # mypy forgets what they are
        if native is not None:
            return native
    return [layer(x) for layer in layers]
