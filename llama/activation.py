"""Activations of the feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from llama.config import Activation
from llama.kernels import cpu


class Swish(nn.Module):
    """x · sigmoid(beta · x) (Ramachandran et al., arXiv:1710.05941, §4), with beta fixed or trained.

    A trained beta is a parameter of shape `[1]`, because FSDP shards no scalars.
    """

    def __init__(self, beta: float, learned: bool) -> None:
        super().__init__()
        self.beta: float | nn.Parameter = nn.Parameter(torch.tensor([float(beta)])) if learned else beta

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, same type."""
        return (x * torch.sigmoid(self.beta * x)).type_as(x)


class _SiluProduct(torch.autograd.Function):
    """silu(gate) ⊙ up, which keeps its two inputs only: silu(gate) costs less to compute again than to keep."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0] * up, gate), gradients[0] * silu(gate)


def gated_product(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) ⊙ up, all of one type."""
    # A compiler fuses the plain product, and chooses itself what to keep.
    if isinstance(activation, nn.SiLU) and not torch.compiler.is_compiling():
        native = cpu.silu_product(gate, up)
        if native is not None:
            return native
        product: Tensor = _SiluProduct.apply(gate, up)
        return product
    return activation(gate) * up


def build_activation(kind: Activation, swish_beta: float = 1.0) -> nn.Module:
    """The function on w1·x that `ModelConfig.activation` names.

    For a gated kind that is the gate's: GLU sigmoid, ReGLU relu, GeGLU exact gelu, SwiGLU silu (Shazeer,
    arXiv:2002.05202, eq. 4-6). gelu is x·Φ(x), gelu_tanh the approximation of Hendrycks & Gimpel, arXiv:1606.08415, §2.
    `swish_beta` is the fixed β of swish, and the start value of the parameter `beta` of swish_learned.

    Raises:
        ValueError: the kind is unknown.
    """
    match kind:
        case "relu" | "reglu":
            return nn.ReLU()
        case "gelu" | "geglu":
            return nn.GELU()
        case "gelu_tanh":
            return nn.GELU(approximate="tanh")
        case "glu":
            return nn.Sigmoid()
        case "swiglu":
            return nn.SiLU()
        case "swish" | "swish_learned":
            return Swish(swish_beta, learned=kind == "swish_learned")
    raise ValueError(f"model.activation={kind!r} is not an activation; see llama.config.Activation")
