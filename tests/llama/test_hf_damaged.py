"""Directories that are damaged, incomplete or meant to do harm: one clear error, and nothing allocated for them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama.hf import UnsupportedModel, load_pretrained, save_pretrained
from llama.hf_files import StoredTensors
from tests.llama.hf_cases import build, edit_config, edit_weights, experts

SHARD = 20_000
HUGE = 10**12


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({}, {"num_hidden_layers": HUGE}, f"num_hidden_layers={HUGE}, and the files hold 30 tensors"),
        ({}, {"vocab_size": HUGE}, f"config.json calls for [{HUGE}, 32]"),
        ({"moe": experts()}, {"num_local_experts": HUGE}, f"config.json calls for [{HUGE}, 32]"),
        ({"position": "alibi"}, {"num_layers": HUGE}, f"num_layers={HUGE}, and the files hold 30 tensors"),
        ({"position": "learned"}, {"max_seq_len": HUGE}, f"config.json calls for [{HUGE}, 32]"),
        ({"position": "alibi"}, {"num_layers": [1]}, "model.num_layers=[1]"),
    ],
    ids=str,
)
def test_a_config_cannot_claim_more_than_the_files_hold(
    tmp_path: Path, settings: dict, changes: dict, words: str
) -> None:
    save_pretrained(build(**settings), tmp_path)
    if "position" in settings:
        changes = {"model": {**json.loads((tmp_path / "config.json").read_text())["model"], **changes}}
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModel) as error:
        load_pretrained(tmp_path)
    assert words in str(error.value)


def test_experts_are_counted_in_the_files(tmp_path: Path) -> None:
    """A router of the claimed size is not enough."""
    save_pretrained(build(moe=experts()), tmp_path)
    edit_config(tmp_path, num_local_experts=50_000)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    edit_weights(tmp_path, lambda tensors: tensors.update({router: torch.zeros(50_000, 32)}))
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.block_sparse_moe\.experts\.5\.w1\.weight is missing"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x04\0\0\0\0\0\0\0{}{}"])
def test_a_damaged_weights_file_is_named(tmp_path: Path, content: bytes) -> None:
    save_pretrained(build(), tmp_path)
    path = tmp_path / "model.safetensors"
    for damaged in (content, path.read_bytes()[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(UnsupportedModel, match=r"model\.safetensors is damaged"):
            load_pretrained(tmp_path)
        save_pretrained(build(), tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "[" * 10**5])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    save_pretrained(build(), tmp_path, max_shard_size=SHARD)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors\.index\.json"):
        load_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path)
    save_pretrained(build(), tmp_path, max_shard_size=SHARD)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(UnsupportedModel, match="model-00002-of-"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"holds no model\.safetensors"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="is not JSON"):
        load_pretrained(tmp_path)


def test_an_index_is_believed_only_as_far_as_its_own_directory(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path / "secret")
    inside = tmp_path / "model"
    save_pretrained(build(), inside, max_shard_size=SHARD)
    index = json.loads((inside / "model.safetensors.index.json").read_text())
    lying = {name: "../secret/model.safetensors" for name in index["weight_map"]}
    (inside / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": lying}))
    with pytest.raises(UnsupportedModel, match=r"holds no model\.safetensors"):
        load_pretrained(inside)


def test_a_tensor_is_in_one_file_and_where_the_index_says(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "y.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(UnsupportedModel, match="tensor b is in another file, too"):
        StoredTensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}}))
    with pytest.raises(UnsupportedModel, match=r"tensor c of model\.safetensors\.index\.json"):
        StoredTensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "y.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(UnsupportedModel, match=r"tensor a of .* is in x\.safetensors, not in y\.safetensors"):
        StoredTensors(tmp_path)
