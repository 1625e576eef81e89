"""Every architecture against transformers' own implementation: ours written, theirs read, and the other way round."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Transformer
from llama.config import RopeScaling
from llama.hf import export_architecture, load_pretrained, save_pretrained
from tests.llama.hf_cases import VOCAB, build, error, experts, load_theirs, randomize, tokens

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

# A window is shorter than the sequences below; lengths pass the original ones of the scalings.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "all biases": ("Llama", {"attention_bias": "qkvo", "ffn_bias": True}),
    "tied": ("Llama", {"tie_embeddings": True}),
    "interleaved": ("Llama", {"rope_layout": "interleaved", "attention_bias": "qkvo"}),
    "another gate": ("Llama", {"activation": "geglu"}),
    "linear": ("Llama", {"rope_scaling": RopeScaling("linear", 2.5)}),
    "ntk": ("Llama", {"rope_scaling": RopeScaling("ntk", 2.5)}),
    "dynamic ntk": ("Llama", {"rope_scaling": RopeScaling("dynamic_ntk", 4.0, 32)}),
    "yarn": ("Llama", {"rope_scaling": RopeScaling("yarn", 4.0, 16), "rope_theta": 50000.0}),
    "yarn with settings": (
        "Llama",
        {"rope_scaling": RopeScaling("yarn", 4.0, 64, beta_fast=8, beta_slow=2, attention_factor=1.3, truncate=False)},
    ),
    "llama3": ("Llama", {"rope_scaling": RopeScaling("llama3", 8.0, 32, low_freq_factor=1.5, high_freq_factor=3.0)}),
    "a window": ("Mistral", {"sliding_window": 7}),
    "dim not divisible by heads": ("Mistral", {"dim": 30}),
    "query biases": ("Qwen2", {"attention_bias": "qkv", "tie_embeddings": True}),
    "a window in some layers": ("Qwen2", {"attention_bias": "qkv", "sliding_window": 6, "full_attention_layers": 1}),
    "q/k norm": ("Qwen3", {"qk_norm": "head", "rope_layout": "interleaved"}),
    "q/k norm and more": ("Qwen3", {"qk_norm": "head", "attention_bias": "qkvo", "sliding_window": 6}),
    "experts": ("Mixtral", {"moe": experts(capacity_factor=1.5), "sliding_window": 5, "activation": "reglu"}),
    "gated shared expert": (
        "Qwen2Moe",
        {
            "moe": experts(num_shared_experts=1, shared_hidden_dim=20, shared_gate=True, every=2),
            "attention_bias": "qkv",
            "sliding_window": 5,
            "full_attention_layers": 1,
        },
    ),
    "experts and q/k norm": (
        "Qwen3Moe",
        {"moe": experts(first_dense_layers=1, normalize_top_k=False), "qk_norm": "head", "sliding_window": 9},
    ),
    "norm over all heads": (
        "Olmoe",
        {"moe": experts(), "qk_norm": "full", "head_dim": 8, "num_kv_heads": 2, "rope_layout": "interleaved"},
    ),
    "shared experts": ("Ernie4_5_Moe", {"moe": experts(num_shared_experts=2, dense_layers=(0, 2))}),
    "biased routing": ("Ernie4_5_Moe", {"moe": experts(bias_update_rate=0.1), "tie_embeddings": True}),
}


@pytest.mark.parametrize(("name", "settings"), OURS.values(), ids=OURS.keys())
def test_transformers_computes_what_ours_does(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    model = build(**settings)
    assert save_pretrained(model, tmp_path) == export_architecture(model.config) == f"{name}ForCausalLM"
    theirs = load_theirs(tmp_path)
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    batch = tokens(2, 41)
    with torch.no_grad():
        expected = theirs(batch).logits
        assert error(model(batch), expected) <= 1e-5
        loaded = load_pretrained(tmp_path)
        assert error(loaded(batch), expected) <= 1e-5
    assert greedy(loaded) == greedy_theirs(theirs)


def greedy(model: Transformer) -> list[int]:
    found = model.generate(tokens(1, 21)[0].tolist(), max_new_tokens=64, temperature=0.0)
    return [int(token) for token in found]  # type: ignore[arg-type]


def greedy_theirs(model: Any) -> list[int]:
    # Their cache keeps keys of dynamic NTK turned by the frequencies of shorter sequences.
    use_cache = model.config.rope_parameters["rope_type"] != "dynamic"
    prompt = tokens(1, 21)
    model.generation_config.eos_token_id = None
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, use_cache=use_cache
    )
    return answer[0, 21:].tolist()


SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "pad_token_id": None,
}
SPARSE = {"num_experts": 5, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
THEIRS: dict[str, dict[str, Any]] = {
    "Llama": {"mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "Mistral": {"sliding_window": 6, "head_dim": 12},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
        "max_position_embeddings": 128,
    },
    "Mixtral": {"num_local_experts": 5, "sliding_window": 7},
    "Qwen2Moe": {**SPARSE, "decoder_sparse_step": 2, "mlp_only_layers": [3], "shared_expert_intermediate_size": 20},
    "Qwen3Moe": {**SPARSE, "mlp_only_layers": [2], "norm_topk_prob": True, "tie_word_embeddings": True},
    "Olmoe": {"num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 2, "eos_token_id": None},
    "Ernie4_5_Moe": {
        "moe_num_experts": 5,
        "moe_intermediate_size": 16,
        "moe_k": 2,
        "moe_layer_end_index": 2,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("name", THEIRS)
def test_ours_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **THEIRS[name]})
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = load_pretrained(tmp_path / "theirs")
    batch = tokens(2, 41)
    with torch.no_grad():
        expected = theirs(batch).logits
        assert error(ours(batch), expected) <= 1e-5
    answer = greedy(ours)
    assert answer == greedy_theirs(theirs) and len(set(answer)) > 2

    # And back, to the bit.
    assert save_pretrained(ours, tmp_path / "ours") == f"{name}ForCausalLM"
    again = load_theirs(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in theirs.state_dict().items())

    # In bf16 the error is about that of transformers' own bf16 against its fp32.
    save_pretrained(ours, tmp_path / "half", dtype=torch.bfloat16)
    with torch.no_grad():
        reference = load_theirs(tmp_path / "half")(batch).logits
        theirs_half = load_theirs(tmp_path / "half", torch.bfloat16)(batch).logits
        ours_half = load_pretrained(tmp_path / "half", torch.bfloat16)(batch)
    assert ours_half.dtype == torch.bfloat16
    assert middle_error(ours_half, reference) <= 1.5 * middle_error(theirs_half, reference)


def middle_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """The median, which a few tokens routed to other experts do not move."""
    return float((actual.float() - reference).abs().median())
