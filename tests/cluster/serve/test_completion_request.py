"""`/v1/completions` bodies."""

import json

import pytest

from cluster.serve.completion_request import parse_completion
from cluster.serve.protocol import MAX_CHOICES
from tests.cluster.serve.request_errors import COMPLETION, refusal


def _completion(**fields):
    return parse_completion(json.dumps({**COMPLETION, **fields}).encode())


def _error(**fields) -> dict:
    return refusal(parse_completion, COMPLETION | fields)


def test_defaults_are_openais():
    request = _completion()
    assert (request.max_tokens, request.logprobs, request.echo, request.prompts) == (16, None, False, ["hello"])


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ["text"]),
        ([1, 2], [[1, 2]]),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_are_text_or_token_ids_one_or_several(prompt, prompts):
    assert _completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [-1], [1.5], [True], {"a": 1}, 7, ["a", 1], [[1], "a"], ["a"] * (MAX_CHOICES + 1)]
)
def test_other_prompts_are_refused(prompt):
    error = _error(prompt=prompt)
    assert error["param"].startswith("prompt") and "token ids" in error["message"]


def test_prompts_times_n_are_limited():
    assert len(_completion(prompt=["a"] * (MAX_CHOICES // 2), n=2).prompts) == MAX_CHOICES // 2
    assert _error(prompt=["a"] * (MAX_CHOICES // 2 + 1), n=2)["param"] == "prompt"


def test_echo_of_nothing_but_the_prompt():
    request = _completion(max_tokens=0, echo=True, logprobs=1)
    assert (request.max_tokens, request.echo, request.logprobs) == (0, True, 1)


@pytest.mark.parametrize("fields", [{"suffix": ""}, {"best_of": 1}, {"best_of": 3, "n": 3}, {"suffix": None}])
def test_what_asks_for_nothing_is_accepted(fields):
    assert _completion(**fields).prompts == ["hello"]


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("suffix", {"suffix": "x"}),
        ("best_of", {"best_of": 2}),
        ("best_of", {"best_of": 3, "n": 2}),
        ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
    ],
)
def test_what_is_not_supported_is_refused(field, fields):
    error = _error(**fields)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


def test_logprobs_are_at_most_five():
    assert _error(logprobs=6)["param"] == "logprobs"
