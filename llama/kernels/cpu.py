"""The CPU kernels (C++, llama/kernels/native.py) over torch tensors.

Each function computes and returns its result, or returns None when the case is not for it: there are no kernels, or
gradients, autocast, a compiler's tracing, another device, type or layout are in play. The caller then computes the
same in plain torch, so nothing is ever refused. They read plain dense tensors by address, the weights anew every time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_int, c_long, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

from llama.kernels import native


class _Library:
    """The library's functions with their types."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded
        self.linear_bf16 = self._function("linear_bf16", [c_void_p] * 4 + [c_long] * 3 + [c_int])
        self.linear_max_rows: int = self._function("linear_max_rows", [], c_long)()

    def _function(self, name: str, arguments: list[type], result: type | None = None) -> Callable:
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
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _switched_off:
        return None
    return _library()


def _plain(*tensors: Tensor) -> bool:
    """Whether they are dense, contiguous, on the CPU and of one type; no subclass, as sharded or traced ones are."""
    dtype = tensors[0].dtype
    return all(
        type(tensor) in (Tensor, Parameter) and tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous()
        for tensor in tensors
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`[..., in]` → `[..., out]` in bf16, of few enough rows; summed in fp32."""
    if x.dtype != torch.bfloat16 or (kernels := _kernels()) is None:
        return None
    columns, inner = weight.shape
    rows = x.numel() // inner if inner else 0
    if not 1 <= rows <= kernels.linear_max_rows or not _plain(x, weight, *(() if bias is None else (bias,))):
        return None
    out = x.new_empty(*x.shape[:-1], columns)
    bias_address = None if bias is None else bias.data_ptr()
    kernels.linear_bf16(
        x.data_ptr(), weight.data_ptr(), bias_address, out.data_ptr(), rows, columns, inner, torch.get_num_threads()
    )
    return out
