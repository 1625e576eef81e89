import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from llama import ModelConfig
from llama.attention import Scoring
from llama.engine.attention import AttentionPlan, PagedAttend, PagedKVCache, SequenceSpan
from llama.kernels import cpu

BLOCK_SIZE, HEAD_DIM = 4, 8
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


def random_spans(rng: random.Random, longest: int) -> Iterator[tuple[int, int]]:
    for _ in range(rng.randrange(1, 8)):
        end = rng.randrange(1, longest + 1)
        yield rng.choice([end - 1, end - 1, 0, rng.randrange(end)]), end


def random_step(
    rng: random.Random,
    heads: int,
    kv_heads: int,
    *,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    head_dim: int = HEAD_DIM,
    longest: int = 23,
    block_size: int = BLOCK_SIZE,
    spans: Sequence[tuple[int, int]] | None = None,
) -> Step:
    """Of the given `spans`, at most 8, none beyond `longest`, or of random ones."""
    num_blocks = 8 * (longest // block_size + 3)
    config = ModelConfig(
        vocab_size=8,
        dim=heads * HEAD_DIM,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        position="none",
        max_seq_len=64,
    )
    cache = PagedKVCache(config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=torch.device("cpu"))
    # Whoever reads a slot that is not its own finds out.
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    free_blocks = rng.sample(range(num_blocks), num_blocks)
    step = Step(cache, [], [], [], [])
    for start, end in spans or random_spans(rng, longest):
        block_ids = [free_blocks.pop() for _ in range(-(-end // block_size) + rng.randrange(2))]
        step.queries.append(torch.randn(end - start, heads, head_dim, dtype=dtype))
        step.keys.append(torch.randn(end, kv_heads, head_dim, dtype=dtype))
        step.values.append(torch.randn(end, kv_heads, head_dim, dtype=dtype))
        # Nothing may read what no token of the step sees: it stays NaN, or its block belongs to others.
        first = max(0, start - window + 1) if window else 0
        for position in range(first, start):
            slot = block_ids[position // block_size] * block_size + position % block_size
            cache.keys[1, slot], cache.values[1, slot] = step.keys[-1][position], step.values[-1][position]
        block_ids[: first // block_size] = [-1] * (first // block_size)
        step.spans.append(SequenceSpan(block_ids, start, end))
    return step


def attend_to(step: Step) -> PagedAttend:
    return PagedAttend(step.cache, AttentionPlan(step.spans, BLOCK_SIZE, torch.device("cpu")))


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def implementation(request) -> Iterator[str]:
    """Every test runs on both. The kernels take what needs no gradient, and give biases and float64 to torch."""
    with torch.no_grad(), cpu.switched_off() if request.param == "torch" else nullcontext():
        if request.param == "kernels" and not cpu.ready():
            pytest.skip("needs a C++ compiler")
        yield request.param


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
        out = step.compute(attend_to(step), scoring)
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
        out = step.compute(attend_to(step), scoring)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), step.expected(scoring), atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3, 70])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 2, 32), (6, 1, 40), (3, 3, 128), (20, 1, 6), (16, 1, 64), (2, 1, 17), (7, 1, 2)],
)
def test_long_sequences_and_every_width_of_head(heads, kv_heads, head_dim, window, dtype):
    """Several tiles of keys and of rows, whole and in part, masked and not."""
    rng = random.Random(head_dim)
    torch.manual_seed(head_dim)
    scoring = replace(PLAIN, scale=0.3, window=window, softcap=rng.choice([None, 2.0]))
    for _ in range(2):
        step = random_step(rng, heads, kv_heads, dtype=dtype, window=window, head_dim=head_dim, longest=200)
        out = step.compute(attend_to(step), scoring)
        atol = 8e-6 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(out.double(), step.expected(scoring), atol=atol, rtol=1e-5)


def test_threads_share_sequences_and_heads():
    step = random_step(random.Random(2), 4, 2, longest=150)
    alone = step.compute(attend_to(step), PLAIN)
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            torch.testing.assert_close(step.compute(attend_to(step), PLAIN), alone, atol=1e-6, rtol=1e-6)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_sequence_of_nan_leaves_the_others_alone(poison, dtype):
    step = random_step(random.Random(8), 6, 2, dtype=dtype, longest=90)
    assert len(step.spans) > 3
    clean = step.compute(attend_to(step), PLAIN)
    for sick in range(len(step.spans)):
        before = step.keys[sick], step.values[sick]
        step.keys[sick] = torch.full_like(before[0], poison)
        step.values[sick] = torch.full_like(before[1], torch.nan)
        out = step.compute(attend_to(step), PLAIN)
        step.keys[sick], step.values[sick] = before
        row = sum(span.end - span.start for span in step.spans[:sick])
        own = slice(row, row + step.spans[sick].end - step.spans[sick].start)
        assert out[own].isnan().all()
        out[own] = clean[own]
        assert torch.equal(out, clean)


def test_the_kernel_does_the_work_where_it_can(implementation, monkeypatch):
    """Else the tests above would compare torch with itself."""
    plans = []
    monkeypatch.setattr(AttentionPlan, "groups", lambda plan, window: plans.append(window) or ())
    for dtype in (torch.float32, torch.bfloat16):
        step = random_step(random.Random(4), 6, 2, dtype=dtype)
        attend_to(step)
        step.compute(attend_to(step), replace(PLAIN, window=5, softcap=1.0))
        assert bool(plans) == (implementation == "torch")
    step = random_step(random.Random(4), 6, 2, dtype=torch.float64)
    step.compute(attend_to(step), PLAIN)
    assert plans


def test_a_request_may_lose_its_blocks_while_its_step_runs():
    step = random_step(random.Random(6), 4, 2)
    expected = step.compute(attend_to(step), PLAIN)
    attend = attend_to(step)
    for span in step.spans:
        span.block_ids.clear()
    assert torch.equal(step.compute(attend, PLAIN), expected)


def test_layers_share_a_bias_and_windows_do_not():
    step = random_step(random.Random(5), 4, 2)
    attend = attend_to(step)
    bias, groups = PairBias(4), len(attend._plan.groups(None))
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
    plan = AttentionPlan(spans, BLOCK_SIZE, torch.device("cpu"))
    assert [group.slots_NS.shape[1] for group in plan.groups(None)] == [99, 96]
    assert [group.slots_NS.shape[1] for group in plan.groups(6)] == [6, 11]
    assert plan.groups(6)[0].visible_NLS is None and plan.groups(200) is plan.groups(None)


def test_blocks_are_copied_in_every_layer():
    step = random_step(random.Random(1), 4, 2)
    cache = step.cache
    cache.keys.normal_()
    cache.values.normal_()
    before = cache.keys.clone(), cache.values.clone()
    cache.copy_blocks([])
    cache.copy_blocks([(3, 9), (60, 0), (3, 4)])
    origin = list(range(cache.keys.shape[1] // BLOCK_SIZE))
    origin[9], origin[0], origin[4] = 3, 60, 3
    for tensor, old in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(tensor.unflatten(1, (-1, BLOCK_SIZE)), old.unflatten(1, (-1, BLOCK_SIZE))[:, origin])
