"""Normalisation of the last dimension's features, and DeepNorm's constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, layer_norm, rms_norm

from llama.autograd import first_order
from llama.config import Norm
from llama.kernels import cpu


class _FullPrecisionRMSNorm(torch.autograd.Function):
    """RMSNorm with the backward pass of the fused layer norm: on a CPU four times as fast as autograd's own.

    A layer norm told that the mean is 0 and 1/deviation is r has the gradient r·(gw − mean(gw) − x̂·mean(gw·x̂)), where
    g is the incoming gradient, w the weight and x̂ = r·x. RMSNorm's lacks the mean(gw), which is added back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        reciprocal = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, reciprocal)
        return (x * reciprocal).mul_(weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, reciprocal = ctx.saved_tensors
        dim = x.shape[-1]
        # A backward pass may run inside autocast, which would round the product with the weight.
        with torch.autocast("cpu", enabled=False):
            mean = torch.zeros_like(reciprocal)
            grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
                grad, x, [dim], mean, reciprocal, weight, None, [True, True, False]
            )
            grad_x.add_((grad @ weight).unsqueeze(-1).mul_(reciprocal).div_(dim))
        return grad_x, grad_weight, None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich, arXiv:1910.07467, eq. 4).

    The statistics of a half-precision input are fp32, and the quotient is rounded to the input's type before the weight
    multiplies it, as in LLaMA.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` → `[..., dim]`, same type."""
        native = cpu.rms_norm(x, self.weight, self.eps)
        if native is not None:
            return native
        shape = (x.shape[-1],)
        if x.dtype != self.weight.dtype or x.dtype in (torch.bfloat16, torch.float16):
            return (rms_norm(x, shape, None, self.eps).type_as(x) * self.weight).type_as(x)
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _FullPrecisionRMSNorm.apply(x, self.weight, self.eps)
        return rms_norm(x, shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """y = (x − mean) / deviation · weight + bias over the last dimension (Ba et al., arXiv:1607.06450, §3).

    The deviation is sqrt(σ² + eps) with the population variance (divided by n); with `bessel` it is s + eps, where s is
    the sample's standard deviation (variance divided by n − 1), as in The Annotated Transformer. The arithmetic is fp32
    for half-precision inputs.
    """

    def __init__(self, dim: int, eps: float, bessel: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps
        self.bessel = bessel

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` → `[..., dim]`, same type."""
        if not self.bessel:
            dtype = torch.promote_types(x.dtype, self.weight.dtype)
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return layer_norm(x.to(dtype), (x.shape[-1],), weight, bias, self.eps).type_as(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(dim=-1, keepdim=True)
        deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)
        normed = centred / (deviation + self.eps)
        return torch.addcmul(self.bias.to(wide), normed, self.weight.to(wide)).type_as(x)


class BatchNorm(nn.Module):
    """y = (x − mean) / sqrt(σ² + eps) · weight + bias, each feature over all positions of a batch (Ioffe & Szegedy,
    arXiv:1502.03167, alg. 1). The counter-example among the norms: nothing else in a decoder looks along the sequence
    without a mask.

    - In training a position's output depends on all tokens of the batch, later ones too: the model sees a little of
      what it is to predict, so its training loss is no estimate of its loss. Packed documents and padding
      (`Batch.lengths`) are in the statistics as well: a norm is not told which positions count.
    - In evaluation the running statistics stand in, and a position depends on itself alone; what the model has learned
      with others is another function.
    - The statistics are those of one forward pass on one rank, so that the size of a micro-batch and the number of
      ranks change the result, which they do with no other norm.

    A forward pass in training leaves its statistics in `batch_statistics`; one that is repeated for backward
    (activation checkpointing) leaves the same again. The running ones change when `update_running` is called, which
    the trainer does once a step. Where the weight is frozen, as below adapters, the norm is too: it takes the running
    statistics in training. The arithmetic is fp32 for half-precision inputs, and the statistics are fp32 in every
    model.
    """

    momentum = 0.1
    """Share of a step's statistics in the running ones, as torch has it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(dim, dtype=torch.float32))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.eps = eps
        self.batch_statistics: Tensor | None = None
        """`[2, dim]`: mean and variance (divided by n − 1, alg. 2) of the last forward pass in training."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` → `[..., dim]`, same type. Raises ValueError in training for a single position."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        rows, weight, bias = x.reshape(-1, x.shape[-1]).to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        if self.training and self.weight.requires_grad:
            # With a momentum of 1 torch writes the batch's own statistics.
            self.batch_statistics = torch.zeros(2, x.shape[-1], dtype=dtype, device=x.device)
            mean, variance = self.batch_statistics
            y = batch_norm(rows, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps)
        else:
            y = batch_norm(rows, self.running_mean.to(dtype), self.running_var.to(dtype), weight, bias, eps=self.eps)
        return y.view(x.shape).type_as(x)


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Those of the model's norms that take statistics of their batches, in order."""
    return [module for module in model.modules() if isinstance(module, BatchNorm) and module.weight.requires_grad]


def batch_statistics(norms: Sequence[BatchNorm]) -> Tensor:
    """`[norms, 2, dim]`: the statistics that the last forward pass in training left; for norms of one size.

    Averages over micro-batches and ranks are what `update_running` wants (arXiv:1502.03167, alg. 2, step 10).
    """
    return torch.stack([norm.batch_statistics for norm in norms if norm.batch_statistics is not None])


@torch.no_grad()
def update_running(norms: Sequence[BatchNorm], statistics: Tensor) -> None:
    """Moves the running statistics towards those of a step, `[norms, 2, dim]`."""
    for norm, (mean, variance) in zip(norms, statistics, strict=True):
        norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_(variance.to(norm.running_var), norm.momentum)


def build_norm(kind: Norm, dim: int, eps: float) -> RMSNorm | LayerNorm | BatchNorm:
    """The norm that `ModelConfig.norm` names, over a last dimension of `dim`."""
    if kind == "rmsnorm":
        return RMSNorm(dim, eps)
    if kind == "batchnorm":
        return BatchNorm(dim, eps)
    return LayerNorm(dim, eps, bessel=kind == "layernorm_bessel")


@dataclass(frozen=True)
class DeepNorm:
    """Constants of one stack of layers: LayerNorm(alpha · x + f(x)), and the gain of its start values."""

    alpha: float
    """Factor on the residual stream."""
    beta: float
    """Gain of the Xavier-normal start values of the feed-forward, value and output projections; others keep 1."""


class DeepNorms(NamedTuple):
    """The constants of a model's two stacks; a stack without layers has 1 and 1."""

    encoder: DeepNorm
    decoder: DeepNorm

    def of(self, encoder: bool) -> DeepNorm:
        """The encoder's, or the decoder's."""
        return self.encoder if encoder else self.decoder


def deepnorm(encoder_layers: int = 0, decoder_layers: int = 0) -> DeepNorms:
    """DeepNorm's constants (Wang et al., arXiv:2203.00555, fig. 2, right).

    With N encoder and M decoder layers: encoder-only α = (2N)^¼, β = (8N)^-¼; decoder-only the same of M; both
    together α = 0.81·(N⁴M)^¹⁄₁₆, β = 0.87·(N⁴M)^-¹⁄₁₆ in the encoder and α = (3M)^¼, β = (12M)^-¼ in the decoder.

    Raises:
        ValueError: a number of layers is negative, or both are 0.
    """
    if min(encoder_layers, decoder_layers) < 0 or encoder_layers == decoder_layers == 0:
        raise ValueError(
            f"deepnorm: encoder_layers={encoder_layers} and decoder_layers={decoder_layers} make no model; "
            "neither may be negative and one must be at least 1"
        )
    none = DeepNorm(1.0, 1.0)
    if encoder_layers and decoder_layers:
        size = encoder_layers**4 * decoder_layers
        encoder = DeepNorm(0.81 * size ** (1 / 16), 0.87 * size ** (-1 / 16))
        return DeepNorms(encoder, DeepNorm((3 * decoder_layers) ** 0.25, (12 * decoder_layers) ** -0.25))
    layers = encoder_layers or decoder_layers
    alone = DeepNorm((2 * layers) ** 0.25, (8 * layers) ** -0.25)
    return DeepNorms(alone, none) if encoder_layers else DeepNorms(none, alone)
