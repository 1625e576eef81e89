import math
import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama.engine.constraint import ConstraintCompiler
from llama.engine.params import SamplingParams
from llama.engine.sampler import SampleInputs, token_logprobs
from llama.engine.sampler import sample as sample_rows
from tests.llama.engine.models import ByteTokenizer


def sample(logits_NV: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    rows = [SampleInputs(param, uniform) for param, uniform in zip(params, uniforms, strict=True)]
    return sample_rows(logits_NV, rows).tolist()


def reference_distribution(logits: np.ndarray, row: SampleInputs, allowed: set[int] | None = None) -> np.ndarray:
    """float64, one row, by the definitions."""
    params = row.params
    scores = logits.astype(np.float64)
    if allowed is not None:
        scores[[token for token in range(len(scores)) if token not in allowed]] = -np.inf
    scores[list(row.forbidden_ids)] = -np.inf
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in {*row.prompt_ids, *row.output_ids}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token in set(row.output_ids):
        scores[token] -= row.output_ids.count(token) * params.frequency_penalty + params.presence_penalty
    if params.greedy:
        return np.eye(len(scores))[scores.argmax()]
    weights = np.exp((scores - scores.max()) / params.temperature)
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
    kept = [token for token in nucleus if weights[token] >= params.min_p * weights.max()]
    distribution = np.zeros(len(weights))
    distribution[kept] = weights[kept]
    return distribution / distribution.sum()


def draw(logits_V: torch.Tensor, row: SampleInputs, count: int, seed: int) -> np.ndarray:
    rng = random.Random(seed)
    rows = [replace(row, uniform=rng.random()) for _ in range(count)]
    return np.bincount(sample_rows(logits_V.expand(count, -1), rows).tolist(), minlength=len(logits_V))


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
        SamplingParams(temperature=1.5, min_p=0.1),
        SamplingParams(temperature=1.5, top_k=9, top_p=0.9, min_p=0.1),
        SamplingParams(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=-0.4),
        SamplingParams(temperature=0.8, logit_bias={0: 3.0, 1: -100.0}, min_p=0.02),
    ],
    ids=lambda params: ",".join(
        f"{field.name}={getattr(params, field.name)}"
        for field in fields(params)
        if getattr(params, field.name) != getattr(SamplingParams(), field.name)
    ),
)
def test_samples_follow_the_distribution(params):
    logits_V = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 2
    row = SampleInputs(params, prompt_ids=[1, 2, 3], output_ids=[3, 4, 4, 4])
    expected = reference_distribution(logits_V.numpy(), row)
    count = 20_000
    observed = draw(logits_V, row, count, seed=7)
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


def random_rows(count: int, vocab_size: int, rng: random.Random) -> list[SampleInputs]:
    """Every feature alone and with others."""

    def sometimes(value):
        return value() if rng.random() < 0.3 else None

    rows = []
    for _ in range(count):
        settings = {
            "temperature": rng.choice([0.0, 0.7, 1.0, 1.6]),
            "top_k": sometimes(lambda: rng.randrange(1, 30)),
            "top_p": sometimes(lambda: rng.uniform(0.2, 1)),
            "min_p": sometimes(lambda: rng.uniform(0, 0.3)),
            "repetition_penalty": sometimes(lambda: rng.uniform(0.5, 2)),
            "presence_penalty": sometimes(lambda: rng.uniform(-2, 2)),
            "frequency_penalty": sometimes(lambda: rng.uniform(-2, 2)),
            "logit_bias": sometimes(lambda: {rng.randrange(vocab_size): rng.uniform(-100, 9) for _ in range(4)}),
        }
        params = SamplingParams(**{name: value for name, value in settings.items() if value is not None})
        prompt, output = ([rng.randrange(vocab_size) for _ in range(rng.randrange(12))] for _ in range(2))
        forbidden = sometimes(lambda: [rng.randrange(vocab_size) for _ in range(3)]) or []
        rows.append(SampleInputs(params, rng.random(), prompt, output, forbidden))
    return rows


def test_every_mixture_of_features_samples_as_the_definitions_say():
    """Tokens are the inverse of the float64 reference's cumulative distribution, for all rows of a batch at once."""
    rng, vocab_size = random.Random(8), 257
    compiler = ConstraintCompiler(ByteTokenizer(), vocab_size)
    allowed = set(b"abcdefghijklmnopqrstuvwxyz0123456789")
    constrained = SamplingParams(regex="[a-z0-9]+")
    logits_NV = torch.randn(400, vocab_size, generator=torch.Generator().manual_seed(6)) * 3
    rows = random_rows(400, vocab_size, rng)
    rows[::5] = [replace(row, constraint=compiler.start(constrained)) for row in rows[::5]]
    tokens = sample_rows(logits_NV, rows).tolist()
    certain = 0
    for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        distribution = reference_distribution(logits_NV[place].numpy(), row, allowed if row.constraint else None)
        cumulative = distribution.cumsum()
        if row.params.greedy or abs(cumulative - row.uniform).min() > 1e-5:
            assert token == (distribution.argmax() if row.params.greedy else np.searchsorted(cumulative, row.uniform))
            certain += 1
    assert certain > 380


def test_transformers_processors_leave_the_same_distribution():
    transformers = pytest.importorskip("transformers")
    rng, vocab_size = random.Random(9), 60
    logits_NV = torch.randn(60, vocab_size, generator=torch.Generator().manual_seed(7)) * 2
    rows, expected = [], []
    for logits_V in logits_NV:
        params = SamplingParams(
            temperature=rng.uniform(0.5, 2),
            top_k=rng.randrange(5, 40),
            top_p=rng.uniform(0.5, 0.99),
            min_p=rng.uniform(0, 0.1),
            repetition_penalty=rng.uniform(0.7, 1.6),
        )
        prompt, output = ([rng.randrange(vocab_size) for _ in range(9)] for _ in range(2))
        processors = transformers.LogitsProcessorList(
            [
                transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
                transformers.TemperatureLogitsWarper(params.temperature),
                transformers.TopKLogitsWarper(params.top_k),
                transformers.TopPLogitsWarper(params.top_p),
                transformers.MinPLogitsWarper(params.min_p),
            ]
        )
        scores = processors(torch.tensor([prompt + output]), logits_V[None].double().clone())
        cumulative = scores.softmax(dim=-1)[0].cumsum(dim=-1).numpy()
        uniform = rng.random()
        if abs(cumulative - uniform).min() > 1e-5:
            expected.append((len(rows), int(np.searchsorted(cumulative, uniform))))
        rows.append(SampleInputs(params, uniform, prompt, output))
    tokens = sample_rows(logits_NV, rows).tolist()
    assert len(expected) > 50 and [(place, tokens[place]) for place, _ in expected] == expected


def test_a_row_does_not_depend_on_its_neighbours():
    logits_NV = torch.randn(80, 200, generator=torch.Generator().manual_seed(3)) * 3
    rows = random_rows(80, 200, random.Random(4))
    together = sample_rows(logits_NV, rows).tolist()
    alone = [sample_rows(logits_NV[place : place + 1], [row]).item() for place, row in enumerate(rows)]
    assert together == alone


def test_a_plainly_greedy_batch_costs_one_look_for_the_largest():
    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.names.append(operation.__name__)
            return operation(*args, **(kwargs or {}))

    rows = [SampleInputs(SamplingParams(temperature=0, stop="x", logprobs=2))] * 6
    logits_NV = torch.randn(6, 50)
    with Operations() as seen:
        sample_rows(logits_NV, rows)
    assert seen.names == ["max.dim"]


def test_a_constraint_with_nothing_but_forbidden_tokens_prevails():
    compiler = ConstraintCompiler(ByteTokenizer(), 257)
    row = SampleInputs(
        SamplingParams(temperature=0, logit_bias={98: -100.0}, regex="b"),
        forbidden_ids=[98, 256],
        constraint=compiler.start(SamplingParams(regex="b")),
    )
    assert sample_rows(torch.randn(1, 257), [row]).tolist() == [98]


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
