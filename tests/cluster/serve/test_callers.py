"""What a handler learns of who asks."""

import pytest
from fastapi import Request

from cluster.serve.api_error import ApiError
from cluster.serve.callers import ANONYMOUS, CALLER, METER, Caller, Meter, caller_of, meter_of
from cluster.serve.limits import Allowance, Limits


def _http(**state: object) -> Request:
    return Request({"type": "http", "headers": [], "state": state})


def test_without_a_gate_everybody_is_anonymous_and_counts_nothing():
    http = _http()
    assert caller_of(http) is ANONYMOUS and ANONYMOUS.operator and ANONYMOUS.salt == ""
    meter_of(http).prompt(10**9)
    assert ANONYMOUS.priority_for(-100) == -100 and ANONYMOUS.priority_for(None) == 0


def test_the_gates_notes_are_found():
    caller, meter = Caller("alice", "alice", 0, False), Meter()
    http = _http(**{CALLER: caller, METER: meter})
    assert caller_of(http) is caller and meter_of(http) is meter


@pytest.mark.parametrize(
    ("highest", "asked", "given"), [(0, None, 0), (0, 3, 3), (-2, None, 0), (-2, -2, -2), (5, None, 5), (5, 5, 5)]
)
def test_priorities_that_a_key_allows(highest, asked, given):
    assert Caller("a", priority=highest).priority_for(asked) == given


@pytest.mark.parametrize(("highest", "asked"), [(0, -1), (5, 4), (5, 0)])
def test_priorities_that_it_does_not(highest, asked):
    with pytest.raises(ApiError, match=f"give {highest} or more") as caught:
        Caller("a", priority=highest).priority_for(asked)
    assert (caught.value.status, caught.value.param) == (403, "priority")


def test_a_meter_counts_what_is_known_when_it_is_known_and_gives_all_back():
    allowance = Allowance(Limits(tokens_per_minute=100), lambda: 0.0)

    def left() -> int:
        return int(allowance.headers()["x-ratelimit-remaining-tokens"])

    meter = Meter(allowance)
    meter.prompt(60)
    with pytest.raises(ApiError) as caught:
        meter.prompt(60)
    assert (caught.value.status, caught.value.kind, left()) == (429, "tokens", 40)
    meter.generated(30)
    assert left() == 10
    meter.generated(30)
    with pytest.raises(ApiError):
        Meter(allowance).prompt(1)
    meter.refund()
    meter.refund()
    assert left() == 100
