"""`/tokenize` and `/detokenize` bodies."""

import json

import pytest

from cluster.serve.tokenize_request import parse_detokenize, parse_tokenize
from tests.cluster.serve.request_errors import refusal

TURN = {"role": "user", "content": "x"}


def test_a_text_or_a_conversation():
    assert parse_tokenize(b'{"prompt": ""}').prompt == ""
    messages = parse_tokenize(json.dumps({"messages": [TURN], "add_generation_prompt": False}).encode()).messages
    assert [message.plain for message in messages] == [TURN]
    assert parse_detokenize(b'{"tokens": []}').tokens == []


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (parse_tokenize, {}),
        (parse_tokenize, {"prompt": "x", "messages": [TURN]}),
        (parse_tokenize, {"prompt": [1]}),
        (parse_tokenize, {"prompt": "x", "add_special_tokens": True}),
        (parse_detokenize, {}),
        (parse_detokenize, {"tokens": [-1]}),
        (parse_detokenize, {"tokens": "x"}),
        (parse_detokenize, {"tokens": [1], "bananas": 1}),
    ],
)
def test_others_are_refused(parse, body):
    assert refusal(parse, body)["code"]
