"""Merges against brute force: which pair is the most frequent, and what merging it makes of the words."""

import re
from collections import Counter
from pathlib import Path

import pytest

from llama.tokenizer import Tokenizer
from llama.tokenizer_training import train_tokenizer
from pipelines.explain.bpe import explain, fitting_words, merge, merge_steps
from pipelines.explain.pieces import label
from pipelines.explain.registry import ExplainError, Options

SENNRICH = " ".join(["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3)
"""The paper's example, arXiv:1508.07909, §3.2."""


def pairs_of(words: list[list[str]], counts: list[int]) -> Counter:
    pairs: Counter = Counter()
    for word, count in zip(words, counts, strict=True):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] += count
    return pairs


def test_each_learned_merge_is_the_most_frequent_pair() -> None:
    merges = merge_steps(train_tokenizer([SENNRICH], 280), SENNRICH, learned=True)
    words, counts = merges.start, merges.counts
    assert [("".join(word), count) for word, count in zip(words, counts, strict=True)] == [
        ("low", 1),
        ("␣low", 4),
        ("␣lower", 2),
        ("␣newest", 6),
        ("␣widest", 3),
    ]
    assert len(merges.steps) >= 15
    for rank, step in enumerate(merges.steps, start=1):
        pairs = pairs_of(words, counts)
        assert step.rank == rank
        assert step.count == pairs[step.left, step.right] == max(pairs.values())
        made = [
            re.sub(
                f"(?<=\x00){re.escape(step.left)}\x00{re.escape(step.right)}(?=\x00)",
                step.left + step.right,
                "\x00" + "\x00".join(word) + "\x00",
            )
            .strip("\x00")
            .split("\x00")
            for word in words
        ]
        assert step.words == made
        words = made
    assert not pairs_of(words, counts), "all words are whole"
    assert merges.tokens_before == len(SENNRICH) and merges.tokens_after == 16


def test_with_a_tokenizer_its_own_list_decides(tmp_path: Path) -> None:
    corpus = Path("pipelines/explain/bpe.py")
    text = (Path(__file__).parents[3] / corpus).read_text("utf-8")
    tokenizer = train_tokenizer([text], 600)
    sentence = "the tokenizer merges words → 字, again and again"
    merges = merge_steps(tokenizer, sentence, learned=False)
    ids = tokenizer.encode(sentence)
    pieces = {tuple(word) for word in merges.steps[-1].words}
    tokens = [label(tokenizer.token_bytes[token_id] or b"") for token_id in ids]
    assert merges.tokens_after == len(ids) and {piece for word in pieces for piece in word} == set(tokens)
    ranks = [step.rank for step in merges.steps]
    assert ranks == sorted(ranks) and ranks[-1] > len(ranks), "only those that the text has a use for"


def test_runs_of_one_letter_merge_from_the_beginning() -> None:
    assert merge(("a", "a", "a"), "a", "a") == ("aa", "a")
    assert merge(("a", "a", "a", "a"), "a", "a") == ("aa", "aa")
    assert merge(("b", "a", "b", "a"), "b", "a") == ("ba", "ba")
    tokenizer = train_tokenizer(["aaaaaaa aaaa"], 268)
    merges = merge_steps(tokenizer, "aaaaaaa aaaaa aa", learned=False)
    assert merges.tokens_after == len(tokenizer.encode("aaaaaaa aaaaa aa"))


def test_labels_show_what_is_no_character() -> None:
    assert [label(piece) for piece in (b" a", b"\n", "字".encode(), "字".encode()[:2], b"\x07", b"$")] == [
        "␣a",
        "⏎",
        "字",
        "‹e5ad›",
        "‹07›",
        "$",
    ]


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [("unigram", "some words", "Unigram, which has no merges"), ("bpe", "", "has no tokens")],
)
def test_refusals(kind: str, text: str, words: str) -> None:
    tokenizer: Tokenizer = train_tokenizer([SENNRICH], 280, kind)
    with pytest.raises(ExplainError, match=words):
        merge_steps(tokenizer, text, learned=False)


def test_a_row_has_room_for_so_many_words() -> None:
    text = " ".join(f"word{first}{second}" for first in "abcde" for second in "abcdefghij")
    merges = merge_steps(train_tokenizer([text], 262), text, learned=True)
    assert 5 < fitting_words(merges) < 10
    giant = explain(Options(text="a" * 200))
    with pytest.raises(ExplainError, match="a word of 202 characters; at most 84"):
        giant.pictures()
