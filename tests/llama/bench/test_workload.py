import math
import random
from collections import Counter

import numpy as np
import pytest

from llama.bench.harness import BenchError
from llama.bench.workload import (
    CELLS,
    LONGEST_REQUEST,
    SYSTEM_TOKENS,
    Cell,
    TraceRequest,
    latencies,
    make_trace,
    parse_cells,
    percentile,
    prompts,
)


def test_cells_are_named_one_by_one_or_by_kind_and_counted_once() -> None:
    assert parse_cells("") == CELLS
    assert parse_cells("decode:8x1024, trace") == (Cell("decode", 8, 1024), Cell("trace"))
    assert parse_cells("decode:1x256,decode") == tuple(cell for cell in CELLS if cell.kind == "decode")
    assert all(parse_cells(str(cell)) == (cell,) for cell in CELLS)


@pytest.mark.parametrize(
    "text", ["decoding", "decode:8", "decode:0x256", "trace:8x256", "prefill:8x-1", "decode:", "decode:²x8"]
)
def test_a_cell_that_is_none_is_named(text: str) -> None:
    with pytest.raises(BenchError, match=f"cells='{text}' is not prefill"):
        parse_cells(f"trace,{text}")


def test_prompts_are_the_same_for_everybody_and_new_for_every_variant() -> None:
    cell = Cell("prefill", 3, 40)
    first, again, other = prompts(cell, 50), prompts(cell, 50), prompts(cell, 50, variant=1)
    assert first == again and np.shape(first) == (3, 40) and {token for row in first for token in row} <= set(range(50))
    assert len({tuple(row[:16]) for row in first + other}) == 6


def test_the_trace_arrives_at_its_rate_and_shares_its_beginnings() -> None:
    trace = make_trace(1000, rate=5.0, vocab_size=1000)
    assert trace == make_trace(1000, rate=5.0, vocab_size=1000) != make_trace(1000, rate=5.0, vocab_size=1000, seed=1)
    gaps = np.diff([0.0] + [request.at for request in trace])
    assert (
        gaps.min() >= 0 and gaps.mean() == pytest.approx(1 / 5, rel=0.1) and gaps.std() == pytest.approx(0.2, rel=0.1)
    )
    systems = [tuple(request.prompt[:SYSTEM_TOKENS]) for request in trace]
    shared = {system for system, count in Counter(systems).items() if count > 1}
    assert len(shared) == 4 and np.mean([system in shared for system in systems]) == pytest.approx(0.8, abs=0.04)
    lengths = [len(request.prompt) + request.generate for request in trace]
    assert max(lengths) <= LONGEST_REQUEST and min(len(request.prompt) for request in trace) > SYSTEM_TOKENS


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101])
def test_a_percentile_is_the_nearest_rank(count: int) -> None:
    values = random.Random(count).sample(range(1000), count)
    for share in (0.5, 0.99):
        expected = next(v for v in sorted(values) if sum(other <= v for other in values) >= math.ceil(share * count))
        assert percentile(values, share) == expected


def test_latencies_count_from_arrival_and_throughput_from_the_first() -> None:
    trace = [TraceRequest(1.0, [0], 3), TraceRequest(2.0, [0], 1)]
    found = latencies(trace, [[[1.5, 1.6, 1.8], [4.0]], [[2.0, 2.1, 2.3], [3.0]]])
    assert found.tokens_per_second == pytest.approx(8 / (3.0 + 2.0))
    assert (found.first_token_p50, found.first_token_p99) == pytest.approx((1.0, 2.0))
    assert (found.gap_p50, found.gap_p99) == pytest.approx((0.1, 0.2))


def test_a_request_that_got_too_few_tokens_spoils_the_replay() -> None:
    with pytest.raises(BenchError, match="a request of 3 tokens got 2"):
        latencies([TraceRequest(0.0, [0], 3)], [[[0.1, 0.2]]])
