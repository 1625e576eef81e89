"""Learning BPE, WordPiece and Unigram: any text comes back, and each kind cuts words as its paper says."""

import json
import math
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama.engine.text import IncrementalDecoder
from llama.tokenizer import SPECIAL_TOKENS, Tokenizer
from llama.tokenizer_training import SMALLEST_VOCABULARY, train_tokenizer

KINDS = ("bpe", "wordpiece", "unigram")
CODE = Path(json.__file__).read_text("utf-8")
CHINESE = "模型学习如何把文字切成词元。词元越多，序列越短；学习的文字越多，词元越好。"
EMOJI = "👩‍🚀 🇨🇳 👍🏽 naïve café größer — “quotes”\u00a0\u2028"
TEXTS = [CODE, CHINESE * 30, EMOJI * 30]
VOCAB_SIZE = 600


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    return train_tokenizer(TEXTS, VOCAB_SIZE, request.param)


@pytest.fixture(scope="module")
def by_kind() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(TEXTS, VOCAB_SIZE, kind) for kind in KINDS}


def plain(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "  two  ", " \n\t \r\n", CODE, CHINESE, EMOJI, "\x00\x7f\ud7ff\uffff\U0010ffff", "ÿþ"),
        *("##a ## #", "▁a ▁", "<0x41>", "Ġa Ċ", "[UNK] <unk> <s>", "ｆｕｌｌ ﬁ e\u0301"),
        *("x" * 1000, "漢" * 500, " " * 350),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_any_text_comes_back(tokenizer, text):
    assert plain(tokenizer, text) == text


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet="ab #▁<|>.\n\té漢🚀"))
def test_whatever_text_comes_back(by_kind, text):
    for tokenizer in by_kind.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert not set(ids) & set(range(len(SPECIAL_TOKENS)))
        assert tokenizer.encode_batch([text]) == [ids]


def test_special_tokens_come_first_and_every_byte_is_there(tokenizer):
    names = [tokenizer.backend.id_to_token(token_id) for token_id in range(tokenizer.vocab_size)]
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert names[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    assert {name for name in names if len(name) == 1} == set(pre_tokenizers.ByteLevel.alphabet())
    text = "<|eos|> <|assistant|>hi"
    assert not set(tokenizer.encode(text)) & set(range(len(SPECIAL_TOKENS)))
    assert plain(tokenizer, text) == text


def test_what_is_common_becomes_a_token(tokenizer):
    assert len(tokenizer.encode(CHINESE)) < len(CHINESE.encode()) / 1.5
    assert len(tokenizer.encode(CODE)) < len(CODE) / 2
    assert len(tokenizer.encode(" the")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_tokenizer(by_kind, kind):
    again = train_tokenizer(iter(TEXTS), VOCAB_SIZE, kind)
    assert again.backend.to_str() == by_kind[kind].backend.to_str()
    assert (
        train_tokenizer(TEXTS[1:], 300, kind).backend.to_str() != train_tokenizer(TEXTS[:1], 300, kind).backend.to_str()
    )


def test_bpe_is_the_library_s(by_kind):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = list(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    assert by_kind["bpe"].backend.get_vocab() == backend.get_vocab()
    assert by_kind["bpe"].backend.encode(CODE).ids == backend.encode(CODE).ids


def words_of(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]


def test_wordpiece_takes_the_longest_piece_first(by_kind):
    vocab = by_kind["wordpiece"].backend.get_vocab()
    expected = []
    for word in words_of(CODE + EMOJI):
        while word:
            piece = next(word[:length] for length in range(len(word), 0, -1) if word[:length] in vocab)
            expected.append(vocab[piece])
            word = word[len(piece) :]
    assert by_kind["wordpiece"].encode(CODE + EMOJI) == expected


def test_unigram_takes_the_likeliest_cut(by_kind):
    tokenizer = by_kind["unigram"]
    scores = dict(json.loads(tokenizer.backend.to_str())["model"]["vocab"][len(SPECIAL_TOKENS) :])
    total = sum(math.exp(score) for score in scores.values())
    assert 0.8 < total < 1.01  # log-probabilities; what the last pieces had is lost

    def best(word: str) -> float:
        table = [0.0] + [-math.inf] * len(word)
        for end in range(1, len(word) + 1):
            starts = range(max(0, end - 16), end)
            table[end] = max(
                (table[s] + scores[word[s:end]] for s in starts if word[s:end] in scores), default=-math.inf
            )
        return table[-1]

    for word in set(words_of(CODE)):
        pieces = tokenizer.backend.model.tokenize(word)
        assert "".join(piece.value for piece in pieces) == word
        assert sum(scores[piece.value] for piece in pieces) == pytest.approx(best(word))


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_vocabulary_is_the_bytes(kind):
    tokenizer = train_tokenizer(TEXTS, SMALLEST_VOCABULARY, kind)
    assert tokenizer.vocab_size == SMALLEST_VOCABULARY == 262
    assert len(tokenizer.encode("the 漢")) == 7
    assert train_tokenizer(TEXTS, SMALLEST_VOCABULARY + 1, kind).vocab_size == 263
    assert train_tokenizer(["ab " * 9], 5000, kind).vocab_size < 300
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=261 .* use at least 262"):
        train_tokenizer(TEXTS, SMALLEST_VOCABULARY - 1, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_gives_the_bytes(kind, texts):
    tokenizer = train_tokenizer(texts, 300, kind)
    assert tokenizer.vocab_size == SMALLEST_VOCABULARY
    assert len(tokenizer.encode("the 漢")) == 7 and plain(tokenizer, "the 漢") == "the 漢"


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.kind='word' is not one of bpe, wordpiece, unigram"):
        train_tokenizer(TEXTS, 300, "word")


def test_a_growing_text_has_whole_characters(tokenizer):
    for text in (CODE[:2000], CHINESE, EMOJI, "x" * 150 + "漢字"):
        decoder = IncrementalDecoder(tokenizer)
        pieces = [decoder.push(token_id) for token_id in tokenizer.encode(text)]
        assert "".join(pieces) + decoder.finish() == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_saved_loaded_and_read_by_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    loaded, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": CHINESE}]
    for text in (CODE, CHINESE, EMOJI, "x" * 350):
        assert loaded.encode(text) == tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert theirs.decode(tokenizer.encode(text)) == text
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert loaded.apply_chat_template(chat) == tokenizer.apply_chat_template(chat) == expected


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_long_texts_are_learned_from_in_stretches(kind, monkeypatch):
    text = "".join(f"the cat {number} sat, on naïve mats 模型\n" for number in range(60))
    whole = train_tokenizer([text], 290, kind).backend.to_str()
    monkeypatch.setattr("llama.tokenizer._STRETCH_CHARS", 50)
    assert train_tokenizer([text], 290, kind).backend.to_str() == whole
