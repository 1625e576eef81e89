"""Bytes of the cache against those of a cache that is filled."""

import numpy as np
import pytest
import torch

from llama import Transformer
from llama.attention import attend_visible, visible_keys
from llama.counts import generation_flops
from llama.presets import preset
from pipelines.explain.cache import compute, variants


def test_bytes_are_those_of_the_keys_and_values() -> None:
    found = compute("tiny", preset("tiny"))
    assert list(found.cache_bytes) == ["MHA, 6 KV heads", "GQA, 2 KV heads, as the preset has", "MQA, 1 KV head"]
    for (label, config), sizes in zip(variants(preset("tiny")).items(), found.cache_bytes.values(), strict=True):
        model = Transformer(config)
        model.init_weights(0)
        kept = []

        def attend(layer: int, q, k, v, scoring, kept: list = kept) -> torch.Tensor:
            kept.extend((k, v))
            places = torch.arange(q.shape[1])
            visible = visible_keys(places, places, None)
            return attend_visible(*(x.transpose(1, 2) for x in (q, k, v)), visible, scoring).transpose(1, 2)

        with torch.no_grad():
            model(torch.zeros(1, 5, dtype=torch.long), attend=attend)
        per_token = sum(x.numel() * torch.bfloat16.itemsize for x in kept) // 5
        np.testing.assert_array_equal(sizes, found.lengths * per_token, err_msg=label)


def test_flops_are_those_of_the_whole_generation() -> None:
    config = preset("tiny")
    found = compute("tiny", config)
    count = config.max_seq_len - found.prompt
    assert found.generated[-1] == count == len(found.cached_flops)
    assert found.cached_flops[-1] == generation_flops(config, found.prompt, count, cached=True)[-1]
    assert found.cached_flops[0] == found.uncached_flops[0]
    assert found.uncached_flops[-1] > 100 * found.cached_flops[-1]


@pytest.mark.parametrize(
    ("name", "kinds"), [("llama-2-7b", [32, 8, 1]), ("llama-3-8b", [32, 8, 1]), ("qwen3-30b-a3b", [32, 8, 4, 1])]
)
def test_the_variants_have_the_presets_own(name: str, kinds: list[int]) -> None:
    found = variants(preset(name))
    assert [config.num_kv_heads for config in found.values()] == kinds
    (own,) = [config for label, config in found.items() if "as the preset has" in label]
    assert own == preset(name)
