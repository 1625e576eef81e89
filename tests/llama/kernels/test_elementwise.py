"""Norm, rotation and gate in one pass give what their torch twins give, to the last bit in bf16 but for rare ties."""

import pytest
import torch

from llama.activation import build_activation, gated_product
from llama.kernels import cpu
from llama.norm import RMSNorm
from llama.rope import apply_rotary, rotary_cos_sin, rotary_frequencies

pytestmark = pytest.mark.skipif(not cpu.ready(), reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


def compare(function, native) -> None:
    """`function` by the kernel and by torch; `native` says whether the kernel took it."""
    with torch.inference_mode():
        assert native() is not None
        ours = function()
        with cpu.switched_off():
            theirs = function()
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)
    else:
        # A last bit may differ where two fp32 results, with a fused multiply-add and without, straddle the middle
        # between two numbers of bf16.
        torch.testing.assert_close(ours, theirs, atol=1e-30, rtol=2**-7)
        assert ((ours - theirs).abs() > 1e-30).float().mean() < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 5, 32, 63, 512])
def test_rms_norm(dim, dtype):
    norm = RMSNorm(dim, 1e-5).to(dtype)
    torch.manual_seed(dim)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(2, 9, dim) * torch.logspace(-6, 4, 9)[:, None]).to(dtype)
    compare(lambda: norm(x), lambda: cpu.rms_norm(x, norm.weight, norm.eps))
    with torch.inference_mode():
        x[0, 3] = torch.nan
        rows = norm(x).isnan().all(dim=-1)
        assert rows[0, 3] and rows.sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("head_dim", [2, 6, 32, 64, 80])
def test_rotation(head_dim, layout, dtype):
    torch.manual_seed(head_dim)
    x = torch.randn(2, 7, 3, head_dim).to(dtype)
    positions = torch.randint(0, 5000, (2, 7))
    cos, sin = rotary_cos_sin(positions, rotary_frequencies(head_dim, 1e4)[0])
    compare(lambda: apply_rotary(x, cos, sin, layout), lambda: cpu.rotate(x, cos, sin, layout == "half"))
    with torch.inference_mode():
        # One row of angles for several rows of tokens.
        assert cpu.rotate(x, cos[:1], sin[:1], layout == "half") is None
        assert (
            torch.equal(
                apply_rotary(x, cos[:1], sin[:1], layout),
                apply_rotary(x, cos[:1].repeat(2, 1, 1), sin[:1].repeat(2, 1, 1), layout),
            )
            or dtype == torch.float32
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 31, 64, 1000])
def test_gate(count, dtype):
    torch.manual_seed(count)
    gate, up = (torch.randn(3, count) * 20).to(dtype), torch.randn(3, count).to(dtype)
    gate[0, 0], gate[1, 0], gate[2, 0] = 300.0, -300.0, 0.0
    silu = build_activation("swiglu")
    compare(lambda: gated_product(silu, gate, up), lambda: cpu.silu_product(gate, up))
    with torch.inference_mode():
        gate[1, 0] = torch.nan
        assert gated_product(silu, gate, up).isnan().nonzero().tolist() == [[1, 0]]


def test_gradients_go_by_torch():
    norm = RMSNorm(8, 1e-5).bfloat16()
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    assert cpu.rms_norm(x, norm.weight, 1e-5) is None and cpu.silu_product(x, x) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_the_rows(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 301, 4, 64).to(dtype), torch.randn(64).to(dtype)
    cos, sin = rotary_cos_sin(torch.arange(301)[None], rotary_frequencies(64, 1e4)[0])
    functions = [
        lambda: cpu.rms_norm(x, weight, 1e-5),
        lambda: cpu.rotate(x, cos, sin, True),
        lambda: cpu.rotate(x, cos, sin, False),
        lambda: cpu.silu_product(x, x),
    ]
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            alone = [function() for function in functions]
            torch.set_num_threads(3)
            assert all(torch.equal(function(), result) for function, result in zip(functions, alone, strict=True))
    finally:
        torch.set_num_threads(threads)
