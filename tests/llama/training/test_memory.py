import platform
import resource

import pytest
import torch

from llama.training.memory import reuse_freed_memory


def page_faults() -> int:
    """Of taking and freeing 256 MiB, in blocks of 32."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_stays_in_the_process_inside_the_block_only() -> None:
    with reuse_freed_memory() as does:
        page_faults()
        inside = page_faults()
    outside = page_faults()
    assert does and inside < outside / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    with reuse_freed_memory() as does:
        assert not does
