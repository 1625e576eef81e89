import math

import pytest

from llama.engine import SamplingParams


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
    ],
)
def test_a_bad_field_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        SamplingParams(**{field: value})
    assert str(value) in str(caught.value)


def test_stop_takes_one_string_or_a_list():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]) == SamplingParams(stop=("a", "b"), stop_token_ids=(3,))
