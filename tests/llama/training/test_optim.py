import math

import pytest
import torch

from llama.config import ModelConfig, MoEConfig
from llama.model import Transformer
from llama.training.config import OptimizerConfig
from llama.training.optim import (
    build_optimizer,
    clip_coefficient,
    local_square_sum,
    optimizer_tensors,
    scale_gradients,
)


def tiny_model(**settings) -> Transformer:
    model = Transformer(
        ModelConfig(
            vocab_size=50, dim=16, num_layers=1, num_heads=2, multiple_of=8, moe=MoEConfig(num_experts=2), **settings
        )
    )
    model.init_weights(0)
    return model


def test_norms_and_embeddings_do_not_decay_and_everything_is_optimized_once():
    model = tiny_model(tie_embeddings=False)
    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    by_name = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    without = {"tok_embeddings.weight", "norm.weight", "layers.0.attention_norm.weight", "layers.0.ffn_norm.weight"}
    assert {name for name, value in by_name.items() if value == 0.0} == without
    assert set(by_name.values()) == {0.0, 0.1}


def test_two_steps_follow_the_adamw_formula():
    model = tiny_model()
    config = OptimizerConfig(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    weight = model.layers[0].attention.wq.weight
    expected, m, v = weight.detach().double().clone(), 0.0, 0.0
    for step in (1, 2):
        for seed, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + seed)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradient = weight.grad.double()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        expected *= 1 - 1e-2 * 0.1
        expected -= 1e-2 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_state_exists_before_the_first_step_and_keeps_its_names():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    before = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = optimizer_tensors(model, optimizer)
    assert before.keys() == after.keys()
    assert len(after) == 3 * len(list(model.parameters()))
    assert after["layers.0.feed_forward.experts.w2.step"] == 1
    assert all(tensor.count_nonzero() == 0 for tensor in before.values())


def test_clipping_matches_torch_on_a_whole_model():
    model, reference = tiny_model(), tiny_model()
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        parameter.grad = torch.full_like(parameter, 0.3)
        other.grad = parameter.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    gradients = [parameter.grad for parameter in model.parameters()]
    norm = local_square_sum(gradients, 1).sqrt().item()
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    scale_gradients(gradients, clip_coefficient(norm, 1.0))
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=0)


def test_clip_coefficient_bounds():
    assert clip_coefficient(4.0, 1.0) == 0.25
    assert clip_coefficient(0.5, 1.0) == clip_coefficient(1.0, 1.0) == clip_coefficient(100.0, 0.0) == 1.0
    assert clip_coefficient(math.inf, 1.0) == 0.0
