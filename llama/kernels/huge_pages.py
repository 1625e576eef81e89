"""Memory of a CPU in huge pages: a step reads all weights, and finding the pages of 4 KiB they lie in takes as long as
reading them.

Measured on one core of an Intel Xeon with the weights in memory, not in a cache: a linear layer of one row reads 14.1
instead of 11.3 GB/s, of eight rows 10.8 instead of 8.4.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor, nn

_HUGE_BYTES = 2 << 20
_ALIGNMENT = 64
"""Of a weight, as torch's own allocator has it."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`; on a CPU, where the system knows them, in huge pages."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < _HUGE_BYTES or not _supported():
        return torch.zeros(shape, dtype=dtype, device=device)
    return _region(num_bytes)[:num_bytes].view(dtype).view(shape)


def move_parameters(module: nn.Module) -> None:
    """Moves a module's parameters into huge pages, one after the other; their values and names stay.

    Parameters that are not plain dense tensors of a CPU stay where they are, and all where there are no huge pages.
    """
    parameters = [
        parameter
        for parameter in module.parameters()
        if type(parameter) is nn.Parameter and parameter.is_cpu and parameter.layout == torch.strided
    ]
    sizes = [-(-parameter.numel() * parameter.element_size() // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
    if sum(sizes) < _HUGE_BYTES or not _supported():
        return
    region, start = _region(sum(sizes)), 0
    for parameter, size in zip(parameters, sizes, strict=True):
        moved = region[start : start + parameter.numel() * parameter.element_size()]
        moved = moved.view(parameter.dtype).view(parameter.shape)
        moved.copy_(parameter.data)
        parameter.data = moved
        start += size


def _supported() -> bool:
    return hasattr(mmap, "MADV_HUGEPAGE")


def _region(num_bytes: int) -> Tensor:
    """So many zero bytes and more, from the beginning of a huge page on; freed with the last tensor of them."""
    memory = mmap.mmap(-1, num_bytes + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A wish: a system that has none to give, or is told not to, gives small ones.
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _HUGE_BYTES :]
