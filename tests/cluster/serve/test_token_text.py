"""Tokens that are parts of characters: their bytes, their names, and where they begin in the text."""

import pytest
import tokenizers
from tokenizers import decoders, models

from cluster.serve.token_text import TextOffsets, TokenText
from llama.tokenizer import Tokenizer
from tests.cluster.serve.reply_cases import TOKENIZER


@pytest.fixture
def tokenizer() -> Tokenizer:
    return TOKENIZER


def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer):
    text = "hello \t\n wörld, 漢字 \U0001f600 \u00a0\u00ad\x00\x7f"
    raw = [TokenText(tokenizer).bytes_of(token_id) for token_id in tokenizer.encode(text)]
    assert b"".join(raw) == text.encode()


def test_every_byte_has_its_own_name(tokenizer):
    ids = [token_id for token_id in range(tokenizer.vocab_size) if len(TokenText(tokenizer).bytes_of(token_id)) == 1]
    assert sorted(TokenText(tokenizer).bytes_of(token_id)[0] for token_id in ids) == list(range(256))
    assert len({TokenText(tokenizer).name(token_id) for token_id in ids}) == 256
    assert [TokenText(tokenizer).name(token_id) for token_id in tokenizer.encode("é")] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert TokenText(tokenizer).name(tokenizer.eos_id) == "<|eos|>"


def test_a_token_begins_where_its_character_does(tokenizer):
    offsets = TextOffsets(TokenText(tokenizer))
    assert [offsets.next(token_id) for token_id in tokenizer.encode("hello 漢é!")] == [0, 5, 6, 6, 6, 7, 7, 8]


def test_byte_fallback_tokens_are_their_byte():
    vocabulary = {"</s>": 0, "<0xC3>": 1, "<0xA9>": 2, "a": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend, bos_token=None, eos_token="</s>", pad_token=None)
    assert [TokenText(tokenizer).bytes_of(token_id) for token_id in (1, 2, 3)] == [b"\xc3", b"\xa9", b"a"]
