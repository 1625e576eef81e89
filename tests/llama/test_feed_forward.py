"""The feed-forward network against the formulas of Shazeer, arXiv:2002.05202."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from llama.config import GATED, Activation, ModelConfig
from llama.feed_forward import FeedForward
from tests.llama.test_activation import apply

KINDS = get_args(Activation)
BETA = 1.7


def build(kind: Activation, bias: bool) -> FeedForward:
    beta = BETA if kind.startswith("swish") else 1.0
    config = ModelConfig(dim=6, num_heads=1, activation=kind, ffn_bias=bias, swish_beta=beta)
    return FeedForward(config, 5).double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_its_formula(kind: Activation, bias: bool) -> None:
    torch.manual_seed(0)
    layer = build(kind, bias)
    x = torch.randn(2, 4, 6, dtype=torch.float64)

    def project(name: str, x: Tensor) -> Tensor:
        linear = getattr(layer, name)
        assert (linear.bias is not None) == bias
        return x @ linear.weight.T + (linear.bias if bias else 0)

    # The activation is on w1, the gate: GLU is σ(xW) ⊙ xV.
    hidden = apply(kind, project("w1", x))
    if kind in GATED:
        hidden = hidden * project("w3", x)
    else:
        assert layer.w3 is None
    torch.testing.assert_close(layer(x), project("w2", hidden), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: Activation) -> None:
    torch.manual_seed(0)
    layer = build(kind, bias=True)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))
