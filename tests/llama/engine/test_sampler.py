import math
import random

import numpy as np
import pytest
import torch

from llama.engine.params import SamplingParams
from llama.engine.sampler import SampleInputs, token_logprobs
from llama.engine.sampler import sample as sample_rows


def sample(logits_NV: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    rows = [SampleInputs(param, uniform) for param, uniform in zip(params, uniforms, strict=True)]
    return sample_rows(logits_NV, rows).tolist()


def reference_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """float64, one row, by the definitions."""
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if params.top_k:
        order = order[: params.top_k]
    total = sum(weights[token] for token in order)
    nucleus, mass = [], 0.0
    for token in order:
        if mass >= params.top_p and params.top_p < 1:
            break
        nucleus.append(token)
        mass += weights[token] / total
    distribution = np.zeros(len(weights))
    distribution[nucleus] = weights[nucleus]
    return distribution / distribution.sum()


def draw(logits_V: torch.Tensor, params: SamplingParams, count: int, seed: int) -> np.ndarray:
    rng = random.Random(seed)
    tokens = sample(logits_V.expand(count, -1), [params] * count, [rng.random() for _ in range(count)])
    return np.bincount(tokens, minlength=len(logits_V))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=1.3, top_k=8, top_p=0.8),
        SamplingParams(temperature=1.0, top_p=1e-6),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_k=1000),
    ],
    ids=lambda params: f"t{params.temperature}k{params.top_k}p{params.top_p}",
)
def test_samples_follow_the_distribution(params):
    logits_V = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 2
    expected = reference_distribution(logits_V.numpy(), params)
    count = 20_000
    observed = draw(logits_V, params, count, seed=7)
    assert (observed[expected == 0] == 0).all()
    likely = expected * count >= 5
    chi_squared = (((observed - expected * count) ** 2)[likely] / (expected * count)[likely]).sum()
    degrees = max(1, likely.sum() - 1)
    # Five standard deviations above the mean of a chi-squared variable.
    assert chi_squared < degrees + 5 * math.sqrt(2 * degrees)


def test_greedy_takes_the_largest_beside_sampled_rows():
    logits_NV = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    params = [SamplingParams(temperature=0 if row % 2 else 1.0) for row in range(6)]
    tokens = sample(logits_NV, params, [0.999] * 6)
    assert tokens[1::2] == logits_NV.argmax(dim=-1).tolist()[1::2]


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(3)
    logits_NV = torch.randn(40, 200, generator=generator) * 3
    rng = random.Random(4)
    choices = [{}, {"temperature": 0.0}, {"temperature": 0.3, "top_k": 3}, {"top_p": 0.5}, {"top_k": 50, "top_p": 0.9}]
    params = [SamplingParams(**rng.choice(choices)) for _ in range(40)]
    uniforms = [rng.random() for _ in range(40)]
    together = sample(logits_NV, params, uniforms)
    alone = [sample(logits_NV[row : row + 1], [params[row]], [uniforms[row]])[0] for row in range(40)]
    assert together == alone


def test_extreme_inputs_stay_inside_the_support():
    logits_V = torch.tensor([-torch.inf, 1.0, 3.0, 1.0, -torch.inf, -torch.inf])
    largest = math.nextafter(1.0, 0.0)
    for uniform in (0.0, 0.5, largest):
        assert sample(logits_V[None], [SamplingParams()], [uniform])[0] in (1, 2, 3)
        for temperature in (1e-30, 1e-300):
            assert sample(logits_V[None], [SamplingParams(temperature=temperature)], [uniform]) == [2]
    assert sample(logits_V[None].bfloat16(), [SamplingParams(top_p=0.9)], [0.4]) == [2]


def test_logprobs_are_the_models_own():
    logits_NV = torch.randn(3, 30, generator=torch.Generator().manual_seed(5)) * 4
    params = [SamplingParams(temperature=0.1, logprobs=4), SamplingParams(), SamplingParams(top_k=1, logprobs=0)]
    first, none, last = token_logprobs(logits_NV, torch.tensor([3, 4, 5]), [param.logprobs for param in params])
    assert none is None and first is not None and last is not None
    exact = logits_NV.double().log_softmax(dim=-1)
    assert first.token_id == 3 and first.logprob == pytest.approx(exact[0, 3].item(), abs=1e-5)
    best = exact[0].argsort(descending=True)[:4].tolist()
    assert list(first.top) == best
    assert list(first.top.values()) == pytest.approx([exact[0, token].item() for token in best], abs=1e-5)
    assert last.top == {} and last.logprob == pytest.approx(exact[2, 5].item(), abs=1e-5)
