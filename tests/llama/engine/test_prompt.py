import math

import pytest

from llama.engine import Engine, SamplingParams
from tests.llama.engine.models import random_model

GREEDY = SamplingParams(temperature=0, max_tokens=2)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("salt", [5, None, b"tenant", "\ud800"]),
        ("request_id", [5, ["a"], "\udfff"]),
        ("priority", [1.0, "high", None, True]),
        ("timeout_s", [0, -1, math.nan, "5", True]),
    ],
)
def test_a_bad_setting_is_named_and_queues_nothing(field, values):
    engine = Engine(random_model())
    for value in values:
        with pytest.raises(ValueError, match=f"^{field}="):
            engine.add_request([1], GREEDY, **{field: value})
    assert engine.stats().waiting == 0 and not engine.has_work


def test_a_name_that_a_caller_chose_is_not_given_to_another():
    engine = Engine(random_model())
    first = engine.add_request([1], GREEDY)
    for number in range(4):
        engine.add_request([1], GREEDY, request_id=f"{first.removesuffix('0')}{number + 1}")
    assert len({engine.add_request([1], GREEDY) for _ in range(3)}) == 3
    assert engine.stats().waiting == 8
