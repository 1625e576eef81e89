"""Cached generation equals uncached generation, whatever the model; and what the arguments promise."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llama import ModelConfig, MoEConfig, Transformer
from llama.config import RopeScaling
from llama.generate import KVCacheAttend, generate, stream
from llama.sampling import penalize_repetition
from tests.llama.engine.models import plain_greedy, random_model

PLAIN = ModelConfig(
    vocab_size=61,
    dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=32,
    max_seq_len=48,
    tie_embeddings=False,
)
PROMPT = [5, 9, 1, 33, 60, 2, 2, 17, 41]

POSITIONS = {
    "rope": {},
    "interleaved": {"rope_layout": "interleaved"},
    "linear": {"rope_scaling": RopeScaling("linear", 2.0)},
    "ntk": {"rope_scaling": RopeScaling("ntk", 2.0)},
    "dynamic_ntk": {"rope_scaling": RopeScaling("dynamic_ntk", 4.0, original_max_seq_len=12)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, original_max_seq_len=12)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 4.0, original_max_seq_len=12)},
    "alibi": {"position": "alibi"},
    "sinusoidal": {"position": "sinusoidal"},
    "learned": {"position": "learned"},
    "t5": {"position": "t5", "t5_buckets": 8, "t5_max_distance": 16},
    "none": {"position": "none"},
}
VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 4},
    "window-softcap": {"sliding_window": 5, "full_attention_layers": 1, "attention_softcap": 2.0},
    "post": {"norm_placement": "post", "norm": "layernorm"},
    "batchnorm": {"norm": "batchnorm"},
    "sandwich-mqa": {"norm_placement": "sandwich", "num_kv_heads": 1, "qk_norm": "head"},
    "deepnorm": {"norm_placement": "deepnorm", "norm": "layernorm_bessel", "attention_bias": "qkvo"},
    "moe": {"moe": MoEConfig(num_experts=4, top_k=2, num_shared_experts=1), "attention_dropout": 0.5},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return random_model(PLAIN).double()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("position", POSITIONS)
def test_cached_equals_uncached(position, variant):
    # float64: rounding does not decide which token is the likeliest.
    model = random_model(replace(PLAIN, **POSITIONS[position], **VARIANTS[variant]), seed=2).double().eval()
    expected = plain_greedy(model, PROMPT, 12)
    assert len(set(expected)) > 1
    assert generate(model, PROMPT, max_new_tokens=12, temperature=0) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("position", ["rope", "alibi", "learned", "sinusoidal", "t5"])
def test_the_cache_takes_a_sequence_in_any_pieces(position, variant):
    model = random_model(replace(PLAIN, **POSITIONS[position], **VARIANTS[variant])).double().eval()
    tokens_BL = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(0))
    cache, pieces = KVCacheAttend(capacity=24), []
    with torch.inference_mode():
        for length in (5, 1, 7, 1, 1, 9):
            positions = torch.arange(cache.length, cache.length + length).expand(3, -1)
            piece_BL = tokens_BL[:, cache.length : cache.length + length]
            pieces.append(model(piece_BL, positions=positions, attend=cache))
            cache.advance(length)
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens_BL), rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match="capacity=24 tokens .* below the 25"):
            model(tokens_BL[:, :1], positions=torch.tensor([[24]] * 3), attend=cache)


@pytest.fixture
def lengths(monkeypatch):
    """Tokens of every forward pass."""
    seen, forward = [], Transformer.forward

    def recorded(self, tokens_BL, **settings):
        seen.append(tokens_BL.shape[1])
        return forward(self, tokens_BL, **settings)

    monkeypatch.setattr(Transformer, "forward", recorded)
    return seen


def test_without_a_cache_the_whole_sequence_is_computed_and_the_tokens_are_the_same(model, lengths):
    cached = generate(model, PROMPT, max_new_tokens=5, seed=1)
    assert lengths == [9, 1, 1, 1, 1]
    assert generate(model, PROMPT, max_new_tokens=5, seed=1, use_cache=False) == cached
    assert lengths[5:] == [9, 10, 11, 12, 13]


def test_dynamic_ntk_uses_the_cache_up_to_the_original_length(lengths):
    model = random_model(replace(PLAIN, **POSITIONS["dynamic_ntk"])).double()
    generate(model, PROMPT, max_new_tokens=7, temperature=0)
    assert lengths == [9, 1, 1, 1, 13, 14, 15]


SAMPLED = {"temperature": 1.4, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}


def test_a_row_does_not_depend_on_its_batch(model):
    prompts = [PROMPT, PROMPT[::-1], [0] * 9, PROMPT]
    alone = [generate(model, prompt, max_new_tokens=12, seed=7, **SAMPLED) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=12, seed=7, **SAMPLED) == alone
    assert generate(model, torch.tensor(prompts[:2]), max_new_tokens=12, seed=7, **SAMPLED) == alone[:2]
    seeds = [7, 8, -7, 9]
    each = [
        generate(model, prompt, max_new_tokens=12, seed=s, **SAMPLED) for prompt, s in zip(prompts, seeds, strict=True)
    ]
    assert generate(model, prompts, max_new_tokens=12, seed=seeds, **SAMPLED) == each
    assert each[3] != alone[3] and each[2] != alone[2]


def test_seeds(model):
    first = generate(model, PROMPT, max_new_tokens=12, seed=3)
    assert generate(model, torch.tensor(PROMPT), max_new_tokens=12, seed=3) == first
    assert generate(model, PROMPT, max_new_tokens=12, seed=-3) != first
    # Fresh ones: of 61 tokens 12 times in a row, the same by chance is out of the question.
    assert generate(model, PROMPT, max_new_tokens=12) != generate(model, PROMPT, max_new_tokens=12)
    one, other = generate(model, [PROMPT, PROMPT], max_new_tokens=12)
    assert one != other


def test_the_repetition_penalty_covers_prompt_and_output(model):
    expected = list(PROMPT)
    with torch.inference_mode():
        for _ in range(12):
            logits_V = model.eval()(torch.tensor([expected]))[0, -1]
            seen_V = torch.tensor([token in expected for token in range(61)])
            expected.append(int(penalize_repetition(logits_V, seen_V, 2.0).argmax()))
    penalized = generate(model, PROMPT, max_new_tokens=12, temperature=0, repetition_penalty=2.0)
    assert penalized == expected[9:] != plain_greedy(model, PROMPT, 12)


def test_filters_reach_the_draw(model):
    greedy = plain_greedy(model.eval(), PROMPT, 8)
    for only in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-12}):
        assert generate(model, PROMPT, max_new_tokens=8, seed=0, **only) == greedy
    assert generate(model, PROMPT, max_new_tokens=8, seed=0) != greedy


def test_stop_ids_end_a_row_and_only_that(model):
    free = generate(model, [PROMPT, PROMPT[::-1]], max_new_tokens=20, temperature=0)
    stop = next(token for token in free[0] if token not in free[1])
    end = free[0].index(stop) + 1
    assert generate(model, [PROMPT, PROMPT[::-1]], max_new_tokens=20, temperature=0, stop_ids=[stop]) == [
        free[0][:end],
        free[1],
    ]
    assert generate(model, PROMPT, max_new_tokens=20, temperature=0, stop_ids={stop, 60}) == free[0][:end]
    rows = list(stream(model, [PROMPT, PROMPT[::-1]], max_new_tokens=20, temperature=0, stop_ids=[stop]))
    assert [row[0] for row in rows] == free[0][:end] + [None] * (20 - end)
    assert [row[1] for row in rows] == free[1]
    everything = range(61)
    assert generate(model, [PROMPT, PROMPT[::-1]], max_new_tokens=20, temperature=0, stop_ids=everything) == [
        row[:1] for row in free
    ]


def test_tensors_and_numpy_numbers_serve_as_numbers(model):
    expected = generate(model, PROMPT, max_new_tokens=20, temperature=0)
    end = expected.index(expected[3]) + 1
    for stop_ids in (torch.tensor([expected[3]]), np.array([expected[3]])):
        assert generate(model, PROMPT, max_new_tokens=20, temperature=0, stop_ids=stop_ids) == expected[:end]
    plain = generate(model, PROMPT, max_new_tokens=6, top_k=9, seed=7)
    for kind in (torch.tensor, np.int64):
        assert generate(model, PROMPT, max_new_tokens=kind(6), top_k=kind(9), seed=kind(7)) == plain
    assert generate(model, [PROMPT] * 2, max_new_tokens=6, top_k=9, seed=torch.tensor([8, 7]))[1] == plain
    for dtype in (torch.uint8, torch.uint16, torch.uint64):
        assert generate(model, torch.tensor(PROMPT, dtype=dtype), max_new_tokens=6, top_k=9, seed=7) == plain


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(temperature, value):
    model = random_model(PLAIN)
    with torch.no_grad():
        model.norm.weight[0] = value
    with pytest.raises(ValueError, match="the model's logits after 9 tokens are NaN or infinite; .* than float32"):
        generate(model, PROMPT, max_new_tokens=6, temperature=temperature)


def test_a_stream_gives_the_same_tokens(model):
    expected = generate(model, PROMPT, max_new_tokens=12, seed=5, **SAMPLED)
    assert list(stream(model, PROMPT, max_new_tokens=12, seed=5, **SAMPLED)) == expected
    assert list(model.stream(PROMPT, max_new_tokens=12, seed=5, **SAMPLED)) == expected
    assert model.generate(PROMPT, max_new_tokens=12, seed=5, **SAMPLED) == expected


def test_the_model_is_left_as_it_was():
    config = replace(PLAIN, attention_dropout=0.5, residual_dropout=0.5)
    model = random_model(config).double().train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    expected = plain_greedy(random_model(config).double().eval(), PROMPT, 6)
    assert generate(model, PROMPT, max_new_tokens=6, temperature=0) == expected  # nothing is dropped
    for _ in stream(model, PROMPT, max_new_tokens=6):
        assert [module.training for module in model.modules()] == modes
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    model.forward = None
    with pytest.raises(TypeError):
        generate(model, PROMPT, max_new_tokens=6)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (
            PROMPT,
            {"max_new_tokens": 40},
            r"model\.max_seq_len=48 is below the prompt's 9 tokens and max_new_tokens=40; lower",
        ),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (PROMPT, {"temperature": -1.0}, "temperature=-1.0 .* 0 is greedy"),
        (PROMPT, {"temperature": float("nan")}, "temperature=nan"),
        (PROMPT, {"top_k": -1}, "top_k=-1 .* 0 turns it off"),
        (PROMPT, {"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        (PROMPT, {"min_p": 1.5}, r"min_p=1.5 must lie in \[0, 1\]"),
        (PROMPT, {"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive; 1 turns it off"),
        (PROMPT, {"seed": [1, 2]}, "seed has 2 numbers for 1 prompts"),
        ([], {}, r"prompt of shape \[0\]"),
        ([[1, 2], [3]], {}, "lengths differ"),
        ([[[1]]], {}, r"prompt of shape \[1, 1, 1\]"),
        ([1, 61], {}, r"prompt has the token id 61; ids lie in \[0, model.vocab_size=61\)"),
        ([-1, 3], {}, "prompt has the token id -1"),
        ([0.5], {}, "float32; give integer"),
        (["a", "b"], {}, r"prompt=\['a', 'b'\] holds something else than token ids; give integers in \[0, model"),
        ("ab", {}, "prompt='ab' holds something else"),
        ([2**70], {}, r"prompt=\[11805\d+\] holds something else"),
        ([1, [2]], {}, r"prompt=\[1, \[2\]\] holds something else"),
        ([torch.tensor([1, 2]), torch.tensor([3])], {}, "lengths differ"),
        (torch.tensor([1, 61], dtype=torch.uint16), {}, "prompt has the token id 61"),
        (PROMPT, {"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not an integer; give a number of tokens"),
        (PROMPT, {"top_k": 2.5}, "top_k=2.5 is not an integer; give a number of tokens; 0 turns it off"),
        (PROMPT, {"temperature": "hot"}, "temperature='hot' is not a number; give one"),
        (PROMPT, {"seed": "x"}, "a number of seed='x' is not an integer; give an integer, or one for each prompt"),
        (PROMPT, {"seed": 1.5}, "seed=1.5 is not an integer"),
        (PROMPT, {"seed": [1.5]}, "a number of seed=1.5 is not an integer"),
        (PROMPT, {"stop_ids": 5}, r"stop_ids=5 is not a list; give a list of token ids in \[0, model.vocab_size=61\)"),
        (PROMPT, {"stop_ids": [1.0]}, "a token of stop_ids=1.0 is not an integer; give a list of token ids"),
        (PROMPT, {"stop_ids": [3, 61]}, r"stop_ids has \[61\], which the model has no token for; give a list"),
        (PROMPT, {"stop_ids": torch.tensor([-1])}, r"stop_ids has \[-1\]"),
    ],
)
def test_what_cannot_be_is_refused_at_the_call(model, prompt, settings, message):
    for function in (generate, stream):
        with pytest.raises(ValueError, match=message):
            function(model, prompt, **{"max_new_tokens": 4, **settings})


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_full_context_can_be_used(position):
    model = random_model(replace(PLAIN, **POSITIONS[position]))
    assert len(generate(model, PROMPT, max_new_tokens=39, seed=0)) == 39


def test_half_precision_runs_in_its_own_type():
    model = random_model(PLAIN).bfloat16()
    assert len(generate(model, PROMPT, max_new_tokens=8, seed=0, **SAMPLED)) == 8
