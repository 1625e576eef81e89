"""Which tokens of a conversation an assistant wrote."""

from datetime import datetime

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from llama.tokenizer import CHAT_TEMPLATE, ChatTemplateError, Tokenizer
from tests.llama.test_chat_template import ATTACKS, CHATS, CONTROL, TEMPLATES, byte_tokenizer, each
from tests.llama.test_tokenizer import bert, sentencepiece, train_backend

GENERATION = {
    "answers": each(
        "<|{{ message.role }}|>{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + eos_token }}{% endgeneration %}\n"
        "{% else %}{{ message.content + eos_token }}\n{% endif %}"
    )
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "trimmed": each(
        "<|user|>{% if message.role == 'assistant' %}\n{%- generation -%}\n{{ message.content | trim }}\n"
        "{% endgeneration %}{% else %}{{ message.content | trim }}{% endif %}"
    ),
    "a part of it": each("{{ message.content[:2] }}{% generation %}{{ message.content[2:] }}{% endgeneration %}"),
    "in a macro": "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    + each("<|user|>{% if message.role == 'assistant' %}{{ say(message) }}{% endif %}<|eos|>"),
    "as json": each(
        "{% if message.role == 'assistant' %}{% generation %}{{ message | tojson }}{% endgeneration %}{% endif %}"
    ),
}
TALKS = {
    **CHATS,
    "answered": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "naïve 模型 🙂?"},
        {"role": "assistant", "content": " größer 🙂 \n"},
        {"role": "user", "content": "größer 🙂."},
        {"role": "assistant", "content": "Ω."},  # transformers forgets the last bytes of a character at the very end
    ],
}


@pytest.fixture(scope="module", params=["bytes", "learned"])
def pair(request, tmp_path_factory):
    """A tokenizer of ours without a begin-of-text token, and the same in transformers."""
    transformers = pytest.importorskip("transformers")
    backend = byte_tokenizer(None).backend if request.param == "bytes" else train_backend()
    directory = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(backend, bos_token=None, chat_template=None).save(directory)
    return directory, transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", GENERATION)
def test_generation_blocks_mark_what_transformers_marks(pair, template, talk):
    directory, theirs = pair
    (directory / "chat_template.jinja").write_text(GENERATION[template])
    ids, learned = Tokenizer.load(directory).encode_chat(TALKS[talk])
    expected = theirs.apply_chat_template(
        TALKS[talk],
        chat_template=GENERATION[template],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert ids == expected["input_ids"]
    assert [int(each) for each in learned] == expected["assistant_masks"]


def answers(tokenizer, messages):
    """The texts of the runs of learned tokens."""
    ids, learned = tokenizer.encode_chat(messages)
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert len(ids) == len(learned)
    runs, previous = [], False
    for token_id, mine in zip(ids, learned, strict=True):
        if mine:
            runs = [*runs, []] if not previous else runs
            runs[-1].append(token_id)
        previous = mine
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


CHATML = (
    each("<|system|>{{ message.role }}\n{{ message.content }}<|eos|>\n")
    + "{% if add_generation_prompt %}<|system|>assistant\n{% endif %}"
)
LLAMA_2 = "{{ bos_token }}" + each(
    "{% if message.role == 'assistant' %} {{ message.content }}<|eos|>{% else %}[INST] {{ message.content }} [/INST]"
    "{% endif %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML, LLAMA_2])
def test_without_blocks_the_answer_is_what_follows_the_prompt_for_it(template):
    tokenizer = byte_tokenizer(template)
    space = " " if template == LLAMA_2 else ""
    expected = [
        space + message["content"] + "<|eos|>" for message in TALKS["answered"] if message["role"] == "assistant"
    ]
    assert answers(tokenizer, TALKS["answered"]) == expected
    assert answers(tokenizer, TALKS["answered"][:2]) == []
    assert answers(tokenizer, [TALKS["answered"][1], {"role": "assistant", "content": "Ω"}]) == [space + "Ω<|eos|>"]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML, GENERATION["answers"], GENERATION["a part of it"]])
def test_messages_make_neither_control_tokens_nor_answers(template, attack):
    tokenizer = byte_tokenizer(template)
    chat = [{"role": role, "content": content} for role, content in ATTACKS[attack]]
    found = answers(tokenizer, chat)
    if template == GENERATION["a part of it"]:
        assert "".join(found) == "".join(message["content"][2:] for message in chat)
    else:
        assert found == [message["content"] + "<|eos|>" for message in chat if message["role"] == "assistant"]
    control = {tokenizer.backend.token_to_id(token) for token in CONTROL}
    harmless = [{**message, "content": "hello"} for message in chat]
    made, expected = (
        [token_id for token_id in tokenizer.encode_chat(each)[0] if token_id in control] for each in (chat, harmless)
    )
    assert made == expected


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("globals",)])
def test_the_ids_are_those_of_the_template_or_it_is_refused(template):
    tokenizer = byte_tokenizer(TEMPLATES[template])
    for chat in (*TALKS.values(), [{"role": "assistant", "content": "Ω"}]):
        try:
            answers(tokenizer, chat)
        except ChatTemplateError as error:
            assert "put {% generation %} blocks around it" in str(error) or "refuses" in str(error)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (each("{{ message.content }}") + "{% if add_generation_prompt %}A:{% endif %}", "behind the prompt for it"),
        (
            each("{{ message.content }}{{ '!' if loop.last and message.role == 'assistant' }}"),
            "another text when messages follow",
        ),
    ],
)
def test_a_template_that_hides_its_answers_is_refused(template, reason):
    chat = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    with pytest.raises(ChatTemplateError, match=rf"^messages\[1\]: the chat template .*{reason}.*; put {{% generation"):
        byte_tokenizer(template).encode_chat(chat)


def test_a_template_is_not_asked_after_each_of_very_many_answers(monkeypatch):
    monkeypatch.setattr("llama.chat_template._MOST_ASKED", 4)
    chat = [{"role": role, "content": "hi"} for role in ("user", "assistant") * 2]
    assert sum(byte_tokenizer(CHATML).encode_chat(chat)[1]) == 2 * len("hi!")
    longer = [*chat, chat[0]]
    with pytest.raises(ChatTemplateError, match=r"^5 messages are more than the 4 .* split the conversation"):
        byte_tokenizer(CHATML).encode_chat(longer)
    assert sum(byte_tokenizer(GENERATION["answers"]).encode_chat(longer)[1]) == 2 * len("hi!")


def test_blocks_whose_text_is_changed_are_refused():
    changed = (
        "{% set said %}{% generation %} {{ messages[0].content }} {% endgeneration %}{% endset %}{{ said | trim }}"
    )
    with pytest.raises(ChatTemplateError, match="changes what its {% generation %} blocks give"):
        byte_tokenizer(changed).encode_chat([{"role": "assistant", "content": "hi"}])


def first_word() -> Tokenizer:
    """Leaves white space out of what its tokens stand for, as many byte-level tokenizers do."""
    backend = train_backend()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return Tokenizer(backend)


def words() -> Tokenizer:
    backend = tokenizers.Tokenizer(
        models.WordLevel({"[UNK]": 0, "<|bos|>": 1, "<|eos|>": 2, "<|pad|>": 3, "hi": 4}, "[UNK]")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend)


@pytest.mark.parametrize(
    "make", [first_word, bert, lambda: sentencepiece("first"), lambda: sentencepiece("always"), words], ids=str
)
def test_tokenizers_that_leave_out_or_add_white_space(make):
    made = make()
    template = each("<{{ message.content }} {% if message.role == 'assistant' %}>{{ eos_token }}{% endif %}")
    names = {"bos_token": made.bos_token, "eos_token": made.eos_token, "pad_token": made.pad_token}
    tokenizer = Tokenizer(made.backend, **names, chat_template=template)
    chat = [{"role": "user", "content": "add first"}, {"role": "assistant", "content": "  add  second "}]
    ids, learned = tokenizer.encode_chat(chat)
    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=False)
    begin = learned.index(True)
    assert all(learned[begin:]) and ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids[begin:-1]).replace(" ", "") == tokenizer.decode(
        tokenizer.encode("< add second >")
    ).replace(" ", "")


def test_the_date_is_the_one_that_is_given():
    tokenizer = byte_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    ids, learned = tokenizer.encode_chat(chat, now=datetime(2024, 7, 26))
    assert tokenizer.decode(ids).startswith("26 Jul 2024")
    assert sum(learned) == len("ho") + 1


def test_many_texts_in_one_array():
    for tokenizer in (byte_tokenizer(None), sentencepiece("always"), bert()):
        texts = ["add <s> d</s> [SEP]", "", "add the first"]
        ids, lengths = tokenizer.encode_arrays(texts, "uint16")
        encoded = [tokenizer.encode(text) for text in texts]
        assert ids.dtype == "uint16" and ids.tolist() == [token_id for each in encoded for token_id in each]
        assert lengths.tolist() == [len(each) for each in encoded]
