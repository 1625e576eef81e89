"""Every kind of model that can be cached, computed in pieces and from the cache, gives what the plain model gives."""

import copy
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from llama import ModelConfig, MoEConfig, Transformer
from llama.config import RopeScaling
from llama.engine import Engine, EngineConfig, SamplingParams
from llama.engine.config import widest_window
from tests.llama.engine.models import DENSE, MAX_SEQ_LEN, MOE, VOCAB_SIZE, plain_greedy, random_model

BLOCK_SIZE = 4


def rope(scaling: RopeScaling) -> ModelConfig:
    return replace(DENSE, rope_scaling=scaling)


POSITIONS = {
    "interleaved": replace(DENSE, rope_layout="interleaved"),
    "linear": rope(RopeScaling("linear", 4.0)),
    "ntk": rope(RopeScaling("ntk", 4.0)),
    "yarn": rope(RopeScaling("yarn", 4.0, original_max_seq_len=24)),
    "llama3": rope(RopeScaling("llama3", 4.0, original_max_seq_len=24)),
    "alibi": replace(DENSE, position="alibi"),
    "t5": replace(DENSE, position="t5", t5_buckets=8, t5_max_distance=16),
    "sinusoidal": replace(DENSE, position="sinusoidal"),
    "learned": replace(DENSE, position="learned"),
    "none": replace(DENSE, position="none"),
}
ATTENTION = {
    "mqa": replace(DENSE, num_kv_heads=1, head_dim=6),
    "window1": replace(DENSE, sliding_window=1),
    "window6": replace(DENSE, sliding_window=6),
    "window8": replace(DENSE, sliding_window=8, full_attention_layers=1),
    "window6-alibi": replace(POSITIONS["alibi"], sliding_window=6, full_attention_layers=1),
    "window13-t5-softcap": replace(POSITIONS["t5"], sliding_window=13, attention_softcap=1.5, num_kv_heads=4),
    "window5-learned": replace(POSITIONS["learned"], sliding_window=5),
    "softcap": replace(DENSE, attention_softcap=1.5),
    "softcap-alibi": replace(POSITIONS["alibi"], attention_softcap=1.5),
    "qk_norm-head": replace(DENSE, qk_norm="head"),
    "qk_norm-full": replace(DENSE, qk_norm="full"),
    "bias-qkv": replace(DENSE, attention_bias="qkv"),
    "bias-qkvo": replace(DENSE, attention_bias="qkvo"),
    "dropout": replace(DENSE, attention_dropout=0.5, residual_dropout=0.5),
}
BLOCKS = {
    "post": replace(DENSE, norm_placement="post", norm="layernorm"),
    "batchnorm": replace(DENSE, norm="batchnorm"),
    "sandwich": replace(DENSE, norm_placement="sandwich", sliding_window=7, attention_softcap=2.0),
    "deepnorm": replace(DENSE, norm_placement="deepnorm", norm="layernorm_bessel", activation="relu"),
    "swish_learned": replace(DENSE, activation="swish_learned", ffn_bias=True, tie_embeddings=True),
    "moe-sigmoid": replace(
        DENSE,
        moe=MoEConfig(
            num_experts=4,
            num_shared_experts=1,
            shared_gate=True,
            score="sigmoid",
            route_scale=2.0,
            bias_update_rate=0.1,
            capacity_factor=1.0,
            first_dense_layers=1,
        ),
    ),
    "moe-window6-alibi": replace(MOE, position="alibi", sliding_window=6),
}


@torch.inference_mode()
def is_greedy(model: Transformer, prompt: Sequence[int], output: Sequence[int]) -> bool:
    """Whether the plain model, which sees no later token, prefers each token of `output` after those before it."""
    logits_LV = model(torch.tensor([[*prompt, *output]]))[0]
    return logits_LV[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == list(output)


def generate_in_pieces(
    model: Transformer, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[tuple[list[int], list[int]]], Counter]:
    """Prompts and outputs of requests under a schedule of chunks, mixed batches, cache hits and preemptions."""
    # Where every layer has a window, old blocks are given up and fewer do.
    num_blocks = 20 if widest_window(model.config) is None else 10
    engine = Engine(
        model, config=EngineConfig(num_blocks=num_blocks, block_size=BLOCK_SIZE, max_batched_tokens=12, max_running=5)
    )
    families = [[rng.randrange(VOCAB_SIZE) for _ in range(30)] for _ in range(2)]
    requests: dict[str, tuple[list[int], list[int]]] = {}
    seen: Counter = Counter()
    schedule = engine._core.scheduler.schedule

    def recording_schedule():
        scheduled = schedule()
        lengths = [item.end - item.start for item in scheduled]
        seen["chunks"] += sum(not item.samples for item in scheduled)
        seen["mixed"] += 1 in lengths and max(lengths) > 1
        return scheduled

    monkeypatch.setattr(engine._core.scheduler, "schedule", recording_schedule)
    while len(requests) < 9 or engine.has_work:
        if len(requests) < 9 and rng.random() < 0.7:
            prompt = rng.choice(families)[: rng.randrange(1, 30)] + [rng.randrange(VOCAB_SIZE)]
            name = engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=rng.randrange(6, 22)))
            requests[name] = (prompt, [])
        for chunk in engine.step():
            requests[chunk.request_id][1].extend(chunk.token_ids)
            if chunk.finish_reason is not None:
                seen["hits"] += chunk.num_cached_tokens > 0
        engine.check_integrity()
        seen["given up"] += sum(request.table.num_trimmed > 0 for request in engine._core.scheduler.running)
    seen["preemptions"] = engine.stats().preemptions
    return list(requests.values()), seen


@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in (POSITIONS | ATTENTION | BLOCKS).items()])
def test_greedy_output_is_that_of_the_plain_model(config, monkeypatch):
    # In float64, or two nearly equal logits might swap.
    model = random_model(config).double()
    requests, seen = generate_in_pieces(model, random.Random(7), monkeypatch)
    # Requests that give up old blocks hardly grow: there is always room for them.
    last = "preemptions" if widest_window(config) is None else "given up"
    assert all(seen[event] > 1 for event in ("chunks", "mixed", "hits", last)), seen
    for prompt, output in requests:
        assert is_greedy(model, prompt, output)
    prompt, output = max(requests, key=lambda request: len(request[0]) + len(request[1]))
    assert output == plain_greedy(model, prompt, len(output))
    assert len({token for _, output in requests for token in output}) > 12, "the model is too dull to test anything"


@pytest.mark.parametrize(
    "name",
    ["interleaved", "mqa", "window6", "window8", "softcap", "qk_norm-head", "bias-qkvo", "sandwich", "moe-sigmoid"],
)
def test_the_kernels_choose_the_tokens_that_float64_would(name, monkeypatch):
    """In fp32, where the CPU's kernels compute; two tokens equally good to within fp32's noise are both right."""
    model = random_model((POSITIONS | ATTENTION | BLOCKS)[name])
    exact = copy.deepcopy(model).double().eval()
    requests, _ = generate_in_pieces(model, random.Random(7), monkeypatch)
    for prompt, output in requests:
        with torch.inference_mode():
            logits_LV = exact(torch.tensor([[*prompt, *output]]))[0, len(prompt) - 1 : -1]
        chosen_L = logits_LV.gather(1, torch.tensor(output)[:, None])[:, 0]
        torch.testing.assert_close(chosen_L, logits_LV.amax(dim=1), atol=1e-3, rtol=0)


def test_learned_positions_reach_to_the_end_of_the_context():
    model = random_model(POSITIONS["learned"])
    prompts = [[token] * (MAX_SEQ_LEN - 3) for token in range(3)]
    # One step computes more tokens than there are positions.
    completions = Engine(model, config=EngineConfig(max_batched_tokens=512)).generate(
        prompts, SamplingParams(temperature=0, max_tokens=50)
    )
    assert [c.finish_reason for c in completions] == ["length"] * 3
    assert [c.token_ids for c in completions] == [plain_greedy(model, prompt, 3) for prompt in prompts]


def test_dynamic_ntk_is_refused():
    model = random_model(rope(RopeScaling("dynamic_ntk", 4.0, original_max_seq_len=24)))
    with pytest.raises(ValueError, match=r"^model\.rope_scaling\.kind=dynamic_ntk .*; use ntk or yarn$"):
        Engine(model)
