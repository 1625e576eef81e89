"""Word n-grams against sets of tuples of words."""

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import ngrams
from pipelines.ngrams import fold, hash_ngrams, hash_words, ngram_set, plain_text, said, words


def all_words(text: str) -> list[str]:
    return list(chain.from_iterable(words(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, the CAT!\n\tsat_2", ["the", "cat", "the", "cat", "sat_2"]),
        ("don't (stop)", ["don", "t", "stop"]),
        ("我爱北京tea", ["我", "爱", "北", "京", "tea"]),
        ("カタカナ、ひらがな", list("カタカナひらがな")),
        ("안녕하세요 world", ["안", "녕", "하", "세", "요", "world"]),
        ("𠀋𠮟x", ["𠀋", "𠮟", "x"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("cafe\u0301 naïve Straße", ["cafe\u0301", "naïve", "straße"]),
        ("❤️ ... !", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert all_words(text) == expected


@given(st.lists(st.sampled_from(["one", "Two", "模", "型", "e\u0301", "-", " ", "\n", ". "])), st.integers(1, 7))
def test_words_do_not_depend_on_stretches(pieces, stretch):
    text = "".join(pieces)
    whole = all_words(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "_STRETCH", stretch)
        assert all_words(text) == whole
        assert len(hash_words(text)) == len(whole)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_hashes_are_equal_where_the_words_are(letters, ngram):
    hashes = hash_ngrams(hash_words(" ".join(letters)), ngram).tolist()
    tuples = [tuple(letters[begin : begin + ngram]) for begin in range(len(letters) - ngram + 1)]
    assert len(hashes) == len(tuples)
    assert len(set(zip(hashes, tuples, strict=True))) == len(set(hashes)) == len(set(tuples))


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_sets_are_ascending_and_of_the_whole_text_when_it_is_short(letters, ngram):
    found = ngram_set(hash_words(" ".join(letters)), ngram)
    size = min(ngram, len(letters))
    expected = {tuple(letters[begin : begin + size]) for begin in range(len(letters) - size + 1)} if letters else set()
    assert len(found) == len(expected)
    assert (found[1:] > found[:-1]).all()


def test_order_and_length_matter():
    one, two = np.array([1], np.uint64), np.array([2], np.uint64)
    assert len({int(fold(columns)[0]) for columns in ([one, two], [two, one], [one, one], [one], [two])}) == 5


def test_hashes_stay_what_they_are():
    """They decide what is dropped: another value is another version of the stage."""
    assert hash_ngrams(hash_words("Call me Ishmael."), 3).tolist() == [9126781323880008596]


def test_what_is_said_is_the_text():
    calls = [{"name": "weather", "arguments": {"city": "Rome"}}]
    messages = [
        {"role": "user", "content": 'one\n"two"'},
        {"role": "assistant", "content": "模型", "tool_calls": calls},
    ]
    assert list(said(json.dumps(messages), "chat")) == ['one\n"two"', "模型\nweather\nRome"]
    assert plain_text(json.dumps(messages), "chat") == 'one\n"two"\n模型\nweather\nRome'
    record = {"chosen": messages, "prompt": "which?", "rejected": "none"}
    assert list(said(json.dumps(record), "preference")) == ["which?", 'one\n"two"', "模型\nweather\nRome", "none"]
    assert plain_text('{"a": 1}', "text") == '{"a": 1}'
