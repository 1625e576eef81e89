"""Hugging Face directories as directories: files, types, what is missing, what is too much."""

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llama import Transformer
from llama.hf import UnsupportedModel, load_pretrained, load_weights, save_pretrained
from llama.hf_files import DirectoryWriter, Slot
from llama.tokenizer import Tokenizer
from tests.llama.hf_cases import VOCAB, build, edit_config, edit_weights, experts, small_tokenizer

SHARD = 20_000
EMBEDDINGS = "model.embed_tokens.weight"


def same_weights(first: Transformer, second: Transformer) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def contents(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


MODELS = {
    "dense": {},
    "interleaved": {"rope_layout": "interleaved"},
    "experts": {"moe": experts(num_shared_experts=1, bias_update_rate=0.1)},
    "running statistics": {"norm": "batchnorm"},
    "caravan's own": {"position": "t5", "activation": "swish_learned", "moe": experts(bias_update_rate=0.1)},
}


@pytest.mark.parametrize("max_shard_size", [SHARD, 10**9])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_a_model_comes_back_to_the_bit(tmp_path: Path, settings: dict, max_shard_size: int) -> None:
    model = build(**settings)
    save_pretrained(model, tmp_path, max_shard_size=max_shard_size)
    loaded = load_pretrained(tmp_path)
    assert not loaded.training
    if settings.get("rope_layout") == "interleaved":
        # The rows change places; the function stays, see test_hf_architectures.
        assert loaded.config.rope_layout == "half" and not same_weights(loaded, model)
        save_pretrained(loaded, tmp_path / "again")
        model, loaded = loaded, load_pretrained(tmp_path / "again")
    assert same_weights(loaded, model)


def test_shards_keep_to_their_size_and_the_index_lists_every_tensor(tmp_path: Path) -> None:
    model = build()
    save_pretrained(model, tmp_path, max_shard_size=SHARD)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert [path.name for path in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = {path.name: {name: tensor.nbytes for name, tensor in load_file(path).items()} for path in shards}
    assert all(sum(tensors.values()) <= SHARD or len(tensors) == 1 for tensors in sizes.values())
    assert index["weight_map"] == {name: file for file, tensors in sizes.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(sum(tensors.values()) for tensors in sizes.values())


def test_files_are_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.randn(7), "scalar": torch.tensor(2.5)}
    slots = [Slot(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    DirectoryWriter(tmp_path, with_tokenizer=False).write_weights(slots, tensors.values(), 10**6)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_no_more_than_one_tensor_is_held_beside_the_model(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[Tensor]:
        for _ in range(9):
            tensor = torch.ones(4, 4)
            alive.append(weakref.ref(tensor))
            # The writer's last one may still be there; all before must be gone.
            assert sum(reference() is not None for reference in alive) <= 2
            yield tensor
            del tensor

    slots = [Slot(f"t{i}", (4, 4), torch.float32) for i in range(9)]
    DirectoryWriter(tmp_path, with_tokenizer=False).write_weights(slots, stream(), 4 * 64)
    assert len(alive) == 9 and len(list(tmp_path.glob("*.safetensors"))) == 3


def test_an_older_model_leaves_nothing_behind(tmp_path: Path) -> None:
    save_pretrained(build(num_layers=5), tmp_path, small_tokenizer(), max_shard_size=SHARD)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < contents(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    for size in (SHARD, 10**9, SHARD):
        model = build(num_layers=2)
        save_pretrained(model, tmp_path, small_tokenizer(), max_shard_size=size)
        assert same_weights(load_pretrained(tmp_path), model)
        save_pretrained(model, tmp_path / "fresh", small_tokenizer(), max_shard_size=size)
        assert contents(tmp_path) - {"notes.txt", "fresh"} == contents(tmp_path / "fresh")
    save_pretrained(model, tmp_path, small_tokenizer(chat_template=None))
    assert "tokenizer.json" in contents(tmp_path) and "chat_template.jinja" not in contents(tmp_path)


def test_a_tokenizer_stays_where_none_is_given(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path, small_tokenizer(), max_shard_size=SHARD)
    before = {name: (tmp_path / name).read_bytes() for name in contents(tmp_path) if not name.startswith("model")}
    del before["config.json"]
    save_pretrained(load_pretrained(tmp_path), tmp_path, dtype=torch.bfloat16)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert "model.safetensors.index.json" not in contents(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": torch.int8}, "dtype=torch.int8 cannot be written"),
        ({"dtype": torch.float8_e4m3fn}, "dtype=torch.float8_e4m3fn cannot be written"),
        (
            {"tokenizer": small_tokenizer(VOCAB + 1)},
            f"tokenizer.vocab_size={VOCAB + 1} exceeds model.vocab_size={VOCAB}",
        ),
    ],
    ids=["int8", "float8", "a larger tokenizer"],
)
def test_what_cannot_be_saved_leaves_the_older_model(tmp_path: Path, arguments: dict, words: str) -> None:
    model = build()
    save_pretrained(model, tmp_path, small_tokenizer())
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        save_pretrained(build(tie_embeddings=True), tmp_path, **arguments)
    assert words in str(error.value)
    assert contents(tmp_path) == before and same_weights(load_pretrained(tmp_path), model)


def token_ids(directory: Path) -> list[dict]:
    """What the model's files say of special tokens: once for `config.json`, once for `generation_config.json`."""
    files = [json.loads((directory / name).read_text()) for name in ("config.json", "generation_config.json")]
    return [{key: value for key, value in file.items() if key.endswith("token_id")} for file in files]


def test_absent_special_tokens_stay_absent(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path, small_tokenizer())
    assert token_ids(tmp_path) == [{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}] * 2
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (saved["bos_token"], saved["eos_token"], saved["pad_token"]) == (None, "<eos>", None)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 0, 0)
    save_pretrained(build(), tmp_path, small_tokenizer(bos_token="<bos>", pad_token="<end>"))
    assert token_ids(tmp_path) == [{"bos_token_id": 2, "eos_token_id": 0, "pad_token_id": 1}] * 2


def test_every_end_token_is_read_and_written_back(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path, small_tokenizer())
    assert Tokenizer.load(tmp_path).eos_ids == {0}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 0, 1]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_ids == {0, 1, 5} and tokenizer.eos_id == 0
    save_pretrained(build(), tmp_path, tokenizer)
    assert [ids["eos_token_id"] for ids in token_ids(tmp_path)] == [[0, 1, 5]] * 2
    assert Tokenizer.load(tmp_path).eos_ids == {0, 1, 5}
    path.write_text(json.dumps({"eos_token_id": 1}))
    assert Tokenizer.load(tmp_path).eos_ids == {0, 1}
    for wrong in ([0, VOCAB], True, "<end>", [-1], [1.0]):
        path.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match="eos_token_id=.* is no id"):
            Tokenizer.load(tmp_path)


def test_an_export_that_fails_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(build(), tmp_path)
    write, written = DirectoryWriter._write_shard, []

    def failing(self: DirectoryWriter, name: str, slots: list[Slot], tensors: Iterator[Tensor]) -> None:
        if len(written) == 1:
            tensors = iter([next(tensors), torch.zeros(1)])
        write(self, name, slots, tensors)
        written.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryWriter, "_write_shard", failing)
        with pytest.raises(ValueError, match="has shape"):
            save_pretrained(build(), tmp_path, max_shard_size=SHARD)
    assert len(written) == 1 and any(name.endswith(".partial") for name in contents(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path)
    save_pretrained(build(), tmp_path)
    assert contents(tmp_path) == {"model.safetensors", "config.json", "generation_config.json"}


def test_stored_type_is_the_one_asked_for(tmp_path: Path) -> None:
    model = build(moe=experts(bias_update_rate=0.1))
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert {dtype for name, dtype in stored.items() if not name.endswith("correction_bias")} == {torch.bfloat16}
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16)
    router = loaded.layers[0].feed_forward.router
    assert router.expert_bias.dtype == torch.float32 and router.weight.dtype == torch.bfloat16
    assert torch.equal(router.expert_bias, model.layers[0].feed_forward.router.expert_bias)
    assert torch.equal(loaded.tok_embeddings.weight, model.tok_embeddings.weight.bfloat16())


def test_running_statistics_stay_fp32(tmp_path: Path) -> None:
    model = build(norm="batchnorm")
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for mine, other in zip(model.buffers(), loaded.buffers(), strict=True):
        assert other.dtype == torch.float32 and torch.equal(mine, other)
    other = build(norm="layernorm")
    with pytest.raises(UnsupportedModel, match=r"a model of model\.norm=batchnorm, not layernorm"):
        load_weights(tmp_path, other)
    edit_weights(tmp_path, lambda tensors: tensors.pop("model.norm.running_var"))
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.running_var is missing"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 70}, f"{EMBEDDINGS} has shape [67, 32], config.json calls for [70, 32]"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight and 8 more belongs to nothing"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias is missing"),
        ({"tie_word_embeddings": True}, f"lm_head.weight differs from {EMBEDDINGS}"),
        ({"model_type": "qwen3"}, "model.layers.0.self_attn.q_norm.weight is missing"),
    ],
    ids=str,
)
def test_config_and_tensors_must_agree(tmp_path: Path, changes: dict, words: str) -> None:
    save_pretrained(build(), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModel) as error:
        load_pretrained(tmp_path)
    assert words in str(error.value)


def test_harmless_left_overs_are_left(tmp_path: Path) -> None:
    model = build(tie_embeddings=True)
    save_pretrained(model, tmp_path)
    edit_weights(
        tmp_path,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors[EMBEDDINGS].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
            }
        ),
    )
    assert same_weights(load_pretrained(tmp_path), model)


def test_ernies_unread_tensors_are_left_and_absent_routing_biases_are_zero(tmp_path: Path) -> None:
    save_pretrained(build(moe=experts(bias_update_rate=0.1)), tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.mtp_block.0.self_attn.q_proj.weight"] = torch.ones(2, 2)
        del tensors["model.layers.1.mlp.moe_statics.e_score_correction_bias"]

    edit_weights(tmp_path, edit)
    loaded = load_pretrained(tmp_path)
    assert loaded.layers[0].feed_forward.router.expert_bias.abs().sum() > 0
    assert loaded.layers[1].feed_forward.router.expert_bias.abs().sum() == 0


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.update({"model.layers.0.mlp.extra": torch.ones(1)}), "model.layers.0.mlp.extra belongs to"),
        (lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].to(torch.float8_e4m3fn)}), f"{EMBEDDINGS} is torch.float8_e4m3"),
        (lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].to(torch.int32)}), f"{EMBEDDINGS} is torch.int32"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    ],
    ids=["unknown", "float8", "integers", "missing"],
)
def test_tensors_that_do_not_belong_are_named(tmp_path: Path, edit: Callable, words: str) -> None:
    save_pretrained(build(), tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(UnsupportedModel) as error:
        load_pretrained(tmp_path)
    assert words in str(error.value)
