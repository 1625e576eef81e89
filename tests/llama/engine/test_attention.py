import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from llama import ModelConfig
from llama.attention import Scoring
from llama.engine.attention import PagedAttend, PagedKVCache, SequenceSpan, plan_attention

BLOCK_SIZE, NUM_BLOCKS, HEAD_DIM = 4, 64, 8
PLAIN = Scoring(scale=HEAD_DIM**-0.5)


class PairBias:
    """A bias that knows both positions, not only their distance; counts how often it is computed."""

    def __init__(self, heads: int, dtype: torch.dtype = torch.float32) -> None:
        self.table = torch.randn(heads, 64, 64, dtype=dtype)
        self.calls = 0

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        self.calls += 1
        return self.table[:, query_positions[..., :, None], key_positions[..., None, :]].movedim(0, -3)


def reference(q_LHD, k_SGD, v_SGD, start, scoring):
    """float64, one query and one head at a time."""
    heads, groups = q_LHD.shape[1], k_SGD.shape[1]
    q_LHD, k_SGD, v_SGD = q_LHD.double(), k_SGD.double(), v_SGD.double()
    out = torch.empty_like(q_LHD)
    for row in range(q_LHD.shape[0]):
        end = start + row + 1
        seen = slice(0 if scoring.window is None else max(0, end - scoring.window), end)
        for head in range(heads):
            group = head // (heads // groups)
            scores = k_SGD[seen, group] @ q_LHD[row, head] * scoring.scale
            if scoring.softcap:
                scores = scoring.softcap * (scores / scoring.softcap).tanh()
            if scoring.bias:
                scores = scores + scoring.bias.table[head, end - 1, seen]
            out[row, head] = scores.softmax(0) @ v_SGD[seen, group]
    return out


@dataclass
class Step:
    """Sequences of random lengths, some decoding, some in prefill; what is computed already lies in the cache."""

    cache: PagedKVCache
    spans: list[SequenceSpan]
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    def new(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part[span.start : span.end] for part, span in zip(parts, self.spans, strict=True)])[None]

    def expected(self, scoring: Scoring) -> Tensor:
        sequences = zip(self.queries, self.keys, self.values, self.spans, strict=True)
        return torch.cat([reference(q, k, v, span.start, scoring) for q, k, v, span in sequences])

    def compute(self, attend: PagedAttend, scoring: Scoring) -> Tensor:
        return attend(1, torch.cat(self.queries)[None], self.new(self.keys), self.new(self.values), scoring)[0]


def random_step(
    rng: random.Random, heads: int, kv_heads: int, *, dtype: torch.dtype = torch.float32, window: int | None = None
) -> Step:
    config = ModelConfig(
        vocab_size=8, dim=heads * HEAD_DIM, num_layers=2, num_heads=heads, num_kv_heads=kv_heads, max_seq_len=64
    )
    cache = PagedKVCache(config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=dtype, device=torch.device("cpu"))
    # Whoever reads a slot that is not its own finds out.
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    free_blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    step = Step(cache, [], [], [], [])
    for _ in range(rng.randrange(1, 8)):
        end = rng.randrange(1, 24)
        start = rng.choice([end - 1, end - 1, 0, rng.randrange(end)])
        block_ids = [free_blocks.pop() for _ in range(-(-end // BLOCK_SIZE) + rng.randrange(2))]
        step.spans.append(SequenceSpan(block_ids, start, end))
        step.queries.append(torch.randn(end - start, heads, HEAD_DIM, dtype=dtype))
        step.keys.append(torch.randn(end, kv_heads, HEAD_DIM, dtype=dtype))
        step.values.append(torch.randn(end, kv_heads, HEAD_DIM, dtype=dtype))
        # Nothing may read what no token of the step sees: it stays NaN.
        for position in range(max(0, start - window + 1) if window else 0, start):
            slot = block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            cache.keys[1, slot], cache.values[1, slot] = step.keys[-1][position], step.values[-1][position]
    return step


def attend_to(step: Step, *windows: int | None) -> PagedAttend:
    return PagedAttend(step.cache, plan_attention(step.spans, BLOCK_SIZE, torch.device("cpu"), windows))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("softcap", [None, 0.7], ids=["", "softcap"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("window", [None, 1, 4, 5, 11, 40], ids=lambda window: f"window{window}")
def test_mixed_batches_match_attention_one_query_at_a_time(heads, kv_heads, softcap, with_bias, window):
    rng = random.Random(heads)
    torch.manual_seed(heads)
    scoring = replace(PLAIN, scale=0.5, window=window, softcap=softcap, bias=PairBias(heads) if with_bias else None)
    for _ in range(12 if scoring.plain and window is None else 3):
        step = random_step(rng, heads, kv_heads, window=window)
        out = step.compute(attend_to(step, None, window), scoring)
        torch.testing.assert_close(out.double(), step.expected(scoring), atol=2e-6, rtol=1e-5)
        assert step.cache.keys[0].isnan().all(), "another layer was written"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_keep_their_precision(dtype):
    """bf16 scores are summed with the bias in the bias's type; float64 stays float64."""
    rng, atol = random.Random(3), 0.03 if dtype == torch.bfloat16 else 1e-12
    for softcap in (None, 0.7):
        bias = PairBias(6, torch.float64 if dtype == torch.float64 else torch.float32)
        scoring = replace(PLAIN, window=5, softcap=softcap, bias=bias)
        step = random_step(rng, 6, 2, dtype=dtype, window=5)
        out = step.compute(attend_to(step, 5), scoring)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), step.expected(scoring), atol=atol, rtol=0)


def test_layers_share_a_bias_and_windows_do_not():
    step = random_step(random.Random(5), 4, 2)
    attend = attend_to(step, None, 5)
    bias, groups = PairBias(4), len(attend._plan.groups[None])
    scoring = replace(PLAIN, bias=bias)
    first, second = step.compute(attend, scoring), step.compute(attend, scoring)
    assert bias.calls == groups and torch.equal(first, second)
    windowed = replace(scoring, window=5)
    torch.testing.assert_close(step.compute(attend, windowed).double(), step.expected(windowed), atol=2e-6, rtol=1e-5)
    calls = bias.calls
    assert torch.equal(step.compute(attend, scoring), first) and bias.calls == calls > groups
    other = replace(scoring, bias=PairBias(4))
    torch.testing.assert_close(step.compute(attend, other).double(), step.expected(other), atol=2e-6, rtol=1e-5)


def test_a_window_reads_only_what_it_sees():
    spans = [SequenceSpan(list(range(25)), 98, 99), SequenceSpan(list(range(25, 50)), 90, 96)]
    groups = plan_attention(spans, BLOCK_SIZE, torch.device("cpu"), [None, 6, 200]).groups
    assert [group.slots_NS.shape[1] for group in groups[None]] == [99, 96]
    assert [group.slots_NS.shape[1] for group in groups[6]] == [6, 11]
    assert groups[6][0].visible_NLS is None and groups[200] is groups[None]


def test_blocks_are_copied_in_every_layer():
    step = random_step(random.Random(1), 4, 2)
    cache = step.cache
    cache.keys.normal_()
    cache.values.normal_()
    before = cache.keys.clone(), cache.values.clone()
    cache.copy_blocks([])
    cache.copy_blocks([(3, 9), (60, 0), (3, 4)])
    origin = list(range(NUM_BLOCKS))
    origin[9], origin[0], origin[4] = 3, 60, 3
    for tensor, old in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(tensor.unflatten(1, (-1, BLOCK_SIZE)), old.unflatten(1, (-1, BLOCK_SIZE))[:, origin])
