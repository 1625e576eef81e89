"""`/v1/chat/completions` bodies."""

import json

import pytest

from cluster.serve.chat_request import parse_chat
from tests.cluster.serve.request_errors import CHAT, refusal


def _chat(**fields):
    return parse_chat(json.dumps({**CHAT, **fields}).encode())


def _error(**fields) -> dict:
    return refusal(parse_chat, CHAT | fields)


def test_obeyed_fields_arrive():
    assert _chat().token_limit is None and not _chat().logprobs
    assert _chat(max_tokens=3).token_limit == 3
    assert _chat(max_completion_tokens=4).token_limit == 4
    assert _chat(logprobs=True, top_logprobs=2).top_logprobs == 2


def test_text_parts_are_joined_and_null_members_dropped():
    messages = [
        {"role": "system", "content": "s", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "developer", "content": "d"},
    ]
    plain = [(turn["role"], turn["content"]) for turn in _chat(messages=messages).conversation]
    assert plain == [("system", "s"), ("user", "ab"), ("assistant", "c"), ("system", "d")]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[0].content"),
        ({"role": "user", "content": [7]}, "messages[0].content"),
        ({"role": "user", "content": "x", "name": "n"}, "messages[0].name"),
        ("hello", "messages[0]"),
    ],
)
def test_messages_that_are_not_plain_text_are_refused(message, param):
    assert _error(messages=[message])["param"] == param


@pytest.mark.parametrize(
    ("form", "constraint"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ("json_schema", '{"type": "object"}')),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}, "strict": True}},
            ("json_schema", '{"type": "null"}'),
        ),
    ],
)
def test_response_formats_constrain_the_output(form, constraint):
    assert _chat(response_format=form).sampling(9, None).constraint == constraint


@pytest.mark.parametrize(
    "form", ["json", {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": {}}}]
)
def test_other_response_formats_are_refused(form):
    assert _error(response_format=form)["param"].startswith("response_format")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None},
        {"tools": []},
        {"tool_choice": "none"},
        {"modalities": ["text"]},
        {"store": False},
        {"user": "u"},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields):
    assert _chat(**fields).conversation == _chat().conversation


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("audio", {}),
        ("modalities", ["audio"]),
        ("store", True),
        ("store", 0),
        ("reasoning_effort", "low"),
    ],
)
def test_what_is_not_supported_is_refused(field, value):
    error = _error(**{field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


def test_a_template_of_the_clients_is_no_field():
    assert _error(chat_template="{{ 1 }}")["code"] == "unknown_parameter"


def test_fields_that_need_each_other():
    assert "logprobs" in _error(top_logprobs=2)["message"]
    assert "exclude" in _error(max_tokens=1, max_completion_tokens=2)["message"]
    assert _error(max_tokens=0)["param"] == "max_tokens"
