"""Norms against float64 formulas written from their papers."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama.config import Norm
from llama.norm import (
    BatchNorm,
    DeepNorm,
    LayerNorm,
    RMSNorm,
    batch_norms,
    batch_statistics,
    build_norm,
    deepnorm,
    update_running,
)

KINDS: tuple[Norm, ...] = get_args(Norm)


def reference(kind: Norm, x: Tensor, norm: RMSNorm | LayerNorm | BatchNorm, eps: float) -> Tensor:
    """The formulas in float64, sums written out."""
    x, weight, n = x.double(), norm.weight.double(), x.shape[-1]
    if isinstance(norm, BatchNorm):
        rows = x.reshape(-1, n)
        centred = x - rows.sum(0) / len(rows)
        variance = (centred * centred).reshape(-1, n).sum(0) / len(rows)
        return centred / (variance + eps).sqrt() * weight + norm.bias.double()
    if kind == "rmsnorm":
        return x / ((x * x).sum(-1, keepdim=True) / n + eps).sqrt() * weight
    assert isinstance(norm, LayerNorm)
    centred = x - x.sum(-1, keepdim=True) / n
    squares = (centred * centred).sum(-1, keepdim=True)
    deviation = (squares / n + eps).sqrt() if kind == "layernorm" else (squares / (n - 1)).sqrt() + eps
    return centred / deviation * weight + norm.bias.double()


def build(kind: Norm, dim: int, eps: float, dtype: torch.dtype = torch.float32) -> RMSNorm | LayerNorm | BatchNorm:
    norm = build_norm(kind, dim, eps)
    for parameter in norm.parameters():
        parameter.data.uniform_(0.5, 2)
    return norm.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_norms_equal_their_formulas(kind: Norm, grad: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16) * 3 + 2
    norm = build(kind, 16, 0.1)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(norm(x).double(), reference(kind, x, norm, 0.1), atol=2e-6, rtol=1e-5)
        norm, x = norm.double(), x.double()
        torch.testing.assert_close(norm(x), reference(kind, x, norm, 0.1), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: Norm) -> None:
    torch.manual_seed(0)
    norm = build(kind, 6, 0.1, torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in norm.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *norm.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_half_types_are_computed_in_fp32(kind: Norm, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    # In fp16 the squares of 300 overflow, and in bf16 the sum of 512 squares would lose its small terms.
    x = (torch.randn(4, 512) * 300).to(dtype)
    norm = build(kind, 512, 1e-5, weight_dtype or dtype)
    actual = norm(x)
    assert actual.dtype == dtype
    steps = 2.5 if kind == "rmsnorm" else 1.5  # RMSNorm rounds twice.
    expected = reference(kind, x, norm, 1e-5)
    torch.testing.assert_close(actual.double(), expected, rtol=steps * torch.finfo(dtype).eps / 2, atol=1e-3)


def test_rms_norm_rounds_where_llama_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64).bfloat16()
    ours, theirs = build("rmsnorm", 64, 1e-6, torch.bfloat16), LlamaRMSNorm(64, 1e-6).bfloat16()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_touch_a_full_precision_norm(kind: Norm) -> None:
    torch.manual_seed(0)
    norm = build(kind, 32, 1e-5)
    x, grad = torch.randn(5, 32, requires_grad=True), torch.randn(5, 32)
    plain = norm(x)
    expected = torch.autograd.grad(plain, (x, *norm.parameters()), grad)
    with torch.autocast("cpu", torch.bfloat16):
        cast = norm(x)
        actual = torch.autograd.grad(cast, (x, *norm.parameters()), grad)
    assert torch.equal(plain, cast)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_rms_norm_gradients_of_strided_and_single_precision_inputs() -> None:
    torch.manual_seed(0)
    norm = build("rmsnorm", 8, 1e-5)
    x = torch.randn(8, 6, 4).transpose(0, 2).requires_grad_()
    actual = torch.autograd.grad(norm(x).sum(), (x, norm.weight))
    wide = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(reference("rmsnorm", wide, norm, 1e-5).sum(), (wide, norm.weight))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-5, rtol=1e-5)


def test_constant_rows_have_finite_gradients() -> None:
    for kind in KINDS:
        x = torch.zeros(2, 4, requires_grad=True)
        (grad,) = torch.autograd.grad(build(kind, 4, 1e-5)(x).square().sum(), x)
        assert grad.isfinite().all(), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm_is_torchs(dtype: torch.dtype) -> None:
    """In training and in evaluation; the running statistics after every batch."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm(6, 0.1).to(dtype), torch.nn.BatchNorm1d(6, 0.1, dtype=dtype)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        x = (torch.randn(3, 5, 6, dtype=dtype) * 4 + 1).requires_grad_()
        grad = torch.randn_like(x)
        answers = ours(x), theirs(x.flatten(0, 1)).view_as(x)
        gradients = [
            torch.autograd.grad(y, (x, *norm.parameters()), grad)
            for y, norm in zip(answers, (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(*answers)
        torch.testing.assert_close(*gradients)
        if training:
            update_running([ours], batch_statistics([ours]))
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_batch_norm_leaks_what_comes_later_and_in_evaluation_does_not() -> None:
    norm, x = BatchNorm(4, 1e-5), torch.randn(2, 5, 4)
    later = x.clone()
    later[1, 4] += 1
    assert not torch.equal(norm(x)[:, :4], norm(later)[:, :4])
    norm.eval()
    assert torch.equal(norm(x)[0], norm(later)[0]) and torch.equal(norm(x)[1, :4], norm(later)[1, :4])


def test_a_compiled_batch_norm_leaves_its_statistics() -> None:
    torch.manual_seed(0)
    norm, x = BatchNorm(4, 1e-5), torch.randn(2, 5, 4)
    expected, statistics = norm(x), batch_statistics([norm])
    norm.batch_statistics = None
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert torch.equal(batch_statistics([norm]), statistics)


def test_a_frozen_batch_norm_takes_its_running_statistics() -> None:
    torch.manual_seed(0)
    norm, x = BatchNorm(4, 1e-5), torch.randn(2, 5, 4)
    model = torch.nn.Sequential(norm).requires_grad_(False).train()
    assert batch_norms(model) == []
    assert torch.equal(model(x), model.eval()(x))
    assert batch_norms(model.requires_grad_()) == [norm]


def test_names_and_shapes_of_the_parameters() -> None:
    assert {n: p.shape for n, p in RMSNorm(3, 1e-5).named_parameters()} == {"weight": (3,)}
    for kind in (LayerNorm, BatchNorm):
        assert {n: p.shape for n, p in kind(3, 1e-5).named_parameters()} == {"weight": (3,), "bias": (3,)}


def test_deepnorm_constants() -> None:
    # Table of arXiv:2203.00555, figure 2; logarithms instead of powers.
    assert deepnorm(encoder_layers=18).encoder == deepnorm(decoder_layers=18).decoder
    alone = deepnorm(decoder_layers=18).decoder
    assert math.isclose(math.log(alone.alpha), math.log(36) / 4)
    assert math.isclose(math.log(alone.beta), -math.log(144) / 4)
    assert deepnorm(decoder_layers=18).encoder == DeepNorm(1.0, 1.0)
    encoder, decoder = deepnorm(encoder_layers=6, decoder_layers=10)
    mixed = (4 * math.log(6) + math.log(10)) / 16
    assert math.isclose(math.log(encoder.alpha), math.log(0.81) + mixed)
    assert math.isclose(math.log(encoder.beta), math.log(0.87) - mixed)
    assert math.isclose(math.log(decoder.alpha), math.log(30) / 4)
    assert math.isclose(math.log(decoder.beta), -math.log(120) / 4)


@pytest.mark.parametrize("layers", [(0, 0), (-1, 4), (4, -1)])
def test_deepnorm_refuses_a_model_without_layers(layers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"encoder_layers={layers[0]} and decoder_layers={layers[1]}"):
        deepnorm(*layers)
