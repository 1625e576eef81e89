"""The CPU kernels (C++, llama/kernels/native.py) over torch tensors.

Each function computes and returns its result, or returns None when the case is not for it: there are no kernels, or
gradients, autocast, a compiler's tracing, another device, type or layout are in play. The caller then computes the
same in plain torch, so nothing is ever refused. They read plain dense tensors by address, the weights anew every time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from llama.kernels import native

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}


class _Library:
    """The library's functions with their types."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded
        self.linear_bf16 = self._function("linear_bf16", [c_void_p] * 4 + [c_long] * 3 + [c_int])
        attention = [c_void_p] * 7 + [c_long, c_void_p] + [c_long] * 5 + [c_float, c_float, c_long, c_int]
        self.attention, self.rms_norm, self.rotate, self.silu_product = (
            {dtype: self._function(f"{name}_{suffix}", arguments) for dtype, suffix in _SUFFIXES.items()}
            for name, arguments in (
                ("attention", attention),
                ("rms_norm", [*[c_void_p] * 3, c_long, c_long, c_float, c_int]),
                ("rotate", [*[c_void_p] * 4, c_long, c_long, c_long, c_int, c_int]),
                ("silu_product", [*[c_void_p] * 3, c_long, c_int]),
            )
        )
        self.linear_max_rows: int = self._function("linear_max_rows", [], c_long)()

    def _function(self, name: str, arguments: Sequence[type], result: type | None = None) -> Callable:
        function = getattr(self._loaded, name)
        function.argtypes, function.restype = arguments, result
        return function


_switched_off = 0


@contextmanager
def switched_off() -> Iterator[None]:
    """All threads compute in plain torch meanwhile: to compare the two."""
    global _switched_off
    _switched_off += 1
    try:
        yield
    finally:
        _switched_off -= 1


@cache
def _library() -> _Library | None:
    loaded = native.library()
    return None if loaded is None else _Library(loaded)


def ready() -> bool:
    """Whether there are kernels; compiles them if they were not yet."""
    return not _switched_off and _library() is not None


def _kernels() -> _Library | None:
    """The kernels, if this thread wants nothing of torch but the numbers."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or _switched_off:
        return None
    return _library()


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether it is dense, contiguous and on the CPU; no subclass, as sharded and traced ones are."""
    kind = type(tensor)
    return (kind is Tensor or kind is Parameter) and tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()


def _threads(operations: int) -> int:
    """As many as torch would use, but none for less than takes it some microseconds."""
    return min(torch.get_num_threads(), 1 + operations // 100_000)


def linear(x: Tensor, *layers: tuple[Tensor, Tensor | None]) -> list[Tensor] | None:
    """`[..., in]` → `[..., out]` of every layer, by its weight and bias; bf16 and few enough rows, summed in fp32."""
    bf16 = torch.bfloat16
    if x.dtype != bf16 or (kernels := _kernels()) is None or not _plain(x, bf16):
        return None
    for weight, bias in layers:
        if not _plain(weight, bf16) or (bias is not None and not _plain(bias, bf16)):
            return None
    *batch, inner = x.shape
    rows = x.numel() // inner if inner else 0
    if not 1 <= rows <= kernels.linear_max_rows:
        return None
    address, results = x.data_ptr(), []
    for weight, bias in layers:
        columns = weight.shape[0]
        threads = _threads(rows * inner * columns)
        out = x.new_empty(*batch, columns)
        bias_address = None if bias is None else bias.data_ptr()
        kernels.linear_bf16(address, weight.data_ptr(), bias_address, out.data_ptr(), rows, columns, inner, threads)
        results.append(out)
    return results


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """`[..., dim]` → `[..., dim]`: llama.norm.RMSNorm."""
    dtype = x.dtype
    if dtype not in _SUFFIXES or (kernels := _kernels()) is None or not (_plain(x, dtype) and _plain(weight, dtype)):
        return None
    dim, out = weight.numel(), torch.empty_like(x)
    if dim:
        threads = _threads(4 * x.numel())
        kernels.rms_norm[dtype](x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // dim, dim, eps, threads)
    return out


def rotate(x_BLHD: Tensor, cos_BLP: Tensor, sin_BLP: Tensor, half: bool) -> Tensor | None:
    """`[B, L, H, D]` → the same: llama.rope.apply_rotary, with a table row for every token."""
    dtype = x_BLHD.dtype
    if dtype not in _SUFFIXES or (kernels := _kernels()) is None or not _plain(x_BLHD, dtype):
        return None
    batch, length, heads, dim = x_BLHD.shape
    if cos_BLP.shape != (batch, length, dim // 2) or cos_BLP.shape != sin_BLP.shape:
        return None
    if not (_plain(cos_BLP, torch.float32) and _plain(sin_BLP, torch.float32)):
        return None
    out = torch.empty_like(x_BLHD)
    kernels.rotate[dtype](
        x_BLHD.data_ptr(),
        cos_BLP.data_ptr(),
        sin_BLP.data_ptr(),
        out.data_ptr(),
        batch * length,
        heads,
        dim // 2,
        half,
        _threads(4 * x_BLHD.numel()),
    )
    return out


def silu_product(gate: Tensor, up: Tensor) -> Tensor | None:
    """silu(gate) ⊙ up, both of one shape."""
    dtype = gate.dtype
    if dtype not in _SUFFIXES or (kernels := _kernels()) is None or not (_plain(gate, dtype) and _plain(up, dtype)):
        return None
    if gate.shape != up.shape:
        return None
    out = torch.empty_like(gate)
    kernels.silu_product[dtype](
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), _threads(10 * gate.numel())
    )
    return out


def paged_attention(
    keys_PGD: Tensor,
    values_PGD: Tensor,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    tables_NW: np.ndarray,
    spans_N3: np.ndarray,
    block_size: int,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor | None:
    """Stores a step's keys and values in the cache and attends to them: `[T, H, D]`.

    Args:
        tables_NW: int32, each sequence's blocks; entries for positions that it does not see are not read.
        spans_N3: int32, each sequence's first row of T, and its first and last + 1 position of the step.
    """
    dtype = q_THD.dtype
    if dtype not in _SUFFIXES or (kernels := _kernels()) is None:
        return None
    if not all(_plain(tensor, dtype) for tensor in (keys_PGD, values_PGD, q_THD, k_TGD, v_TGD)):
        return None
    out_THD = torch.empty_like(q_THD)
    kernels.attention[dtype](
        keys_PGD.data_ptr(),
        values_PGD.data_ptr(),
        q_THD.data_ptr(),
        k_TGD.data_ptr(),
        v_TGD.data_ptr(),
        out_THD.data_ptr(),
        tables_NW.ctypes.data,
        tables_NW.shape[1],
        spans_N3.ctypes.data,
        len(spans_N3),
        block_size,
        *q_THD.shape[1:2],
        *k_TGD.shape[1:],
        scale,
        softcap or 0.0,
        window or 0,
        _threads(q_THD.numel() * tables_NW.shape[1] * block_size),
    )
    return out_THD
