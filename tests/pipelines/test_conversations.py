import json
from datetime import datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.conversations import ROLES, canonical, chat_contents, parse_chat, parse_preference

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


@given(
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.text()}, optional={"name": st.text()})
    )
)
def test_a_conversation_comes_back_from_its_text(messages):
    chat = parse_chat([*messages, ASSISTANT])
    text = canonical(chat)
    assert json.loads(text) == [*messages, ASSISTANT]
    assert canonical(parse_chat(json.loads(text))) == text
    assert chat_contents(text) == "\n".join(each["content"] for each in [*messages, ASSISTANT] if each["content"])


def test_equal_conversations_have_equal_texts_whatever_the_order_of_their_keys():
    assert canonical(parse_chat([dict(reversed(ASSISTANT.items()))])) == canonical(parse_chat([ASSISTANT]))
    assert canonical([{"role": "user", "content": "é"}]) == '[{"content":"é","role":"user"}]'


def test_what_a_table_fills_in_is_absent():
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    rows = pa.array([[USER, call, ASSISTANT]]).to_pylist()
    assert rows[0][0]["tool_calls"] is None
    assert parse_chat(rows[0]) == [USER, call, ASSISTANT]
    assert chat_contents(canonical([USER, call, ASSISTANT])) == "Hi\nHello"


def test_sharegpt():
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello")]
    assert parse_chat([{"from": speaker, "value": text} for speaker, text in turns]) == [
        {"role": "system", "content": "Be brief."},
        USER,
        ASSISTANT,
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("Hi", "messages is of type str; give a list of messages"),
        (None, "messages is of type NoneType; give a list of messages"),
        ([], "messages is empty; give at least one message"),
        ([ASSISTANT, "Hi"], r"messages\[1\] is of type str; give role and content"),
        ([{"content": "Hi"}], r"messages\[0\].role is missing; use one of system, user"),
        ([{"role": "bot", "content": "Hi"}], r"messages\[0\].role='bot' is unknown; use one of"),
        ([{"role": ["user"], "content": "Hi"}], r"messages\[0\].role=\['user'\] is unknown"),
        ([{"role": "user"}], r"messages\[0\].content is missing; give a text"),
        ([{"role": "user", "content": None, "tool_calls": [1]}], r"messages\[0\].content is missing; give a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content is of type list; give a text"),
        ([{"from": "alien", "value": "Hi"}], r"messages\[0\].from='alien' is unknown; use one of system, human"),
        ([{"from": "human"}], r"messages\[0\].content is missing"),
        ([USER], "messages has none of the role assistant; there is nothing to learn"),
    ],
)
def test_what_is_no_conversation_is_refused(value, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        parse_chat(value)


def test_preferences_are_texts_or_messages():
    texts = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
    assert parse_preference(texts | {"score": 3}) == texts
    turns = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "Go away"}]}
    assert parse_preference(turns) == turns
    assert json.loads(canonical(parse_preference(turns))) == turns


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, "prompt is missing; give a text or messages"),
        ({"chosen": ""}, "chosen is empty"),
        ({"rejected": []}, "rejected is empty"),
        ({"rejected": [{"role": "assistant"}]}, r"rejected\[0\].content is missing"),
        ({"chosen": 3}, "chosen is of type int"),
        ({"rejected": "Hello"}, "chosen and rejected are equal"),
    ],
)
def test_what_is_no_preference_is_refused(changes, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        parse_preference({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"} | changes)
    with pytest.raises(ValueError, match="of type list; give prompt, chosen and rejected"):
        parse_preference([])


@pytest.mark.parametrize("extra", [float("nan"), datetime(2020, 1, 1), b"bytes", "\ud800"])
def test_what_json_cannot_hold_is_refused(extra):
    with pytest.raises(ValueError, match="^the record (cannot be JSON|has half of a surrogate pair)"):
        canonical(parse_chat([ASSISTANT | {"extra": extra}]))


def test_what_is_nested_too_deep_is_refused():
    """Jinja and copies recurse into it, and must not run out of stack."""

    def nested(levels):
        value = "x"
        for _ in range(levels):
            value = [value]
        return [{"role": "assistant", "content": "hi", "arguments": value}]

    assert json.loads(canonical(nested(98))) == nested(98)
    for levels in (99, 100_000):
        with pytest.raises(
            ValueError, match=r"^the record has lists or objects more than 100 levels deep; flatten it$"
        ):
            canonical(nested(levels))
