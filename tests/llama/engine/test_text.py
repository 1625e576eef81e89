import random

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers

from llama.engine.text import IncrementalDecoder, OutputText, StopMatcher
from llama.tokenizer import Tokenizer
from tests.llama.engine.models import ByteTokenizer

SAMPLE = "naïve café — 日本語のテキスト 👩‍🚀🚀 плюс ascii\n\tdef f(x): return x\n" * 3


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=262,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SAMPLE], trainer)
    return Tokenizer(backend)


def pieces_of(decoder: IncrementalDecoder, token_ids: list[int]) -> list[str]:
    return [decoder.push(token_id) for token_id in token_ids] + [decoder.finish()]


def test_whole_characters_only(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        token_ids = tokenizer.encode(SAMPLE)
        assert "\ufffd" in tokenizer.decode(token_ids[:4]) + tokenizer.decode(tokenizer.encode("🚀")[:1])
        pieces = pieces_of(IncrementalDecoder(tokenizer), token_ids)
        assert "".join(pieces) == SAMPLE
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_not_held_back_longer_than_needed():
    decoder = IncrementalDecoder(ByteTokenizer())
    assert [decoder.push(byte) for byte in "aé!".encode()] == ["a", "", "é", "!"]
    # An impossible byte is settled as soon as the next one is there.
    assert [decoder.push(byte) for byte in (0x80, 0x81, 0x62)] == ["", "\ufffd", "\ufffdb"]


def test_any_tokens_join_to_what_decode_gives(bpe):
    rng = random.Random(0)
    for tokenizer, vocab_size in ((ByteTokenizer(), 256), (bpe, bpe.vocab_size)):
        for _ in range(150):
            token_ids = [rng.randrange(vocab_size) for _ in range(rng.randrange(40))]
            assert "".join(pieces_of(IncrementalDecoder(tokenizer), token_ids)) == tokenizer.decode(token_ids)


def test_a_cut_character_ends_as_decode_ends_it():
    decoder = IncrementalDecoder(ByteTokenizer())
    assert pieces_of(decoder, list("x🚀".encode()[:3])) == ["x", "", "", "\ufffd"]


def reference_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        matches = [string for string in stop if text[:end].endswith(string)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


def test_stop_strings_whatever_the_pieces():
    rng = random.Random(1)
    stopped_count = 0
    for _ in range(3000):
        stop = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        text = "".join(rng.choices("abc", k=rng.randrange(12)))
        expected, expected_stopped = reference_stop(text, stop)
        matcher, out, stopped, rest = StopMatcher(stop), "", False, text
        while rest and not stopped:
            size = rng.randrange(1, 5)
            piece, stopped = matcher.push(rest[:size])
            rest = rest[size:]
            out += piece
            assert expected.startswith(out)
        out += "" if stopped else matcher.finish()
        assert (out, stopped) == (expected, expected_stopped)
        stopped_count += stopped
    assert 500 < stopped_count < 2900


def test_text_that_cannot_become_a_stop_string_goes_out_at_once():
    matcher = StopMatcher(["END", "\n\n"])
    assert [matcher.push(piece) for piece in ("abc", "E", "N", "x", "\n", "y")] == [
        ("abc", False),
        ("", False),
        ("", False),
        ("ENx", False),
        ("", False),
        ("\ny", False),
    ]


def test_a_stop_string_made_of_split_characters():
    text = OutputText(ByteTokenizer(), ["🚀🚀"])
    pushed = [text.push(byte) for byte in "a🚀b🚀🚀".encode()]
    assert "".join(piece for piece, _ in pushed) == "a🚀b"
    assert [stopped for _, stopped in pushed] == [False] * (len(pushed) - 1) + [True]


def test_held_text_comes_out_at_the_end():
    text = OutputText(ByteTokenizer(), ["END"])
    assert "".join(text.push(byte)[0] for byte in b"abEN") == "ab"
    assert text.finish() == ("EN", False)
