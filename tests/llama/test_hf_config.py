"""config.json, both ways."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from llama import ModelConfig, MoEConfig
from llama.config import RopeScaling
from llama.hf import UnsupportedModel, export_architecture
from llama.hf_architectures import ARCHITECTURES, Architecture
from llama.hf_caravan import write_caravan_config
from llama.hf_config import find_architecture, read_config, write_config
from llama.presets import PRESETS

transformers = pytest.importorskip("transformers")
by_model_type = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model_type)


def config_class(architecture: Architecture) -> Any:
    return type(transformers.AutoConfig.for_model(architecture.model_type))


@by_model_type
def test_defaults_are_those_of_transformers(architecture: Architecture) -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(config_class(architecture))}
    # Read as an attribute that some classes do not declare; absent it follows from the other sizes.
    optional = {"head_dim"} - set(theirs)
    declared = {key: value for key, value in architecture.defaults.items() if key not in optional}
    assert declared == {key: theirs[key] for key in declared}
    assert all(architecture.defaults[key] is None for key in optional)
    assert all(theirs.get(key) == value for key, value in architecture.only.items())
    assert architecture.rope_theta == config_class(architecture).default_theta


@by_model_type
def test_an_empty_config_is_the_model_that_transformers_builds(architecture: Architecture) -> None:
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config_class(architecture)())
    expected = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    config, _ = read_config({"model_type": architecture.model_type})
    assert config.num_parameters() == expected


@by_model_type
def test_what_is_written_reads_back(architecture: Architecture) -> None:
    config, _ = read_config({"model_type": architecture.model_type})
    assert read_config(write_config(config, architecture)) == (config, architecture)
    assert find_architecture(config, expert_bias=False) is architecture


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama-2-7b", "LlamaForCausalLM"),
        ("llama-3.1-8b", "LlamaForCausalLM"),
        ("mixtral-8x7b", "MixtralForCausalLM"),
        ("qwen3-0.6b", "Qwen3ForCausalLM"),
        ("qwen3-30b-a3b", "Qwen3MoeForCausalLM"),
    ],
)
def test_presets_are_written_as_what_they_are(name: str, architecture: str) -> None:
    assert export_architecture(PRESETS[name]) == architecture


ROPES: dict[str, tuple[dict[str, Any], float, RopeScaling | None]] = {
    "default": ({"rope_type": "default"}, 7000.0, None),
    "linear": ({"type": "linear", "factor": 2}, 7000.0, RopeScaling("linear", 2.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 7000.0, RopeScaling("dynamic_ntk", 2.0, 64)),
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, 7000.0, RopeScaling("yarn", 4.0, 64)),
    "yarn beside the stretched length": (
        {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 16},
        7000.0,
        RopeScaling("yarn", 2.5, 16),
    ),
    "yarn with its own length": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 20,
            "truncate": False,
        },
        7000.0,
        RopeScaling("yarn", 4.0, 16, beta_fast=20, truncate=False),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        7000.0,
        RopeScaling("llama3", 8.0, 32),
    ),
    "its own theta wins": ({"rope_type": "linear", "factor": 2.0, "rope_theta": 99.0}, 99.0, RopeScaling("linear", 2)),
}


@pytest.mark.parametrize(("rope", "theta", "scaling"), ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
def test_both_layouts_of_rotary_scaling_are_read(
    layout: str, rope: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    config, _ = read_config({"model_type": "llama", "max_position_embeddings": 64, "rope_theta": 7000.0, layout: rope})
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    # Without a length of its own yarn stretches max_position_embeddings; linear leaves it, whatever its factor.
    lengths = {"dynamic": 128, "yarn": 256 if len(rope) == 2 else 64}
    assert config.max_seq_len == lengths.get(rope.get("rope_type", ""), 64)


def test_yarn_of_qwen_instruct_reaches_as_far_as_it_is_stretched() -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config, architecture = read_config(
        {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_scaling": rope, "rope_theta": 1000000.0}
    )
    assert config.max_seq_len == 131072 and architecture is not None
    assert read_config(write_config(config, architecture)) == (config, architecture)


def test_layer_types_that_say_what_the_window_says_are_read() -> None:
    mistral = {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 8}
    expected = read_config(mistral)
    assert read_config({**mistral, "layer_types": ["sliding_attention"] * 2}) == expected
    assert read_config({**mistral, "layer_types": None}) == expected


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({}, "model_type=None"),
        ({"model_type": "llama", "hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "longrope", "factor": 4}}, "rope_type='longrope'"),
        ({"model_type": "llama", "rope_scaling": {"type": "su"}}, "rope_type='su'"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2, "mscale": 3}}, "mscale=3"),
        ({"model_type": "qwen2", "rope_parameters": {"full_attention": {"rope_theta": 1}}}, "full_attention={"),
        ({"model_type": "llama", "hidden_size": 100, "head_dim": 16}, "hidden_size=100"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_kv_heads=5"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"model_type": "olmoe", "head_dim": 64}, "head_dim=64"),
        ({"model_type": "ernie4_5_moe", "use_bias": True}, "use_bias=True"),
        ({"model_type": "ernie4_5_moe", "moe_norm_min": 0.1}, "moe_norm_min=0.1"),
        ({"model_type": "mixtral", "num_experts": 4, "num_local_experts": 8}, "num_experts=4"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types=['full_attention']"),
        (
            {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "use_sliding_window=False",
        ),
        ({"model_type": "qwen2_moe", "use_sliding_window": True}, "max_window_layers=28"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 30}, "every=30"),
        ({"model_type": "qwen2_moe", "moe_intermediate_size": 0}, "no valid model"),
        ({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 0}, "shared_gate=True"),
        ({"model_type": "qwen2", "num_hidden_layers": "many"}, "num_hidden_layers='many'"),
        ({"model_type": "llama", "vocab_size": True}, "vocab_size=True"),
        ({"model_type": "llama", "hidden_size": 4096.0}, "hidden_size=4096.0"),
        ({"model_type": "llama", "max_position_embeddings": "2048"}, "max_position_embeddings='2048'"),
        ({"model_type": "mixtral", "num_local_experts": [8]}, "num_local_experts=[8]"),
        ({"model_type": "llama", "tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ({"model_type": "llama", "rms_norm_eps": math.inf}, "rms_norm_eps=inf"),
        ({"model_type": "llama", "rope_theta": math.nan}, "rope_theta=nan"),
        ({"model_type": "llama", "rope_theta": 10**400}, "rope_theta=1000"),
        ({"model_type": "llama", "rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"model_type": "llama", "rope_theta": True}, "rope_theta=True"),
        ({"model_type": "llama", "rope_scaling": "yarn"}, "rope_scaling='yarn'"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'"),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "x"}}, "beta_fast='x'"),
        ({"model_type": "llama", "rope_scaling": {"type": ["yarn"]}}, "no valid model"),
        ({"model_type": "llama", "hidden_act": ["silu"]}, "no valid model"),
        ({"model_type": "ernie4_5_moe", "moe_layer_end_index": -(10**12)}, "no expert layer"),
        *(({"model_type": kind, "is_causal": False}, "is_causal=False") for kind in ("llama", "qwen3_moe")),
        ({"model_type": "llama", "is_causal": None}, "is_causal=None"),
        (
            {"model_type": "mistral", "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types=['full_attention', 'sliding_attention']",
        ),
        (
            {"model_type": "mistral", "sliding_window": None, "layer_types": ["sliding_attention"] * 32},
            "sliding_window=None",
        ),
        ({"model_type": "caravan"}, "model=None"),
        ({"model_type": "caravan", "model": {"wings": 2}}, "model.wings"),
        ({"model_type": "caravan", "model": {"moe": {"num_experts": 2, "legs": 4}}}, "model.moe.legs"),
        ({"model_type": "caravan", "model": {"moe": [2]}}, "model.moe=[2]"),
        ({"model_type": "caravan", "model": {"moe": {"num_experts": 2, "dense_layers": 1}}}, "no valid model"),
        ({"model_type": "caravan", "model": {"rope_scaling": "yarn"}}, "model.rope_scaling='yarn'"),
        ({"model_type": "caravan", "model": {"dim": -1}}, "model.dim=-1"),
        ({"model_type": "caravan", "model": {"dim": 512.0}}, "model.dim=512.0"),
        ({"model_type": "caravan", "model": {"num_kv_heads": True}}, "model.num_kv_heads=True"),
        ({"model_type": "caravan", "model": {"rope_theta": math.inf}}, "model.rope_theta=inf"),
    ],
    ids=str,
)
def test_what_cannot_be_represented_is_refused_by_name_and_value(hf: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        read_config(hf)
    assert words in str(error.value)


MOE = MoEConfig(num_experts=4, num_shared_experts=1)
OWN: dict[str, ModelConfig] = {
    "alibi": ModelConfig(position="alibi"),
    "no positions": ModelConfig(position="none"),
    "layernorm": ModelConfig(norm="layernorm"),
    "batchnorm": ModelConfig(norm="batchnorm"),
    "post-norm": ModelConfig(norm_placement="post"),
    "no gate": ModelConfig(activation="gelu"),
    "softcap": ModelConfig(attention_softcap=30.0),
    "some windows without biases": ModelConfig(sliding_window=64, full_attention_layers=2),
    "sigmoid routing": ModelConfig(moe=dataclasses.replace(MOE, score="sigmoid")),
    "scaled routing": ModelConfig(moe=dataclasses.replace(MOE, route_scale=2.5)),
    "unnormalised routing": ModelConfig(moe=dataclasses.replace(MOE, normalize_top_k=False)),
    "odd shared experts": ModelConfig(moe=dataclasses.replace(MOE, shared_hidden_dim=100)),
    "biased routing with q/k norm": ModelConfig(qk_norm="head", moe=MoEConfig(4, bias_update_rate=0.001)),
    "gate and routing biases": ModelConfig(moe=dataclasses.replace(MOE, shared_gate=True, bias_update_rate=0.001)),
    "holes between experts": ModelConfig(moe=dataclasses.replace(MOE, dense_layers=(3,))),
}


@pytest.mark.parametrize("config", OWN.values(), ids=OWN.keys())
def test_what_no_architecture_expresses_is_caravans_own(config: ModelConfig) -> None:
    assert export_architecture(config) == "CaravanForCausalLM"
    assert read_config(json.loads(json.dumps(write_caravan_config(config)))) == (config, None)


def test_settings_of_training_do_not_choose_the_architecture() -> None:
    moe = MoEConfig(4, capacity_factor=1.0, balance_loss="expert_load", z_loss_weight=0.1, gate_init="kaiming_uniform")
    config = ModelConfig(moe=moe, attention_dropout=0.1, residual_dropout=0.1, init="article", multiple_of=8)
    assert export_architecture(config) == "MixtralForCausalLM"


def test_trained_routing_biases_choose_the_architecture() -> None:
    config = ModelConfig(moe=MoEConfig(4))
    assert find_architecture(config, expert_bias=True).name == "Ernie4_5_MoeForCausalLM"  # type: ignore[union-attr]
    assert find_architecture(ModelConfig(moe=MoEConfig(4, score="sigmoid")), expert_bias=True) is None
