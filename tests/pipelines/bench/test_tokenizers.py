import json
from pathlib import Path

import pytest

from llama.bench.harness import BenchError
from llama.tokenizer_training import train_tokenizer
from pipelines.bench import tokenizers
from pipelines.bench.tokenizers import Text, TokenizerBench, as_json, as_text, find_texts, judge, measure
from pipelines.sources import DataError


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A text of a user's own."""
    folder = tmp_path / "other"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"naïve 模型 🙂 text number {number} " * 20, "utf-8")
    return folder


def test_all_kinds_and_an_existing_one_are_compared(other: Path, tmp_path: Path) -> None:
    train_tokenizer(["a small sample"], 300).save(tmp_path / "mine")
    bench = TokenizerBench((("other", str(other)),), (str(tmp_path / "mine"),), vocab_size=400, megabytes=0.02)
    report = measure(bench)
    assert [row.name for row in report.rows] == ["bpe", "wordpiece", "unigram", str(tmp_path / "mine")]
    assert [on.text for on in report.rows[0].texts] == ["english", "chinese", "code", "other"]
    assert all(on.exact and 0 < on.bytes_per_token < 20 for row in report.rows for on in row.texts)
    assert [row.training_seconds is None for row in report.rows] == [False, False, False, True]
    assert [row.versus_bpe is None for row in report.rows] == [True, False, False, False]
    shown = as_text(report)
    assert "every text came back exactly" in shown
    assert "chinese: " in shown and "give more with --text chinese=URI" in shown
    assert json.loads(json.dumps(as_json(report)))["rows"][1]["versus_bpe"]["verdict"]


def test_bytes_per_token_and_losses_are_those_of_the_held_out_text() -> None:
    tokenizer = train_tokenizer(["aaaa aaaa"], 262)  # the bytes alone
    assert judge(tokenizer, Text("x", (), ("aé", "b"))) == tokenizers.OnText("x", 1.0, True)
    tokenizer.backend.normalizer = tokenizers_of("Lowercase")
    assert judge(tokenizer, Text("x", (), ("AB",))).exact is False


def tokenizers_of(normalizer: str):
    from tokenizers import normalizers

    return getattr(normalizers, normalizer)()


def test_a_text_in_place_of_a_built_in(other: Path) -> None:
    texts = {text.name: text for text in find_texts(TokenizerBench((("chinese", str(other)),), megabytes=0.05))}
    assert list(texts) == ["english", "chinese", "code"]
    assert len(texts["chinese"].held_out) == 1 and len(texts["chinese"].sample) == 11
    assert all(not set(text.sample) & set(text.held_out) for text in texts.values())
    assert all(sum(len(t.encode()) for t in (*text.sample, *text.held_out)) <= 50_000 for text in texts.values())


def test_the_built_in_texts_are_what_they_say() -> None:
    texts = {text.name: "".join(text.sample) for text in find_texts(TokenizerBench(megabytes=0.3))}
    han = {name: sum("一" <= character <= "鿿" for character in text) / len(text) for name, text in texts.items()}
    assert han["chinese"] > 0.8 and han["english"] < 0.01 and han["code"] < 0.01
    assert texts["english"].count(" the ") > 100 and texts["code"].count("\n    def ") > 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100}, "vocab_size=100 must be at least 262"),
        ({"rounds": 2}, "rounds=2 must be at least 5"),
        ({"megabytes": 0}, "megabytes=0 must be positive"),
        ({"texts": (("a", "x"), ("a", "y"))}, "a, a are not distinct"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        TokenizerBench(**settings)


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one document, long enough to be one")
    with pytest.raises(BenchError, match="'x' has 1 documents; give at least 2"):
        find_texts(TokenizerBench((("x", str(tmp_path / "one.txt")),), megabytes=0.05))
    (tmp_path / "records.jsonl").write_text('{"content": "a record, long enough to be one"}\n')
    with pytest.raises(DataError, match=r"--text x=.*no key 'text'\); give text, or records with the key 'text'"):
        find_texts(TokenizerBench((("x", str(tmp_path / "records.jsonl")),), megabytes=0.05))
    with pytest.raises(DataError, match="nowhere"):
        find_texts(TokenizerBench((("x", str(tmp_path / "nowhere")),), megabytes=0.05))
    with pytest.raises(DataError, match="/no/such: there is no tokenizer.json"):
        measure(TokenizerBench(tokenizers=("/no/such",)))
