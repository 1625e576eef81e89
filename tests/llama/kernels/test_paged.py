"""Paged attention for GPUs against float64, one query at a time: in Triton's interpreter where there is no GPU."""

import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama.attention import Scoring
from llama.engine import Engine, EngineConfig, SamplingParams
from llama.engine.attention import AttentionPlan, PagedAttend
from llama.kernels import cpu, paged
from tests.llama.engine.models import DENSE, plain_greedy, random_model
from tests.llama.engine.test_attention import Step, random_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
runs = pytest.mark.skipif(paged.triton is None, reason="needs triton, and a GPU or triton's interpreter")
PLAIN = Scoring(scale=0.3)


def attend_to(step: Step, block_size: int) -> PagedAttend:
    step.cache.keys, step.cache.values = step.cache.keys.to(DEVICE), step.cache.values.to(DEVICE)
    return PagedAttend(step.cache, AttentionPlan(step.spans, block_size, DEVICE))


def compute(step: Step, attend: PagedAttend, scoring: Scoring) -> torch.Tensor:
    q, k, v = torch.cat(step.queries)[None], step.new(step.keys), step.new(step.values)
    return attend(1, q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), scoring)[0].cpu()


@pytest.fixture
def kernel(monkeypatch):
    """A GPU that few programs fill, so that what is split differs from step to step; torch may not help."""
    monkeypatch.setattr(paged, "programs_to_fill", lambda device: 12)
    if DEVICE.type == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        multiply = InterpreterBuilder.create_dot

        def create_dot(builder, a, b, *rest):
            """bf16 is kept as its bits, which the interpreter's own multiplies as integers."""
            a, b = (
                TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), paged.tl.float32)
                if x.dtype.scalar == paged.tl.bfloat16
                else x
                for x in (a, b)
            )
            return multiply(builder, a, b, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
        monkeypatch.setattr(paged, "available", lambda q_THD: True)
    monkeypatch.delattr(AttentionPlan, "groups")
    with torch.inference_mode(), cpu.switched_off():
        yield


def test_tensors_of_a_cpu_are_declined():
    with torch.no_grad():
        assert not paged.available(torch.zeros(2, 2, 16))


@runs
@pytest.mark.parametrize("window", [None, 1, 9, 70], ids=lambda window: f"window{window}")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(2, 2, 128, 16), (4, 2, 80, 16), (4, 1, 8, 5), (8, 1, 96, 4), (6, 2, 64, 32), (20, 1, 17, 16)],
)
def test_mixed_steps_match_attention_one_query_at_a_time(kernel, heads, kv_heads, head_dim, block_size, window):
    rng = random.Random(heads * head_dim + (window or 0))
    torch.manual_seed(heads)
    for longest, softcap in ((30, 2.0), (150, rng.choice([None, 0.7]))):
        scoring = replace(PLAIN, window=window, softcap=softcap)
        shape = {"head_dim": head_dim, "longest": longest, "block_size": block_size}
        step = random_step(rng, heads, kv_heads, window=window, **shape)
        out = compute(step, attend_to(step, block_size), scoring)
        torch.testing.assert_close(out.double(), step.expected(scoring), atol=5e-6, rtol=1e-5)
        assert step.cache.keys[0].isnan().all(), "another layer was written"


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_summed_in_fp32(kernel, dtype):
    torch.manual_seed(0)
    scoring = replace(PLAIN, scale=0.2, softcap=3.0)
    step = random_step(random.Random(3), 8, 2, dtype=dtype, head_dim=64, longest=120, block_size=16)
    out = compute(step, attend_to(step, 16), scoring)
    assert out.dtype == dtype
    # Only a weight and the result are rounded.
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), step.expected(scoring), atol=tolerance, rtol=tolerance)


@runs
@pytest.mark.parametrize("window", [None, 500])
def test_few_long_contexts_are_dealt_out_to_more_programs(kernel, monkeypatch, window):
    """A decoding sequence's and those of a short chunk of prefill; not where one program has nothing to wait for."""
    torch.manual_seed(0)
    spans = [(799, 800), (0, 1), (600, 620), (298, 300), (65, 66)]
    scoring = replace(PLAIN, window=window)
    for programs, split in ((64, True), (1, False)):
        monkeypatch.setattr(paged, "programs_to_fill", lambda device, programs=programs: programs)
        step = random_step(random.Random(0), 4, 2, head_dim=16, block_size=16, window=window, longest=800, spans=spans)
        attend = attend_to(step, 16)
        out = compute(step, attend, scoring)
        torch.testing.assert_close(out.double(), step.expected(scoring), atol=5e-6, rtol=1e-5)
        (launches,) = attend._plan.on_gpu._tiles.values()
        assert [tiles.num_parts > 1 for tiles in launches] == [split, split]
        compute(step, attend, scoring)
        assert list(attend._plan.on_gpu._tiles.values()) == [launches], "planned anew for another layer"


@runs
def test_a_sequence_of_nan_leaves_the_others_alone(kernel):
    torch.manual_seed(0)
    spans = [(70, 71), (3, 40), (299, 300), (12, 13)]
    step = random_step(random.Random(1), 4, 2, head_dim=16, longest=300, spans=spans)
    clean = compute(step, attend_to(step, 4), PLAIN)
    rows = np.cumsum([0, *(end - start for start, end in spans)])
    for sick in range(len(spans)):
        before = step.keys[sick], step.values[sick]
        step.keys[sick], step.values[sick] = (torch.full_like(part, torch.nan) for part in before)
        out = compute(step, attend_to(step, 4), PLAIN)
        step.keys[sick], step.values[sick] = before
        own = slice(rows[sick], rows[sick + 1])
        assert out[own].isnan().all()
        out[own] = clean[own]
        assert torch.equal(out, clean)


@runs
@pytest.mark.parametrize("window", [None, 12])
def test_an_engine_says_what_the_plain_model_says(kernel, window):
    """Chunks of prompts beside decoding requests, a shared prefix, and blocks given up behind the window."""
    model = random_model(replace(DENSE, sliding_window=window, attention_softcap=5.0))
    prompts = [[5, 9, 3] * 5, [7] * 9 + [1, 2], [5, 9, 3] * 5 + [8]]
    expected = [plain_greedy(model, prompt, 6) for prompt in prompts]
    engine = Engine(model.to(DEVICE), config=EngineConfig(num_blocks=40, block_size=4, max_batched_tokens=12))
    completions = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=6))
    assert [completion.token_ids for completion in completions] == expected


@runs
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_the_host_does_not_wait_for_the_gpu(kernel):
    spans = [(70, 71), (3, 40), (999, 1000)]
    step = random_step(random.Random(1), 4, 2, head_dim=64, block_size=16, longest=1000, spans=spans)
    compute(step, attend_to(step, 16), PLAIN)  # compiled
    q, k, v = (x.to(DEVICE) for x in (torch.cat(step.queries)[None], step.new(step.keys), step.new(step.values)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend_to(step, 16)(1, q, k, v, PLAIN)
    finally:
        torch.cuda.set_sync_debug_mode("default")


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llama.kernels import paged

def compile(kernel, pointers, constants, numbers={}):
    types = dict.fromkeys(constants, "constexpr") | pointers | numbers
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, {
        (kernel.arg_names.index(name),): value for name, value in constants.items()
    })
    return triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 8})

shape = {"groups": 8, "shared": 4, "dim": 80, "padded": 128, "rows": 64}
fp32 = {"partial": "*fp32", "sums": "*fp32"}
lists = dict.fromkeys(("tables", "spans", "items"), "*i32")
attend = compile(
    paged._attend,
    dict.fromkeys(("q", "keys", "values", "out"), "*bf16") | lists | fp32,
    {**shape, "softcap": 30.0, "window": 512, "block_size": 16, "key_tile": 64},
    {"width": "i32", "token_stride": "i32", "head_stride": "i32", "scale": "fp32"},
)
merge = compile(paged._merge, {"out": "*bf16", "spans": "*i32", "merges": "*i32"} | fp32, shape)
assert attend.asm["cubin"] and merge.asm["cubin"]
print(attend.metadata.shared)
"""


@pytest.mark.skipif(paged.triton is None, reason="needs triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_a_gpu(capability):
    """The interpreter runs Python; only the compiler knows all that a kernel may not do."""
    shared = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert int(shared) < 99 << 10, "more shared memory than the smallest of these GPUs has for a program"
