"""How the allocator treats freed memory on the CPU."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Numbers of mallopt's parameters and their defaults, from glibc's malloc.h and manual.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}
_NEVER = -1


@contextmanager
def reuse_freed_memory() -> Iterator[bool]:
    """Keeps freed memory in the process inside the block, where the C library is glibc; yields whether it does.

    A training step frees every activation and asks for the same sizes again in the next. By default glibc gives blocks
    of megabytes back to the kernel each time, and a step spends a tenth of its time on page faults. The peak is the
    same: what is kept is reused.
    """
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield True
    finally:
        for parameter, value in _DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
