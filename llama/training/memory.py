"""How much memory a process holds, and how the allocator treats what is freed on the CPU."""

from __future__ import annotations

import ctypes
import platform
import resource
from contextlib import AbstractContextManager

import torch

from llama.training.process import ProcessSetting

# Numbers of mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_AFTERWARDS = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""Where glibc's own rule ends up once blocks of 32 MiB have been freed; the rule itself cannot be turned on again."""


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The most this process has held so far: of an accelerator what tensors took, of the CPU its resident size."""
    if torch.device(device).type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)


def reuse_freed_memory() -> AbstractContextManager[bool]:
    """Keeps freed memory in the process inside the block, where the C library is glibc; yields whether it does.

    A training step frees every activation and asks for the same sizes again in the next. On the main thread glibc gives
    the larger ones back to the kernel each time, and a step spends a tenth of its time on page faults. The peak is the
    same: what is kept is reused.
    """
    return _SETTING.on()


def _turn_on() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    return True


def _turn_off() -> None:
    libc = ctypes.CDLL(None)
    for parameter, value in _AFTERWARDS.items():
        libc.mallopt(parameter, value)
    libc.malloc_trim(0)


_SETTING = ProcessSetting(_turn_on, _turn_off)
