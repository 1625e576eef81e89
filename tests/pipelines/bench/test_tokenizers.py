import json
from pathlib import Path

import pytest

from llama.bench.harness import BenchError, Ratio
from llama.tokenizer_training import train_tokenizer
from pipelines.bench import tokenizers
from pipelines.bench.corpus import long_lines
from pipelines.bench.tokenizers import (
    Row,
    Text,
    TokenizerBench,
    TokenizerReport,
    as_json,
    as_text,
    find_texts,
    judge,
    measure,
)
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
    said: list[str] = []
    report = measure(bench, said.append)
    assert [line.partition(" from ")[0] for line in said[:3]] == [f"{kind}: learning" for kind in tokenizers.KINDS]
    assert f"{tmp_path / 'mine'}: round 5 of 5" in said
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
    assert len(texts["chinese"].held_out) == 4 and len(texts["chinese"].sample) == 8
    assert all(not set(text.sample) & set(text.held_out) for text in texts.values())
    assert all(sum(len(t.encode()) for t in (*text.sample, *text.held_out)) <= 50_000 for text in texts.values())


def test_the_built_in_texts_are_what_they_say() -> None:
    texts = {text.name: "".join(text.sample) for text in find_texts(TokenizerBench(megabytes=0.3))}
    han = {name: sum("一" <= character <= "鿿" for character in text) / len(text) for name, text in texts.items()}
    assert han["chinese"] > 0.8 and han["english"] < 0.01 and han["code"] < 0.01
    assert texts["english"].count(" the ") > 100 and texts["code"].count("\n    def ") > 100


def test_next_to_nothing_that_is_held_out_was_learned_from() -> None:
    texts = find_texts(TokenizerBench())
    learned = {line for text in texts for document in text.sample for line in long_lines(document)}
    for text in texts:
        lines = [line for document in text.held_out for line in long_lines(document)]
        assert len(lines) > 20
        known = sum(len(line) for line in lines if line in learned)
        assert known < 0.05 * sum(map(len, lines)), text.name  # what a licence or an import says, others say too
    english, chinese, code = ("\n".join(text.sample + text.held_out) for text in texts)
    assert 'The "assert" statement' in english and 'The "assert" statement' not in code
    assert len(chinese.encode()) > 25_000


def test_unequal_vocabularies_are_shown() -> None:
    ratio = Ratio(1, 1, 1, 1, 1)
    rows = [Row("bpe", 8192, 1.0, [], 1.0, None), Row("unigram", 8192, 1.0, [], 1.0, ratio)]
    assert "unequal" not in as_text(TokenizerReport(TokenizerBench(), [], rows))
    rows.append(Row("wordpiece", 5431, 1.0, [], 1.0, ratio))
    shown = as_text(TokenizerReport(TokenizerBench(), [], rows))
    assert "5,431" in shown and "no 8,192 tokens for wordpiece" in shown and "vocabularies are unequal" in shown
    rows[-1] = Row("mine", 128_000, None, [], 1.0, ratio)
    shown = as_text(TokenizerReport(TokenizerBench(), [], rows))
    assert "128,000" in shown and "no 8,192 tokens" not in shown and "vocabularies are unequal" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizers": ("bpe",)}, "--tokenizer bpe is the name of a kind.*write ./bpe"),
        ({"tokenizers": ("x", "x")}, "--tokenizer x, x are not distinct"),
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
    with pytest.raises(BenchError, match="'x' has 1 different documents in 50,000 bytes; give at least 2"):
        find_texts(TokenizerBench((("x", str(tmp_path / "one.txt")),), megabytes=0.05))
    (tmp_path / "records.jsonl").write_text('{"content": "a record, long enough to be one"}\n')
    with pytest.raises(DataError, match=r"--text x=.*no key 'text'; it has 'content'\); give text, or records"):
        find_texts(TokenizerBench((("x", str(tmp_path / "records.jsonl")),), megabytes=0.05))
    with pytest.raises(DataError, match="nowhere"):
        find_texts(TokenizerBench((("x", str(tmp_path / "nowhere")),), megabytes=0.05))
    with pytest.raises(DataError, match="/no/such: there is no tokenizer.json"):
        measure(TokenizerBench(tokenizers=("/no/such",)))
