import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

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


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """Built like Llama 2's: a space is ▁, a character outside the vocabulary its bytes."""
    words = ["▁hello", "▁world", "▁", "he", "llo", "!", "é"]
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", pad_token=None)


@pytest.fixture(scope="module")
def word_piece() -> Tokenizer:
    tokens = ["[UNK]", "[SEP]", "hello", "##ing", "world", ".", "n't", "do", "##é"]
    backend = tokenizers.Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return Tokenizer(backend, bos_token=None, eos_token="[SEP]", pad_token=None)


def ids_of(tokenizer: Tokenizer, *parts: str | bytes) -> list[int]:
    """A str is a token, bytes are byte tokens."""
    names = [[f"<0x{byte:02X}>" for byte in part] if isinstance(part, bytes) else [part] for part in parts]
    return [tokenizer.backend.token_to_id(name) for part in names for name in part]


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
    # Impossible bytes are settled by the next character, and in a long row each by the next one.
    assert [decoder.push(byte) for byte in (0x80, 0x81, 0x62)] == ["", "", "\ufffd\ufffdb"]
    assert [decoder.push(0x80) for _ in range(10)] == [""] * 7 + ["\ufffd" * 7, "\ufffd", "\ufffd"]


def test_byte_fallback_gives_whole_characters(byte_fallback):
    token_ids = ids_of(byte_fallback, "😀é".encode(), "▁hello", "日".encode(), "<s>", "▁world", "👩‍🚀".encode())
    pieces = pieces_of(IncrementalDecoder(byte_fallback), token_ids)
    assert "".join(pieces) == byte_fallback.decode(token_ids) == "😀é hello日 world👩‍🚀"
    assert [piece for piece in pieces if piece] == ["😀", "é", " hello", "日", " world", "👩", "\u200d", "🚀"]


def test_a_wrong_byte_takes_nothing_back_that_was_handed_out(byte_fallback):
    token_ids = ids_of(byte_fallback, "😀".encode(), b"\x80", "!")
    assert byte_fallback.decode(token_ids) == "\ufffd" * 5 + "!"
    assert "".join(pieces_of(IncrementalDecoder(byte_fallback), token_ids)) == "😀\ufffd!"
    cut = ids_of(byte_fallback, "😀".encode(), b"\xc3")
    assert "".join(pieces_of(IncrementalDecoder(byte_fallback), cut)) == "😀\ufffd"


@pytest.mark.parametrize("count", [1, 20])
def test_special_tokens_cost_no_space(byte_fallback, word_piece, count):
    for tokenizer, names in (
        (byte_fallback, ["▁hello", *["<s>"] * count, "▁world", "▁", "▁world"]),
        (byte_fallback, [*["<s>"] * count, "▁", "▁world", "</s>", "▁", "</s>", "▁hello"]),
        (word_piece, ["hello", *["[SEP]"] * count, "world", "##ing", "[SEP]", "."]),
    ):
        token_ids = ids_of(tokenizer, *names)
        pieces = pieces_of(IncrementalDecoder(tokenizer), token_ids)
        assert "".join(pieces) == tokenizer.decode(token_ids)


def test_endless_special_tokens_cost_no_more_each(byte_fallback, monkeypatch):
    lengths, decode = [], byte_fallback.decode
    monkeypatch.setattr(byte_fallback, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    pieces_of(IncrementalDecoder(byte_fallback), ids_of(byte_fallback, "▁hello", *["<s>", "</s>"] * 50))
    assert max(lengths) <= 4


def test_any_tokens_join_to_what_decode_gives_whatever_the_decoder(byte_fallback, word_piece):
    rng = random.Random(2)
    characters = [ids_of(byte_fallback, text.encode()) for text in "é日🚀😀a"]
    tokens = [[token_id] for token_id in (*ids_of(byte_fallback, "<s>", "</s>"), *range(259, byte_fallback.vocab_size))]
    words = [[token_id] for token_id in range(word_piece.vocab_size)]
    for tokenizer, units in ((byte_fallback, characters + tokens), (word_piece, words)):
        for _ in range(300):
            token_ids = [token_id for unit in rng.choices(units, k=rng.randrange(30)) for token_id in unit]
            pieces = pieces_of(IncrementalDecoder(tokenizer), token_ids)
            assert "".join(pieces) == tokenizer.decode(token_ids)
            assert not any("\ufffd" in piece for piece in pieces)


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


def test_a_stop_string_of_byte_fallback_tokens(byte_fallback):
    text = OutputText(byte_fallback, ["🚀 world"])
    pushed = [text.push(token_id) for token_id in ids_of(byte_fallback, "▁hello", "😀🚀".encode(), "<s>", "▁world")]
    assert "".join(piece for piece, _ in pushed) == "hello😀"
    assert [stopped for _, stopped in pushed] == [False] * (len(pushed) - 1) + [True]


def test_held_text_comes_out_at_the_end():
    text = OutputText(ByteTokenizer(), ["END"])
    assert "".join(text.push(byte)[0] for byte in b"abEN") == "ab"
    assert text.finish() == ("EN", False)


def test_a_stop_string_does_not_count_before_its_time():
    """By brute force: the first one that ends in an armed piece, wherever it begins; nothing of it is handed out."""
    rng = random.Random(3)
    for _ in range(400):
        stop = ["".join(rng.choices("ab", k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 3))]
        pieces = ["".join(rng.choices("ab", k=rng.randrange(0, 3))) for _ in range(8)]
        first = rng.randrange(9)
        text, early = "".join(pieces), len("".join(pieces[:first]))
        ends = [
            (start + len(word), start)
            for word in stop
            for start in range(len(text))
            if text.startswith(word, start) and start + len(word) > early
        ]
        matcher, out, stopped = StopMatcher(stop), [], False
        for index, piece in enumerate(pieces):
            new, stopped = matcher.push(piece, armed=index >= first)
            out.append(new)
            if stopped:
                break
        if not stopped:
            out.append(matcher.finish())
        assert ("".join(out), stopped) == ((text[: min(ends)[1]], True) if ends else (text, False))
