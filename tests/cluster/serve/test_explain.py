"""The reasons, for scores that the production cost function gives."""

import pytest

from cluster.serve.cost import Candidate, CostCoefficients, choose
from cluster.serve.explain import why
from cluster.serve.record import Attempt

HASHES = tuple(bytes([n]) * 16 for n in range(6))
COEFFICIENTS = CostCoefficients(prefill_s_per_token=0.001)


def _why(*candidates: Candidate, replica: str | None = "", avoid: frozenset[str] = frozenset()) -> str:
    scores = choose(HASHES, 100, 16, candidates, COEFFICIENTS, avoid)
    chosen = scores[0].replica if replica == "" else replica
    return why(Attempt(0.0, 0.0, chosen, "answered", tuple(scores)).as_json(COEFFICIENTS))


def _replica(name: str, matched: int = 0, pending: int = 0, decode: int = 0, active: int = 0, free: int = 50, **other):
    return Candidate(name, matched, pending, decode, active, free, **other)


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ((_replica("a", 4), _replica("b", 1)), "240 ms cheaper than b: 48 fewer tokens to compute"),
        (
            (_replica("a", 4, pending=100), _replica("b", 1)),
            "140 ms cheaper than b: 48 fewer tokens to compute, though 100 more tokens waiting before it",
        ),
        ((_replica("a"), _replica("b", pending=2500)), "2.50 s cheaper than b: 2,500 fewer tokens waiting before it"),
        ((_replica("a"), _replica("b", decode=1000)), "30 ms cheaper than b: 1,000 fewer tokens of running context"),
        ((_replica("a"), _replica("b", free=6)), "16 ms cheaper than b: more free blocks"),
        (
            (_replica("a", free=6), _replica("b", pending=100)),
            "84 ms cheaper than b: 100 fewer tokens waiting before it, though fewer free blocks",
        ),
        ((_replica("a"), _replica("b", slowness=2.0)), "500 ms cheaper than b: it is faster"),
        ((_replica("a", active=2), _replica("b", active=5)), "costs as much as b, with 2 requests to its 5"),
        ((_replica("a"),), "the only one there was"),
        ((_replica("a"), _replica("b", 4, draining=True)), "the only one that is not draining"),
        ((_replica("a", 4), _replica("b", draining=True)), "b, the next, is draining"),
    ],
)
def test_the_term_that_decided_is_named(candidates, reason):
    assert _why(*candidates) == reason
    assert _why(*reversed(candidates)) == reason


def test_equal_costs_are_decided_by_the_hash():
    assert _why(_replica("a"), _replica("b")).endswith("; the hash of the first missing block decides")


def test_the_choice_was_not_the_routers_alone():
    assert _why(_replica("a", 4), _replica("b"), replica="b") == "a came first and did not take it"
    assert _why(_replica("a", 4), _replica("b"), replica=None) == "no replica took it"
    assert _why(_replica("a"), replica="new") == "the router did not know it yet"
    assert _why(_replica("a", 4), _replica("b"), avoid=frozenset("a")) == (
        "a, the next, costs less and had failed it before"
    )
    assert why(Attempt(0.0, None, "a", "replica_lost", ()).as_json(COEFFICIENTS)) == "the router was not asked"
