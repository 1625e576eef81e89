"""The mixture of experts against a loop over tokens in float64, forward and backward."""

import math

import pytest
import torch

from llama.config import ModelConfig, MoEConfig
from llama.moe import Experts, MoE, RoutingRecord

EXPERTS, DIM = 4, 16
FUNCTIONS = {
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "glu": lambda x: 1 / (1 + torch.exp(-x)),
    "reglu": lambda x: x.clamp(min=0),
    "geglu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}
SETTINGS = {
    "top 1": {"top_k": 1},
    "shared": {"num_shared_experts": 2},
    "shared of another size": {"num_shared_experts": 2, "shared_hidden_dim": 24},
    "shared and gated": {"num_shared_experts": 1, "shared_gate": True},
    "not normalised": {"normalize_top_k": False},
    "scaled": {"route_scale": 2.5},
    "sigmoid": {"score": "sigmoid", "top_k": 3, "route_scale": 1.5},
    "sigmoid, not normalised": {"score": "sigmoid", "normalize_top_k": False},
    "capacity": {"capacity_factor": 0.6},
    "capacity above all": {"capacity_factor": 4.0},
}
BIASES = {"free": (0, 0, 0, 0), "idle expert": (0, 0, 0, -9), "favourite expert": (9, 0, 0, 0)}
PATHS = {"grouped": (16, torch.float32), "looped": (13, torch.float64)}


def build(expert_hidden_dim=16, activation="swiglu", swish_beta=1.0, ffn_bias=False, **moe_settings) -> MoE:
    moe = MoEConfig(num_experts=EXPERTS, expert_hidden_dim=expert_hidden_dim, **moe_settings)
    config = ModelConfig(dim=DIM, num_heads=2, activation=activation, swish_beta=swish_beta, ffn_bias=ffn_bias, moe=moe)
    layer = MoE(config, layer=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return layer


def feed_forward(function, token, w1, w3, w2, b1=0.0, b3=0.0, b2=0.0):
    hidden = function(w1 @ token + b1)
    return w2 @ (hidden if w3 is None else hidden * (w3 @ token + b3)) + b2


def shared_answer(layer, function, token):
    names = ("w1", "w3", "w2") if layer.shared.w3 is not None else ("w1", None, "w2")
    linears = [getattr(layer.shared, name) if name else None for name in names]
    weights = [None if linear is None else linear.weight.double() for linear in linears]
    biases = [0.0 if linear is None or linear.bias is None else linear.bias.double() for linear in linears]
    answer = feed_forward(function, token, *weights, *biases)
    if layer.shared_gate is None:
        return answer
    return answer / (1 + torch.exp(-(layer.shared_gate.weight.double() @ token)))


def reference(layer, settings, x_TM, function=FUNCTIONS["swiglu"]):
    """Every token on its own; returns the answers and the pairs that each expert was asked for."""
    router, experts, top_k = layer.router, layer.experts, settings.get("top_k", 2)
    factor = settings.get("capacity_factor") if layer.training else None
    room = [math.inf if factor is None else math.ceil(factor * len(x_TM) * top_k / EXPERTS)] * EXPERTS
    asked = [0] * EXPERTS
    answers = []
    for token in x_TM.double():
        logits = router.weight.double() @ token
        exps = logits.exp()
        scores = exps / (1 + exps) if settings.get("score") == "sigmoid" else exps / exps.sum()
        order = sorted(range(EXPERTS), key=lambda e, s=scores: -(s[e].item() + router.expert_bias[e].item()))[:top_k]
        weights = {e: scores[e] for e in order}
        if settings.get("normalize_top_k", True):
            weights = {e: scores[e] / sum(scores[i] for i in order) for e in order}
        answer = torch.zeros_like(token)
        for e in order:
            asked[e] += 1
            if room[e] == 0:
                continue
            room[e] -= 1
            w1, w2 = experts.w1[e].double(), experts.w2[e].double()
            w3 = None if experts.w3 is None else experts.w3[e].double()
            scale = settings.get("route_scale", 1.0)
            answer = answer + scale * weights[e] * feed_forward(function, token, w1, w3, w2)
        if layer.shared is not None:
            answer = answer + shared_answer(layer, function, token)
        answers.append(answer)
    return torch.stack(answers), asked


def assert_equals_reference(layer, settings, dtype, function=FUNCTIONS["swiglu"]):
    layer.to(dtype)
    x = torch.randn(2, 9, DIM, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    record = RoutingRecord()
    out = layer(x, record)
    expected, asked = reference(layer, settings, x.flatten(0, 1), function)
    assert record.layers[1].counts_E.tolist() == asked
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-10}
    torch.testing.assert_close(out.double(), expected.view(2, 9, DIM), **tolerance)

    cotangent = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    inputs = [x, *layer.parameters()]
    actual_grads = torch.autograd.grad(out, inputs, cotangent)
    expected_grads = torch.autograd.grad(expected.view_as(out), inputs, cotangent.double(), materialize_grads=True)
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, **tolerance)
    return asked


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_a_loop_over_tokens(name, bias, path):
    hidden, dtype = PATHS[path]
    settings = SETTINGS[name]
    layer = build(hidden, **settings)
    layer.router.expert_bias.copy_(torch.tensor(BIASES[bias]))
    asked = assert_equals_reference(layer, settings, dtype)
    if bias == "idle expert":
        assert asked[3] == 0
    if bias == "favourite expert":
        assert asked[0] == 18


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_experts_take_every_activation(activation):
    settings = {"num_shared_experts": 1, "shared_gate": True}
    layer = build(activation=activation, ffn_bias=True, **settings)
    assert (layer.experts.w3 is not None) == activation.endswith("glu")
    assert_equals_reference(layer, settings, torch.float64, FUNCTIONS[activation])


@pytest.mark.parametrize("activation", ["swish", "swish_learned"])
def test_experts_take_swish_with_its_beta(activation):
    layer = build(activation=activation, swish_beta=1.7)
    if activation == "swish_learned":
        beta = layer.experts.activation.beta
        torch.nn.init.constant_(beta, 0.6)
        assert_equals_reference(layer, {}, torch.float64, lambda x: x / (1 + torch.exp(-beta.double() * x)))
    else:
        assert_equals_reference(layer, {}, torch.float64, lambda x: x / (1 + torch.exp(-1.7 * x)))


def test_capacity_drops_the_later_tokens_and_only_in_training():
    settings = {"top_k": 1, "capacity_factor": 1.0}
    layer = build(**settings)
    layer.router.expert_bias[2] = 9
    x = torch.randn(1, 10, DIM)
    record = RoutingRecord()
    out = layer(x, record)
    assert record.layers[1].counts_E.tolist() == [0, 0, 10, 0]
    kept = (out[0] != 0).any(-1)
    assert kept.tolist() == [True] * 3 + [False] * 7  # ceil(1.0 · 10 · 1 / 4)
    layer.eval()
    assert (layer(x)[0] != 0).any(-1).all()
    torch.testing.assert_close(layer(x)[0, :3], out[0, :3])


@pytest.mark.parametrize("activation", ["swiglu", "relu", "swish_learned"])
def test_router_is_fp32_under_autocast(activation):
    layer = build(activation=activation, num_shared_experts=1, shared_gate=True)
    x = torch.randn(2, 16, DIM)
    plain = layer.router(x[0])
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer.router(x[0])
        half_input = layer.router(x[0].bfloat16())
        answer = layer(x)
    for a, b, c in zip(plain, under_autocast, half_input, strict=True):
        assert torch.equal(a, b)
        assert c.dtype == a.dtype
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), layer(x), atol=0.06, rtol=0.06)
    answer.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_a_sum_can_be_differentiated():
    """Its gradient is one number expanded, which grouped GEMM cannot read."""
    layer = build()
    layer(torch.randn(1, 5, DIM)).sum().backward()
    assert layer.experts.w2.grad.abs().sum() > 0


def test_sigmoid_probabilities_are_affinities_over_their_sum():
    layer = build(score="sigmoid").double()
    x = torch.randn(2, 3, DIM, dtype=torch.float64)
    record = RoutingRecord()
    layer(x, record)
    routing = record.layers[1]
    affinities = 1 / (1 + torch.exp(-(x.flatten(0, 1) @ layer.router.weight.T)))
    torch.testing.assert_close(routing.probabilities_TE, affinities / affinities.sum(-1, keepdim=True))
    assert (routing.top_k, routing.num_sequences) == (2, 2)


def test_a_model_that_is_not_asked_keeps_no_statistics():
    layer = build()
    layer(torch.randn(1, 3, DIM))
    assert not [name for name in vars(layer) if "record" in name or "count" in name]


def test_a_dense_config_is_refused():
    for build_part in (lambda config: MoE(config, layer=0), Experts):
        with pytest.raises(ValueError, match="model.moe is absent"):
            build_part(ModelConfig(dim=DIM, num_heads=2))


def test_without_gradients_bf16_experts_compute_the_same():
    """Then a CPU's own kernel multiplies, expert by expert; one of them is idle."""
    torch.manual_seed(0)
    config = ModelConfig(dim=DIM, num_heads=2, moe=MoEConfig(num_experts=EXPERTS, expert_hidden_dim=24))
    experts = Experts(config).bfloat16()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x_RM, counts_E = torch.randn(9, DIM, dtype=torch.bfloat16), torch.tensor([4, 0, 1, 4])
    with_gradients = experts(x_RM, counts_E)
    with torch.inference_mode():
        torch.testing.assert_close(experts(x_RM, counts_E), with_gradients.detach(), rtol=2**-5, atol=0.5)
