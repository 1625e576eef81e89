import json
import math
import pickle
from dataclasses import replace

import pytest

from llama.engine import SamplingParams
from llama.engine.params import check_params
from tests.llama.engine.models import ByteTokenizer


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("seed", "x"),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop", None),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("a",)),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", False),
        ("min_tokens", -1),
        ("min_tokens", True),
        ("min_tokens", 17),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("temperature", True),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", 1e9),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", True),
        ("ignore_eos", 1),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", [1]),
        ("json_schema", 3),
        ("regex", b"a"),
        ("grammar", 1),
    ],
)
def test_a_bad_field_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        SamplingParams(**{field: value})
    assert str(value) in str(caught.value)


def test_stop_takes_one_string_or_a_list():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]) == SamplingParams(stop=("a", "b"), stop_token_ids=(3,))


@pytest.mark.parametrize("bias", [math.nan, math.inf, 100.5, -101, True, "x"])
def test_a_bad_bias_is_named_with_its_token(bias):
    with pytest.raises(ValueError, match=r"logit_bias\[7\]=.*\[-100, 100\]"):
        SamplingParams(logit_bias={3: 1.0, 7: bias})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex=.* exclude each other"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar=.* exclude each other"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos=True contradicts regex"),
        ({"json_schema": {"maximum": math.nan}}, "json_schema=.* is not JSON"),
        ({"json_schema": {"enum": [b"x"]}}, "json_schema=.* is not JSON"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_parameters_are_copied_pickled_and_hashed():
    bias = {5: -3.0}
    params = SamplingParams(logit_bias=bias, json_schema={"b": {}, "a": "é"}, stop="x", min_tokens=3)
    bias[6] = 1.0
    assert params.logit_bias == {5: -3.0}
    assert params.json_schema == '{"b": {}, "a": "é"}' and json.loads(params.json_schema) == {"b": {}, "a": "é"}
    assert params.constraint == ("json_schema", params.json_schema)
    for same in (pickle.loads(pickle.dumps(params)), replace(params), replace(replace(params, seed=1), seed=None)):
        assert same == params and hash(same) == hash(params)
    assert SamplingParams().constraint is None


def test_what_the_model_or_its_tokenizer_cannot_do_is_refused():
    check_params(SamplingParams(logprobs=10, logit_bias={9: 1.0}, stop_token_ids=(9,)), 10, None)
    check_params(SamplingParams(stop="x"), 10, ByteTokenizer())
    for fields, message in [
        ({"logprobs": 11}, "^logprobs=11 exceeds the vocabulary of 10"),
        ({"prompt_logprobs": 11}, "^prompt_logprobs=11 exceeds the vocabulary of 10"),
        ({"logit_bias": {3: 0.5, 10: 0.5}}, r"logit_bias=10 is not a token id in \[0, 10\)"),
        ({"stop_token_ids": (10,)}, r"stop_token_ids=10 is not a token id in \[0, 10\)"),
        ({"stop": "x"}, "stop=.*needs a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_params(SamplingParams(**fields), 10, None)
