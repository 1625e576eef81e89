"""Rotary position embedding (Su et al., arXiv:2104.09864, §3.4.2) and its scalings to longer sequences.

Legend: B batch, L sequence, H heads, D head dimension, P = D/2 pairs.

The frequencies are computed in fp32, operation for operation as in Hugging Face's models: a frequency that differs in
its last bit turns a token at position 10⁵ by another angle.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llama.config import RopeLayout, RopeScaling
from llama.kernels import cpu


def rotary_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    length: int | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, float]:
    """Radians per position of each pair, and the factor that goes onto cosine and sine.

    Without a scaling, pair i turns by theta^(-2i/head_dim) per position. The scalings, for sequences `factor` times as
    long as those trained on:

    - linear: every frequency divided by factor (position interpolation, Chen et al., arXiv:2306.15595, §2.3).
    - ntk: theta · factor^(D/(D−2)) in place of theta, so that the slowest pair is interpolated by factor and the
      fastest is kept (Peng et al., YaRN, arXiv:2309.00071, §3.1).
    - dynamic_ntk: the same with factor · length / original − (factor − 1) in place of factor, for a sequence of
      `length` tokens beyond the original length; unchanged below it (arXiv:2309.00071, §3.3 names the idea; the
      expression is Hugging Face's).
    - yarn: see `_yarn`. llama3: see `_llama3`.

    Args:
        head_dim: even, and above 2 for the ntk kinds (`ModelConfig` sees to both).
        length: tokens of the current sequence; only dynamic_ntk depends on it. None is the original length.

    Returns:
        `[head_dim / 2]` fp32 on `device`, and the factor (1.0 but for yarn).
    """
    if scaling is None:
        return _frequencies(head_dim, theta, device), 1.0
    if scaling.kind == "linear":
        return _frequencies(head_dim, theta, device) / scaling.factor, 1.0
    if scaling.kind == "yarn":
        return _yarn(head_dim, theta, scaling, device)
    if scaling.kind == "llama3":
        return _llama3(_frequencies(head_dim, theta, device), scaling), 1.0
    stretch = scaling.factor
    if scaling.kind == "dynamic_ntk":
        original = _original(scaling)
        stretch = scaling.factor * max(length or 0, original) / original - (scaling.factor - 1)
    return _frequencies(head_dim, theta * stretch ** (head_dim / (head_dim - 2)), device), 1.0


def _frequencies(head_dim: int, theta: float, device: torch.device | None) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def _original(scaling: RopeScaling) -> int:
    assert scaling.original_max_seq_len is not None
    return scaling.original_max_seq_len


def _yarn(head_dim: int, theta: float, scaling: RopeScaling, device: torch.device | None) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071, §3.2 and §3.4): interpolates by parts, by how often a pair turns in training.

    Over the original length a pair of index i turns original / (2π·theta^(2i/D)) times. Pairs from `beta_fast` turns up
    keep their frequency, pairs below `beta_slow` turns are divided by the factor, and between the two a ramp that is
    linear in i blends them (so the authors' code; the paper's ramp is linear in the turns). Cosine and sine carry
    0.1·ln(factor) + 1, which sharpens the softmax (§3.4).
    """
    powers = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)

    def pair_turning(turns: float) -> float:
        return head_dim * math.log(_original(scaling) / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    frequencies = 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
    factor = scaling.attention_factor
    return frequencies, 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's stretch (Grattafiori et al., arXiv:2407.21783, §3.4.2; the formula is in Meta's code).

    By the turns a pair makes over the original length: at `high_freq_factor` and above kept, at `low_freq_factor` and
    below divided by the factor, between the two blended linearly in the turns.
    """
    turns = _original(scaling) / (2 * math.pi / frequencies)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotary_cos_sin(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """`factor` times cosine and sine of each pair's angle.

    Args:
        positions: `[...]` integers.
        frequencies: `[P]` from `rotary_frequencies`, on the positions' device.

    Returns:
        Two tables `[..., P]` of the frequencies' type.
    """
    angles = positions[..., None].to(frequencies.dtype) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def apply_rotary(x_BLHD: Tensor, cos_BLP: Tensor, sin_BLP: Tensor, layout: RopeLayout = "half") -> Tensor:
    """Turns every head of x by its position's angles.

    The pair (a, b) becomes (a·cos − b·sin, a·sin + b·cos). It is made of dimensions i and i + D/2 in the half layout
    (Hugging Face's) and of the neighbours 2i and 2i + 1 in the interleaved one (the paper's).

    Args:
        x_BLHD: `[B, L, H, D]`, any floating type; half types are computed in fp32.
        cos_BLP, sin_BLP: tables that broadcast to `[B, L, P]`; constants, they get no gradient.

    Returns:
        `[B, L, H, D]`, the type of x.
    """
    native = cpu.rotate(x_BLHD, cos_BLP, sin_BLP, half=layout == "half")
    if native is not None:
        return native
    x = x_BLHD.to(torch.promote_types(x_BLHD.dtype, torch.float32))
    cos_BL1P, sin_BL1P = cos_BLP.to(x.dtype).unsqueeze(-2), sin_BLP.to(x.dtype).unsqueeze(-2)
    if layout == "half" and torch.compiler.is_compiling():
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos_BL1P - b * sin_BL1P, b * cos_BL1P + a * sin_BL1P), dim=-1).type_as(x_BLHD)
    if layout == "half":
        return _HalfRotation.apply(x, cos_BL1P, sin_BL1P).type_as(x_BLHD)
    # Neighbours are the real and imaginary part of one number, and the turn is a product.
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos_BL1P, sin_BL1P)
    return torch.view_as_real(turned).flatten(-2).type_as(x_BLHD)


class _HalfRotation(torch.autograd.Function):
    """Turns dimensions i and i + D/2 together.

    The gradient is turned by the negative angle, so that the backward pass costs what the forward pass does and keeps
    nothing of x. Whole heads at a time: work on half heads, 16 to 64 numbers wide, is slower on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        return swapped.mul_(torch.cat((-sin, sin), dim=-1)).addcmul_(x, torch.cat((cos, cos), dim=-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _HalfRotation.apply(grad, cos, -sin), None, None
