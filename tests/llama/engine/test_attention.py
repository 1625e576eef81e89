import random

import pytest
import torch

from llama import ModelConfig
from llama.engine.attention import PagedAttend, PagedKVCache, SequenceSpan, plan_attention

BLOCK_SIZE, NUM_BLOCKS, HEAD_DIM = 4, 64, 8


def reference(q_LHD, k_SGD, v_SGD, start):
    """float64, one query and one head at a time."""
    heads, groups = q_LHD.shape[1], k_SGD.shape[1]
    out = torch.empty(q_LHD.shape, dtype=torch.float64)
    for row in range(q_LHD.shape[0]):
        for head in range(heads):
            group = head // (heads // groups)
            seen = slice(0, start + row + 1)
            scores = k_SGD[seen, group].double() @ q_LHD[row, head].double() / HEAD_DIM**0.5
            out[row, head] = scores.softmax(0) @ v_SGD[seen, group].double()
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_mixed_batches_match_attention_one_query_at_a_time(heads, kv_heads):
    rng = random.Random(heads)
    config = ModelConfig(
        vocab_size=8, dim=heads * HEAD_DIM, num_layers=2, num_heads=heads, num_kv_heads=kv_heads, max_seq_len=64
    )
    for _ in range(12):
        cache = PagedKVCache(
            config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu")
        )
        # Whoever reads a slot that is not its own finds out.
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        free_blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        spans, queries, keys, values = [], [], [], []
        for _ in range(rng.randrange(1, 8)):
            end = rng.randrange(1, 24)
            start = rng.choice([end - 1, end - 1, 0, rng.randrange(end)])
            reserved = -(-end // BLOCK_SIZE) + rng.randrange(2)
            block_ids = [free_blocks.pop() for _ in range(reserved)]
            spans.append(SequenceSpan(block_ids, start, end))
            queries.append(torch.randn(end - start, heads, HEAD_DIM))
            keys.append(torch.randn(end, kv_heads, HEAD_DIM))
            values.append(torch.randn(end, kv_heads, HEAD_DIM))
            for position in range(start):
                slot = block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                cache.keys[1, slot], cache.values[1, slot] = keys[-1][position], values[-1][position]
        attend = PagedAttend(cache, plan_attention(spans, BLOCK_SIZE, torch.device("cpu")))
        new = [slice(span.start, span.end) for span in spans]
        out = attend(
            1,
            torch.cat(queries)[None],
            torch.cat([key[part] for key, part in zip(keys, new, strict=True)])[None],
            torch.cat([value[part] for value, part in zip(values, new, strict=True)])[None],
        )
        expected = torch.cat(
            [reference(q, k, v, span.start) for q, k, v, span in zip(queries, keys, values, spans, strict=True)]
        )
        torch.testing.assert_close(out[0].double(), expected, atol=2e-6, rtol=1e-5)
        assert cache.keys[0].isnan().all(), "another layer was written"
