"""The fastest that a device multiplies matrices: what a run's arithmetic is measured against (MFU)."""

from __future__ import annotations

import math
import re
import time

import torch

_DENSE_BF16_TFLOPS = {
    "GB200": 2450,
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI250X": 191.5,  # of one of its two dies, which is a device
}
"""By whole words of the device's name, the longer before the shorter: the makers' data sheets, without sparsity."""

_PRODUCT_SECONDS = 0.005


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of the device in `dtype`; None where it is not known.

    Of an accelerator the data sheet's figure, for bf16 only; of a CPU what the best of several products reached in this
    process with its threads, which takes some tens of milliseconds.
    """
    if device.type == "cpu":
        return _cpu_flops(dtype)
    return named_flops(torch.cuda.get_device_name(device)) if dtype == torch.bfloat16 else None


def named_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s by the name that CUDA gives a device, such as `NVIDIA H100 80GB HBM3`."""
    for words, tflops in _DENSE_BF16_TFLOPS.items():
        if re.search(rf"\b{words}\b", device_name):
            return tflops * 1e12
    return None


def gemm_flops(size: int, dtype: torch.dtype, device: torch.device | str = "cpu", repeats: int = 6) -> float:
    """FLOP/s of square products, the best of several. Draws nothing from the global random state."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _cpu_flops(dtype: torch.dtype) -> float:
    small = 256
    seconds = 2 * small**3 / gemm_flops(small, dtype, repeats=2)
    # Large enough for the machine's rate, and not longer than it takes to see it.
    size = min(2048, max(small, round(small * (_PRODUCT_SECONDS / seconds) ** (1 / 3) / 64) * 64))
    return gemm_flops(size, dtype)
