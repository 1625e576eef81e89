"""The bf16 linear kernel against float64, at shapes that fit no vector; and who is sent past it."""

import pytest
import torch
from torch.nn import functional

from llama.kernels import cpu
from llama.linear import Linear, linear, linears

needs_kernels = pytest.mark.skipif(not cpu.ready(), reason="needs a C++ compiler")


def example(rows: int, columns: int, inner: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_000 + columns * 100 + inner)
    return tuple(
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((rows, inner), (columns, inner), (columns,))
    )


@needs_kernels
@pytest.mark.parametrize("inner", [1, 2, 7, 16, 31, 32, 33, 64, 95, 160])
@pytest.mark.parametrize("columns", [1, 5, 6, 7, 12, 65])
@torch.inference_mode()
def test_products_are_those_of_float64(columns, inner):
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 32, 33):
        x, weight, bias = example(rows, columns, inner)
        for added in (None, bias):
            native = cpu.linear(x, (weight, added))
            if native is None:
                assert rows > cpu._library().linear_max_rows
                continue
            (out,) = native
            exact = functional.linear(x.double(), weight.double(), None if added is None else added.double())
            # One rounding to bf16, and that of fp32 sums where terms cancel.
            torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


@needs_kernels
@torch.inference_mode()
def test_threads_share_the_columns():
    x, weight, bias = example(5, 203, 960)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (alone,) = cpu.linear(x, (weight, bias))
        torch.set_num_threads(3)
        assert torch.equal(cpu.linear(x, (weight, bias))[0], alone)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@torch.inference_mode()
def test_a_row_of_nan_leaves_the_others_alone():
    x, weight, _ = example(7, 33, 40)
    (clean,) = cpu.linear(x, (weight, None))
    x[2, 3], x[5, 0] = torch.nan, torch.inf
    (out,) = cpu.linear(x, (weight, None))
    others = [0, 1, 3, 4, 6]
    assert torch.equal(out[others], clean[others])
    assert out[2].isnan().all() and not out[5].isfinite().any()


@needs_kernels
@torch.inference_mode()
def test_weights_changed_in_place_are_seen():
    layer = Linear(8, 4, bias=False).bfloat16()
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    layer(x)
    layer.weight.fill_(0.5)
    assert (layer(x) == 4).all()


def test_it_is_nn_linear_to_whoever_trains_saves_or_inspects():
    torch.manual_seed(3)
    plain = torch.nn.Linear(24, 10)
    torch.manual_seed(3)
    layer = Linear(24, 10)
    assert isinstance(layer, torch.nn.Linear) and list(layer.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), plain.parameters(), strict=True))
    for dtype in (torch.float32, torch.bfloat16):
        plain, layer = plain.to(dtype), layer.to(dtype)
        x = torch.randn(3, 24, dtype=dtype)
        for module in (plain, layer):
            module.zero_grad()
            module(x).square().sum().backward()
        assert torch.equal(layer(x), plain(x))
        assert torch.equal(layer.weight.grad, plain.weight.grad) and torch.equal(layer.bias.grad, plain.bias.grad)


@needs_kernels
@torch.no_grad()
def test_what_the_kernel_does_not_take_goes_to_torch():
    x, weight, bias = example(4, 6, 32)
    assert cpu.linear(x, (weight, bias)) is not None
    declined = {
        "fp32": (x.float(), weight.float(), bias.float()),
        "mixed types": (x, weight, bias.float()),
        "transposed weights": (x, weight.T.contiguous().T, bias),
        "strided rows": (torch.cat((x, x), dim=1)[:, :32], weight, bias),
        "no rows": (x[:0], weight, bias),
        "many rows": (x.repeat(cpu._library().linear_max_rows, 1), weight, bias),
        "meta": (x.to("meta"), weight.to("meta"), bias.to("meta")),
        "subclass": (x, torch.nn.Buffer(weight).as_subclass(Special), bias),
    }
    for name, (rows, *layer) in declined.items():
        assert cpu.linear(rows, tuple(layer)) is None, name
        assert cpu.linear(rows, (weight, bias), tuple(layer)) is None, name
    assert linear(x[:0], weight, bias).shape == (0, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu.linear(x, (weight, bias)) is None
    with torch.enable_grad():
        assert cpu.linear(x, (weight, bias)) is None
    with cpu.switched_off():
        assert cpu.linear(x, (weight, bias)) is None and not cpu.ready()


@torch.no_grad()
def test_several_layers_at_once_are_each_one_alone():
    torch.manual_seed(1)
    layers = [Linear(24, size, bias=size == 7).bfloat16() for size in (7, 9, 1)]
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)

    def check() -> None:
        outs = linears(x, *layers)
        assert all(torch.equal(out, layer(x)) for out, layer in zip(outs, layers, strict=True))

    check()
    seen = []
    hook = layers[1].register_forward_hook(lambda layer, inputs, out: seen.append(out))
    check()
    assert len(seen) == 2, "a hook must not be passed over"
    hook.remove()
    layers[2] = torch.nn.Linear(24, 5).bfloat16()
    check()


class Special(torch.Tensor):
    """As sharded and traced tensors are."""
