"""What both kinds of generation have in common: what is obeyed, and OpenAI's error shape for the rest."""

import json
from functools import partial

import pytest

from cluster.serve.api_error import ApiError
from cluster.serve.chat_request import parse_chat
from cluster.serve.completion_request import parse_completion
from cluster.serve.protocol import MAX_CHOICES
from cluster.serve.tokenize_request import parse_detokenize, parse_tokenize
from llama.engine import SamplingParams
from tests.cluster.serve.request_errors import CHAT, COMPLETION, refusal

KINDS = pytest.mark.parametrize(
    ("parse", "body"), [(parse_completion, COMPLETION), (parse_chat, CHAT)], ids=["completion", "chat"]
)


def _read(parse, body):
    return parse(json.dumps(body).encode())


@KINDS
def test_defaults_are_openais_and_the_engines(parse, body):
    request = _read(parse, body)
    assert not request.stream and not request.include_usage and not request.continuous_usage
    assert request.sampling(16, None) == SamplingParams()


@KINDS
def test_every_obeyed_field_reaches_the_engine(parse, body):
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"7": -100, "8": 2.5},
        "seed": 7,
        "stop": ["a", "b"],
        "top_k": 5,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "stop_token_ids": [3],
        "ignore_eos": True,
    }
    params = _read(parse, body | fields).sampling(9, 3)
    for name, value in (fields | {"max_tokens": 9, "logprobs": 3}).items():
        expected = tuple(value) if isinstance(value, list) else value
        expected = {7: -100, 8: 2.5} if name == "logit_bias" else expected
        assert getattr(params, name) == expected, name
    assert _read(parse, body | {"stop": "x"}).sampling(9, None).stop == ("x",)
    assert _read(parse, body | {"top_k": -1}).sampling(9, None).top_k == 0


@KINDS
@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"structured_outputs": {"json": {"type": "null"}}}, ("json_schema", '{"type": "null"}')),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, ("grammar", 'start: "a"')),
        ({"structured_outputs": {"choice": ["a.b", "c"]}}, ("regex", r"a\.b|c")),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", '{"type": "object"}')),
        ({"guided_json": '{"type": "null"}'}, ("json_schema", '{"type": "null"}')),
        ({"guided_regex": "a+"}, ("regex", "a+")),
        ({"guided_choice": ["a"]}, ("regex", "a")),
        ({"guided_grammar": 'start: "a"'}, ("grammar", 'start: "a"')),
        ({"structured_outputs": {}}, None),
    ],
)
def test_constraints_as_vllm_names_them(parse, body, fields, constraint):
    assert _read(parse, body | fields).sampling(9, None).constraint == constraint


@KINDS
@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"guided_regex": "a", "guided_json": {}}, "exclude"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exclude"),
        ({"min_tokens": 10}, "min_tokens=10"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(parse, body, fields, word):
    with pytest.raises(ApiError, match=word) as caught:
        _read(parse, body | fields).sampling(9, None)
    assert (caught.value.status, caught.value.code) == (400, "invalid_value")


@KINDS
def test_what_the_queue_is_told(parse, body):
    request = _read(parse, body | {"priority": -3, "max_wait_s": 0.5, "timeout_s": 20})
    assert (request.priority, request.max_wait_s, request.timeout_s) == (-3, 0.5, 20)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": NaN}', b"[" * 100_000, rb'{"user": "\ud800"}']
)
@pytest.mark.parametrize("parse", [parse_completion, parse_chat, parse_tokenize, parse_detokenize])
def test_malformed_json_is_refused(body, parse):
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"


@KINDS
def test_unknown_and_unsupported_fields_are_told_apart(parse, body):
    error = refusal(parse, body | {"bananas": 1})
    assert (error["param"], error["code"]) == ("bananas", "unknown_parameter")
    assert refusal(parse, body | {"bananas": None})["code"] == "unknown_parameter"


@KINDS
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("n", 0),
        ("n", MAX_CHOICES + 1),
        ("n", True),
        ("presence_penalty", 2.5),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", [1]),
        ("seed", "x"),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", [1]),
        ("stream", "yes"),
        ("model", 3),
        ("user", 3),
        ("top_k", -2),
        ("min_p", 1.5),
        ("stop_token_ids", [-1]),
        ("structured_outputs", {"bananas": 1}),
        ("guided_choice", []),
        ("priority", 0.5),
        ("max_wait_s", 0),
        ("timeout_s", -1),
    ],
)
def test_values_out_of_range_name_their_field(parse, body, field, value):
    error = refusal(parse, body | {field: value})
    assert error["param"].startswith(field) and error["code"] == "invalid_value"


@KINDS
def test_null_is_the_same_as_nothing(parse, body):
    names = _read(parse, body).model_fields_set
    assert _read(parse, body | {"n": None, "stop": None, "stream": None}).model_fields_set == names


@KINDS
def test_stream_options_need_a_stream(parse, body):
    assert "stream" in refusal(parse, body | {"stream_options": {"include_usage": True}})["message"]
    request = _read(parse, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert request.include_usage and not request.continuous_usage


def test_what_is_at_fault_inside_is_named():
    name = partial(refusal, parse_chat)
    assert name(CHAT | {"response_format": {"type": "json_schema", "json_schema": {}}})["param"] == (
        "response_format.json_schema.name"
    )
    assert refusal(parse_completion, COMPLETION | {"prompt": ["a", 1]})["param"].startswith("prompt")
    assert refusal(parse_completion, {"model": "m"})["code"] == "missing_required_parameter"
