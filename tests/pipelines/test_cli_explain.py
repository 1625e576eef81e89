"""`caravan explain`: every component draws, and what cannot be explained is a line and no picture."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.storage import Store
from llama.hf import save_pretrained
from llama.tokenizer_training import train_tokenizer
from pipelines.explain.registry import COMPONENTS
from tests.pipelines.commands import type_here
from tests.pipelines.explain.test_routing import model_of
from tests.pipelines.trained_run import make_run


def test_without_a_component_all_are_listed(tmp_path: Path) -> None:
    listed = type_here(tmp_path, "explain")
    assert all(name in listed for name in COMPONENTS)
    assert [each["name"] for each in json.loads(type_here(tmp_path, "explain", "--json"))] == list(COMPONENTS)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_draws(tmp_path: Path, name: str) -> None:
    # The numbers of the presets' own sizes are compared elsewhere; small ones draw faster.
    small = {"cache": ("--preset", "tiny")}.get(name, ())
    answer = json.loads(type_here(tmp_path, "explain", name, *small, "--out", tmp_path / "new/folder", "--json"))
    assert answer["component"] == name and answer["says"] and answer["numbers"]
    paths = [Path(path) for path in answer["pictures"]]
    assert sorted(paths) == sorted((tmp_path / "new/folder").iterdir())
    for path in paths:
        picture = path.read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", picture[16:24])
        assert width == 1200 and 400 <= height <= 1400


def test_the_words_end_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = type_here(tmp_path, "explain", "bpe", "--text", "low lower lowest")
    assert said.splitlines()[-1] == "wrote bpe.png"
    assert "l + o (3 times)" in said
    assert (tmp_path / "bpe.png").is_file()


def test_trained_weights_and_a_runs_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["def a(): return 1"] * 5, 300)
    save_pretrained(model_of(tokenizer.vocab_size), tmp_path / "hf", tokenizer)
    answer = json.loads(
        type_here(
            tmp_path, "explain", "routing", "--model", tmp_path / "hf", "--text", "def b()", "--out", tmp_path, "--json"
        )
    )
    assert answer["numbers"]["trained"] is True
    assert "".join(answer["numbers"]["tokens"]) == "def␣b()"
    run = make_run(Store(tmp_path / "store"), tmp_path / "run", {10: 4.0})
    stored = ("--model", run.id, "--store", run.store.uri, "--out", tmp_path, "--text", "def a")
    answer = json.loads(type_here(tmp_path, "explain", "bpe", *stored, "--json"))
    assert answer["numbers"]["learned"] is False and answer["numbers"]["tokens_after"] < 5
    assert "has no experts" in type_here(tmp_path, "explain", "routing", *stored, code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["norm"], ["no component 'norm'", "did you mean norms?"]),
        (["xyzzy"], ["no component 'xyzzy'", "there are norms, "]),
        (["norms", "--text", "a"], ["--text means nothing to norms", "leave it out"]),
        (["rope", "--model", "x"], ["--model means nothing to rope", "--preset"]),
        (["bpe", "--preset", "tiny"], ["--preset means nothing to bpe", "--text and --model"]),
        (["cache", "--preset", "lama-3-8b"], ["--preset=lama-3-8b", "did you mean llama-3-8b?"]),
        (["routing", "--preset", "tiny"], ["--preset=tiny has no experts"]),
        (["routing", "--text", ""], ["--text=''", "no tokens"]),
        (["bpe", "--text", "\ud83d"], ["--text", "surrogate"]),
        (["bpe", "--text", "a" * 99], ["a word of", "at most 84"]),
        (["routing", "--model", "/no/such/folder"], ["/no/such/folder", "no folder here"]),
        (["routing", "--model", "r7"], ["there is no run 'r7'"]),
        (["routing", "--model", "."], ["--model=.", "config.json"]),
        (["routing", "--model", ".", "--store", "x"], ["--model=. is a directory", "leave --store out"]),
        (["bpe", "--store", "x"], ["--store", "--model"]),
        (["norms", "--out", "s3://bucket/x"], ["--out=s3://bucket/x", "folder of this machine"]),
        (["norms", "--out", "/dev/null/x"], ["--out=/dev/null/x", "choose another folder"]),
        (["--preset", "tiny"], ["--preset", "of which component"]),
    ],
    ids=lambda value: "-".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_refusals_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    error = type_here(tmp_path / "home", "explain", *arguments, code=1)
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not list(tmp_path.rglob("*.png"))


def test_preset_and_model_exclude_each_other(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a b"], 262)
    save_pretrained(model_of(tokenizer.vocab_size), tmp_path / "hf", tokenizer)
    said = type_here(tmp_path, "explain", "routing", "--model", tmp_path / "hf", "--preset", "tiny-moe", code=1)
    assert "--preset=tiny-moe and --model" in said


def test_listing_waits_for_no_library() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'matplotlib', 'ray', 'transformers', 'pyarrow'): sys.modules[name] = None\n"
        "sys.argv = ['caravan', 'explain']\n"
        "from pipelines.cli import main\n"
        "main()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0 and "activations" in ended.stdout, ended.stderr
