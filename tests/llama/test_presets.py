"""Presets against the parameter counts their authors publish, and against the models built from them."""

import pytest
import torch

from llama import Transformer
from llama.presets import PRESETS, preset

PUBLISHED = {
    # Number of parameters of the safetensors files on the Hub; active ones for the mixtures of experts.
    "llama-2-7b": (6_738_415_616, 6_738_415_616),
    "llama-3-8b": (8_030_261_248, 8_030_261_248),
    "llama-3.1-8b": (8_030_261_248, 8_030_261_248),
    "llama-3.2-1b": (1_235_814_400, 1_235_814_400),
    "llama-3-70b": (70_553_706_496, 70_553_706_496),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "qwen3-0.6b": (596_049_920, 596_049_920),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    config = preset(name)
    assert (config.num_parameters(), config.num_active_parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_counts_agree_with_the_built_model(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = Transformer(config)
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    attention = model.layers[0].attention
    kv_elements = config.num_layers * (attention.wk.out_features + attention.wv.out_features)
    assert config.kv_bytes_per_token(dtype_bytes=2) == 2 * kv_elements


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"preset='llama-9' is not one of tiny, .*qwen3-30b-a3b"):
        preset("llama-9")


def test_changes_merge_into_a_presets_own_sections_unless_they_are_of_another_kind() -> None:
    assert preset("tiny-moe", moe={"num_shared_experts": 2}).num_parameters() > preset("tiny-moe").num_parameters()
    stretched = preset("llama-3.2-1b", rope_scaling={"factor": 8.0}).rope_scaling
    assert stretched == preset("llama-3.1-8b").rope_scaling
    assert preset("llama-3.2-1b", rope_scaling={"kind": "linear", "factor": 2.0}).rope_scaling is not None
    assert preset("small", dim=1024).head_dim == 64
