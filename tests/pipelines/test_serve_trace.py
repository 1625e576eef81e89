"""A request's trace as the command draws it, from a record that the production code makes."""

from dataclasses import replace

import pytest
from rich.console import Console

from cluster.serve.cost import Candidate, CostCoefficients, choose
from cluster.serve.record import Attempt
from pipelines.serve_trace import attempt_line, scores, summary
from tests.cluster.serve.test_record import _answered

COEFFICIENTS = CostCoefficients()


def _record(**changes) -> dict:
    candidates = [
        Candidate("aaaaaaaa", 1, 4000, 123_456, 31, 12),
        Candidate("bbbbbbbb", 0, 0, 0, 0, 1 << 30, draining=True),
        Candidate("cccccccc", 6, 0, 800, 2, 4000),
    ]
    ranked = choose(tuple(bytes([n]) * 16 for n in range(6)), 100, 16, candidates, COEFFICIENTS)
    attempt = Attempt(0.002, 0.00014, "cccccccc", "answered", tuple(ranked))
    return replace(_answered(), attempts=(attempt,), **changes).as_json(COEFFICIENTS)


def test_the_summary_says_who_where_when_and_how_much():
    first, second, times, tokens = summary(_record())
    assert first == "r for alice: length (200) on r1"
    assert second.endswith("at ingress i, model m")
    assert times == "queue 125ms, first token 1.0s, then 250ms a token (longest gap 800ms), end 2.5s"
    assert tokens == ("prompt 40 tokens, cached 32 predicted and 16 found; generated 5 in 7 steps, 1 preemption")
    _, _, times, _ = summary(_record(first_token_s=None, queue_s=None, inter_token_s=None, longest_gap_s=None))
    assert times == "queue none, first token none, end 2.5s"


def test_an_attempt_says_where_it_went_and_why():
    line = attempt_line(1, _record()["attempts"][0])
    assert line.startswith("attempt 1 after 2.0ms, picked in 140 µs: cccccccc, answered; ")
    assert "cheaper than aaaaaaaa: 4,000 fewer tokens waiting before it" in line


@pytest.mark.parametrize("width", [80, 160])
def test_the_scores_fit_the_screen(width):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(scores(_record()["attempts"][0], width))
    drawn = capture.get().splitlines()
    assert len(drawn) == 4 and all(len(line.rstrip()) <= width for line in drawn) and "…" not in "".join(drawn)
    assert drawn[1].startswith("cccccccc ←") and drawn[3].startswith("bbbbbbbb (draining)")
    assert drawn[3].split()[-1 if width < 110 else -5] == "?"
    assert ("= missing" in drawn[0]) == (width >= 110)
