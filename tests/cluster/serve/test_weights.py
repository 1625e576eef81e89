"""Finding a model by its URI, and naming its weights by content."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.artifact import Artifact
from cluster.serve.weights import (
    AnotherModel,
    ModelNotFound,
    check_model,
    check_replaceable,
    family,
    fetch_model,
    shape_id,
    weights_id,
)
from cluster.storage import Store
from tests.cluster.serve.tiny_model import save_tiny_model

ROOT = Path(__file__).parents[3]


def _write_model(directory: Path, weights: bytes = b"weights") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def test_a_local_directory_is_used_where_it_lies(tmp_path):
    model = _write_model(tmp_path / "model")
    assert fetch_model(str(model), tmp_path / "cache") == model
    assert fetch_model(f"file://{model}", tmp_path / "cache") == model


def test_a_committed_export_is_used_and_an_uncommitted_one_is_not(tmp_path):
    store = Store(str(tmp_path / "export"))
    attempt = Artifact(store).begin()
    local = attempt.store.local_path()
    assert local is not None
    _write_model(local)
    with pytest.raises(ModelNotFound, match="neither a Hugging Face directory"):
        fetch_model(str(tmp_path / "export"), tmp_path / "cache")
    attempt.commit({})
    assert (fetch_model(str(tmp_path / "export"), tmp_path / "cache") / "config.json").is_file()


def test_what_is_not_a_model_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match="nowhere"):
        check_model(str(tmp_path / "nowhere"))


def test_weights_and_tokenizer_are_named_by_content_not_by_place_or_time(tmp_path):
    one = weights_id(_write_model(tmp_path / "one"))
    assert weights_id(_write_model(tmp_path / "two")) == one
    assert weights_id(_write_model(tmp_path / "three", b"Weights")) != one
    (tmp_path / "two" / "README.md").write_text("{}")
    assert weights_id(tmp_path / "two") == one
    (tmp_path / "three" / "model.safetensors").write_bytes(b"weights")
    assert weights_id(tmp_path / "three") == one
    (tmp_path / "three" / "tokenizer.json").write_text("{}")
    assert weights_id(tmp_path / "three") != one
    (tmp_path / "two" / "other.safetensors").write_bytes(b"not read")
    assert weights_id(tmp_path / "two") == one
    (tmp_path / "two" / "config.json").write_text('{"rope_theta": 500000.0}')
    assert weights_id(tmp_path / "two") != one


def test_the_files_of_an_index_are_the_weights(tmp_path):
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

    def write(name: str, *weights: bytes) -> str:
        directory = _write_model(tmp_path / name)
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {str(i): file for i, file in enumerate(names)}})
        )
        for file, content in zip((*names, "other.safetensors"), weights, strict=False):
            (directory / file).write_bytes(content)
        return weights_id(directory)

    assert write("one", b"a", b"b") == write("two", b"a", b"b", b"not read") != write("three", b"a", b"c")


def _write_config(directory: Path, **changed: object) -> str:
    _write_model(directory)
    content = {"model_type": "caravan", "model": {"dim": 64, "num_layers": 2, "num_heads": 4}}
    content["model"] |= changed  # type: ignore[operator]
    (directory / "config.json").write_text(json.dumps(content))
    (directory / "tokenizer.json").write_text("{}")
    return str(directory)


def test_weights_can_be_exchanged_where_architecture_and_tokenizer_are_the_same(tmp_path):
    old, new = _write_config(tmp_path / "old"), _write_config(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").write_bytes(b"others")
    check_replaceable(old, new)
    with pytest.raises(AnotherModel, match="wide has another architecture than .*without --update"):
        check_replaceable(old, _write_config(tmp_path / "wide", dim=128))
    (tmp_path / "new" / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(AnotherModel, match="another tokenizer"):
        check_replaceable(old, new)
    with pytest.raises(ModelNotFound):
        check_replaceable(old, str(tmp_path / "nowhere"))


def test_a_family_is_of_one_model_under_one_name(tmp_path):
    one = _write_config(tmp_path / "one")
    name = family(one, "m")
    (tmp_path / "one" / "model.safetensors").write_bytes(b"others")
    assert family(one, "m") == name
    others = {family(one, "n"), family(_write_config(tmp_path / "two"), "m")}
    (tmp_path / "one" / "tokenizer.json").write_text('{"a": 1}')
    assert len(others | {name, family(one, "m")}) == 4


def test_all_processes_call_a_model_the_same(tmp_path):
    model = str(save_tiny_model(tmp_path / "model"))
    code = f"from cluster.serve.weights import shape_id; print(shape_id({model!r}))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert said.strip() == shape_id(model)
