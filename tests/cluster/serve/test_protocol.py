"""Request bodies: what is obeyed, and OpenAI's error shape for the rest."""

import json

import pytest

from cluster.serve.protocol import ApiError, parse_chat, parse_completion

COMPLETION = {"model": "m", "prompt": "hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def _completion(**fields):
    return parse_completion(json.dumps({**COMPLETION, **fields}).encode())


def _chat(**fields):
    return parse_chat(json.dumps({**CHAT, **fields}).encode())


def _error(parse, **fields) -> dict:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    error = caught.value.body()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    return error


def test_defaults_are_openais():
    request = _completion()
    assert (request.max_tokens, request.temperature, request.top_p, request.stop_strings) == (16, 1.0, 1.0, ())
    assert not request.stream and request.seed is None and request.logprobs is None
    chat = _chat()
    assert chat.token_limit is None and not chat.logprobs


def test_obeyed_fields_arrive():
    request = _completion(
        max_tokens=3,
        temperature=0,
        top_p=0.5,
        seed=7,
        stop=["a", "b"],
        logprobs=2,
        user="u",
        stream=True,
        stream_options={"include_usage": True},
    )
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (3, 0, 0.5, 7)
    assert request.stop_strings == ("a", "b") and request.logprobs == 2 and request.include_usage
    assert _completion(stop="x").stop_strings == ("x",)
    assert _chat(max_tokens=3).token_limit == 3
    assert _chat(max_completion_tokens=4).token_limit == 4
    assert _chat(logprobs=True, top_logprobs=2).top_logprobs == 2


@pytest.mark.parametrize("prompt", ["text", [1, 2, 3]])
def test_a_prompt_is_text_or_token_ids_alone_or_in_a_list_of_one(prompt):
    assert _completion(prompt=prompt).prompt == prompt
    assert _completion(prompt=[prompt]).prompt == prompt


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [[1], [2]], [-1], [1.5], [True], {"a": 1}, 7, ["a", 1]])
def test_other_prompts_are_refused(prompt):
    assert _error(_completion, prompt=prompt)["param"].startswith("prompt")


def test_text_parts_are_joined_and_null_members_dropped():
    messages = [
        {"role": "system", "content": "s", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
    ]
    assert [message.content for message in _chat(messages=messages).messages] == ["s", "ab", "c"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[0].content"),
        ("hello", "messages[0]"),
    ],
)
def test_messages_that_are_not_plain_text_are_refused(message, param):
    assert _error(_chat, messages=[message])["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": NaN}', b"[" * 100_000, rb'{"user": "\ud800"}']
)
@pytest.mark.parametrize("parse", [parse_completion, parse_chat])
def test_malformed_json_is_refused(body, parse):
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"


@pytest.mark.parametrize("parse", [_completion, _chat])
def test_unknown_and_unsupported_fields_are_told_apart(parse):
    assert _error(parse, bananas=1)["code"] == "unknown_parameter"
    assert _error(parse, bananas=1)["param"] == "bananas"
    assert _error(parse, presence_penalty=0.5)["code"] == "unsupported_parameter"
    assert _error(parse, n=2)["param"] == "n"


@pytest.mark.parametrize(
    ("parse", "field", "value"),
    [
        (_completion, "best_of", 1),
        (_completion, "echo", False),
        (_completion, "suffix", None),
        (_completion, "n", 1),
        (_chat, "n", 1),
        (_chat, "frequency_penalty", 0.0),
        (_chat, "logit_bias", {}),
        (_chat, "response_format", {"type": "text"}),
        (_chat, "tools", None),
        (_chat, "tool_choice", "none"),
    ],
)
def test_an_unsupported_field_is_accepted_where_it_asks_for_nothing(parse, field, value):
    assert parse(**{field: value}) == parse()  # it asks for what happens anyway


@pytest.mark.parametrize(
    ("parse", "field", "value"),
    [
        (_completion, "n", True),
        (_completion, "echo", True),
        (_completion, "suffix", "x"),
        (_completion, "echo", 0),
        (_chat, "tools", [{}]),
        (_chat, "response_format", {"type": "json_object"}),
    ],
)
def test_an_unsupported_field_that_asks_for_something_is_refused(parse, field, value):
    error = _error(parse, **{field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("seed", "x"),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", [1]),
        ("stream", "yes"),
        ("model", 3),
        ("user", 3),
    ],
)
@pytest.mark.parametrize("parse", [_completion, _chat])
def test_values_out_of_range_name_their_field(parse, field, value):
    error = _error(parse, **{field: value})
    assert error["param"].startswith(field) and error["code"] == "invalid_value"


def test_fields_that_need_each_other():
    assert "stream" in _error(_completion, stream_options={"include_usage": True})["message"]
    assert "logprobs" in _error(_chat, top_logprobs=2)["message"]
    assert "exclude" in _error(_chat, max_tokens=1, max_completion_tokens=2)["message"]
    assert _error(_completion, logprobs=6)["param"] == "logprobs"


def test_missing_fields_are_named():
    with pytest.raises(ApiError) as caught:
        parse_completion(b'{"model": "m"}')
    assert (caught.value.param, caught.value.code) == ("prompt", "missing_required_parameter")
