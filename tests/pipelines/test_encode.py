import json

import numpy as np
import pytest

from llama.tokenizer import CHAT_TEMPLATE, ChatTemplateError, Tokenizer
from llama.tokenizer_training import train_tokenizer
from pipelines import encode
from pipelines.documents import Document, document_id
from pipelines.encode import encode_chat, encode_documents

TEXTS = ["the cat sat", "on the mat 🙂 <|eos|>", "x", "the " * 50, "mat " * 9]


@pytest.fixture(scope="module")
def backend():
    return train_tokenizer(TEXTS, 280).backend


@pytest.fixture(scope="module")
def tokenizer(backend):
    return Tokenizer(backend)


def documents(texts):
    return [Document(document_id(text), text, "file:///x", number) for number, text in enumerate(texts)]


@pytest.mark.parametrize("batch_chars", [1, 20, 1 << 20])
def test_texts_stand_between_their_two_tokens(tokenizer, monkeypatch, batch_chars):
    monkeypatch.setattr(encode, "_ENCODE_CHARS", batch_chars)
    found = encode_documents(documents(TEXTS), "text", tokenizer, np.dtype(np.uint16))
    expected = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    assert found.stream.tolist() == [token_id for ids in expected for token_id in ids]
    assert found.stream.dtype == np.uint16 and found.learned is None
    assert found.lengths.tolist() == [len(ids) for ids in expected]
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("batch_chars", [1, 20, 1 << 20])
def test_a_limit_ends_before_the_document_that_exceeds_it(tokenizer, monkeypatch, batch_chars):
    monkeypatch.setattr(encode, "_ENCODE_CHARS", batch_chars)
    lengths = [len(tokenizer.encode(text)) + 2 for text in TEXTS]
    for limit in range(sum(lengths) + 2):
        found = encode_documents(documents(TEXTS), "text", tokenizer, np.dtype(np.uint16), limit)
        fitting = next((n for n in range(len(TEXTS)) if sum(lengths[: n + 1]) > limit), len(TEXTS))
        assert found.lengths.tolist() == lengths[:fitting] and len(found.stream) == sum(lengths[:fitting])
        assert found.bytes == sum(len(text.encode()) for text in TEXTS[:fitting])


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_conversations_and_those_that_are_refused(tokenizer):
    talks = [
        chat(("user", "the cat"), ("assistant", "sat")),
        chat(("critic", "the mat"), ("assistant", "sat")),
        chat(("assistant", "on the mat"), ("user", "why?")),
    ]
    texts = [json.dumps(each) for each in talks]
    found = encode_documents(documents(texts), "chat", tokenizer, np.dtype(np.uint32))
    pairs = [tokenizer.encode_chat(each) for each in (talks[0], talks[2])]
    assert found.stream.tolist() == [token_id for ids, _ in pairs for token_id in ids]
    assert found.learned.tolist() == [mine for _, learned in pairs for mine in learned]
    assert found.lengths.tolist() == [len(ids) for ids, _ in pairs]
    assert found.bytes == len("the cat\nsat") + len("on the mat\nwhy?")
    assert [(each.path, each.offset) for each in found.refused] == [("file:///x", 1)]
    assert "messages.role=critic is unknown" in found.refused[0].reason
    assert found.refused[0].text == texts[1]
    fewer = encode_documents(documents(texts), "chat", tokenizer, np.dtype(np.uint32), len(pairs[0][0]))
    assert fewer.stream.tolist() == pairs[0][0] and len(fewer.refused) == 1
    assert encode_documents([], "chat", tokenizer, np.dtype(np.uint32)).lengths.tolist() == []


SAYS = "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "closed"),
    [
        (CHAT_TEMPLATE, False),
        (CHAT_TEMPLATE.replace("+ eos_token }}", "+ eos_token + '\n ' }}"), False),
        (SAYS + "{% if add_generation_prompt %}<|assistant|>{% endif %}", True),
        (SAYS + "{% if add_generation_prompt %}<|assistant|>{% endif %}\n", True),
    ],
)
def test_a_conversation_ends_once(backend, template, closed):
    tokenizer = Tokenizer(backend, chat_template=template)
    for last in ("assistant", "user"):
        talk = chat(("user", "the cat"), ("assistant", "sat"), (last, "on the mat"))
        ids, learned = encode_chat(talk, tokenizer)
        rendered, mine = tokenizer.encode_chat(talk)
        assert ids == rendered + [tokenizer.eos_id] * closed
        assert learned == mine + [last == "assistant"] * closed
        assert ids.count(tokenizer.eos_id) == (1 if closed else 3)


def test_nothing_is_no_conversation(backend):
    for template, reason in (
        ("", "makes nothing of"),
        (" \n", "makes nothing of"),
        ("{{ eos_token }}", "a single token"),
    ):
        with pytest.raises(ChatTemplateError, match=reason):
            encode_chat(chat(("user", "x")), Tokenizer(backend, chat_template=template))


def test_the_day_does_not_show(backend):
    template = "{{ strftime_now('%Y-%m-%d') }}" + CHAT_TEMPLATE
    talk = chat(("user", "x"), ("assistant", "the cat"))
    tokenizer = Tokenizer(backend, chat_template=template)
    assert tokenizer.decode(encode_chat(talk, tokenizer)[0]).startswith("2025-01-01")
