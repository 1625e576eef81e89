"""Hugging Face directories against transformers, both ways."""

import json
from pathlib import Path

import pytest
import torch

from llama import ModelConfig, MoEConfig, Transformer
from llama.hf import UnsupportedModel, check_exportable, load_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")

MOES = {
    "dense": None,
    "moe": MoEConfig(num_experts=4, num_shared_experts=1, expert_hidden_dim=16),
    "moe after a dense layer": MoEConfig(num_experts=8, top_k=3, expert_hidden_dim=8, first_dense_layers=1),
}


def build(moe: MoEConfig | None, **settings) -> Transformer:
    config = ModelConfig(
        **{"vocab_size": 67, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "moe": moe, **settings}
    )
    model = Transformer(config)
    model.init_weights(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(torch.rand_like(parameter))
        for buffer in model.buffers():
            buffer.copy_(torch.tensor([0.05, -0.05]).repeat(len(buffer) // 2))
    return model.eval()


@pytest.mark.parametrize("moe", MOES.values(), ids=MOES.keys())
@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": False, "head_dim": 12}, {"num_kv_heads": 1}], ids=str)
def test_transformers_computes_the_same_logits(tmp_path: Path, moe: MoEConfig | None, settings: dict) -> None:
    model = build(moe, **settings)
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(67, (2, 21))
    with torch.no_grad():
        ours, reference = model(tokens), theirs(tokens).logits
    assert (ours - reference).abs().max() / reference.abs().max() <= 1e-5

    loaded = load_pretrained(tmp_path)
    assert loaded.config.num_parameters() == model.config.num_parameters()
    with torch.no_grad():
        assert torch.equal(loaded(tokens), ours)


@pytest.mark.parametrize("moe", [None, MOES["moe"]], ids=["dense", "moe"])
def test_loads_what_transformers_saved(tmp_path: Path, moe: MoEConfig | None) -> None:
    save_pretrained(build(moe), tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # several files and an index
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    tokens = torch.randint(67, (1, 9))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(load_pretrained(tmp_path / "theirs")(tokens), expected, atol=1e-5, rtol=1e-5)


def test_stored_type_is_the_one_asked_for(tmp_path: Path) -> None:
    model = build(MOES["moe"])
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.tok_embeddings.weight.dtype == torch.bfloat16
    assert loaded.layers[0].feed_forward.router.expert_bias.dtype == torch.float32
    assert torch.equal(loaded.tok_embeddings.weight, model.tok_embeddings.weight.bfloat16())


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"vocab_size": 70}, "model.embed_tokens.weight has shape [67, 32]"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path: Path, changes: dict, word: str) -> None:
    save_pretrained(build(None), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModel) as error:
        load_pretrained(tmp_path)
    assert word in str(error.value)


def test_unnormalised_gates_cannot_be_exported_and_leave_nothing(tmp_path: Path) -> None:
    model = build(MoEConfig(num_experts=4, normalize_top_k=False))
    with pytest.raises(UnsupportedModel, match="normalize_top_k=False"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_known_from_the_config() -> None:
    for moe in MOES.values():
        check_exportable(ModelConfig(moe=moe))
    with pytest.raises(UnsupportedModel, match=r"model\.moe\.normalize_top_k=False"):
        check_exportable(ModelConfig(moe=MoEConfig(num_experts=4, normalize_top_k=False)))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path)
    save_pretrained(build(None), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors"):
        load_pretrained(tmp_path)
