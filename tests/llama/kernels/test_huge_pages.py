import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from llama.kernels import huge_pages


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes of huge pages in the mapping that holds the tensor."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            low, high = (int(part, 16) for part in fields[0].split("-"))
            inside = low <= tensor.data_ptr() < high
        elif inside and fields[0] == "AnonHugePages:":
            return int(fields[1]) * 1024
    return 0


def test_zeros_are_zero_writable_and_start_on_a_huge_page():
    x = huge_pages.zeros((2, 3 << 20), torch.bfloat16, torch.device("cpu"))
    assert x.shape == (2, 3 << 20) and x.dtype == torch.bfloat16 and x.is_contiguous()
    assert not x.any() and x.data_ptr() % (2 << 20) == 0
    x.fill_(2)
    assert (x == 2).all()
    small = huge_pages.zeros((3,), torch.float32, torch.device("cpu"))
    assert small.tolist() == [0, 0, 0]
    chosen = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if chosen.exists() and "[never]" not in chosen.read_text():
        assert huge_bytes(x) >= 2 << 20


@pytest.mark.parametrize("known", [True, False])
def test_parameters_move_and_stay_what_they_are(known, monkeypatch):
    if not known:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(700, 800), nn.LayerNorm(800), nn.Linear(800, 701)).to(torch.bfloat16)
    module[2].bias.requires_grad_(False)
    parameters = dict(module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    addresses = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    huge_pages.move_parameters(module)
    for name, parameter in module.named_parameters():
        assert parameter is parameters[name] and torch.equal(parameter, before[name])
        assert (parameter.data_ptr() != addresses[name]) == known
        assert parameter.data_ptr() % 64 == 0 or not known
    assert not module[2].bias.requires_grad and module[0].weight.requires_grad
    # Nobody's bytes are another's.
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.fill_(number)
    assert [set(parameter.unique().tolist()) for parameter in module.parameters()] == [{n} for n in range(6)]


def test_what_is_no_plain_parameter_of_a_cpu_is_left_alone():
    module = nn.Linear(2000, 2000, device="meta")
    huge_pages.move_parameters(module)
    assert module.weight.is_meta
