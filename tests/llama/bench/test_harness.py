import random

import pytest

from llama.bench.harness import BenchError, interleave, ratio


def test_every_contestant_runs_once_a_round_in_a_turning_order_after_one_call_that_is_not_counted() -> None:
    calls: list[str] = []
    seconds = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert calls == [*"abc", *"abc", *"bca", *"cab"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize(
    ("own", "peer", "median", "verdict"),
    [
        ([1.0, 2.0, 1.0, 2.0, 1.0], [2.0, 4.0, 2.0, 4.0, 2.0], 2.0, "faster"),  # the machine's pace changed, not ours
        ([2.0, 2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.9, 1.0], 0.5, "slower"),
        ([2.0, 2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 2.1, 1.0], 0.5, "no verdict"),
        ([1.0, 1.0, 1.0, 1.0, 1.0], [0.8, 0.9, 1.1, 1.2, 1.3], 1.1, "no verdict"),
    ],
)
def test_ratios_are_taken_round_by_round(own: list[float], peer: list[float], median: float, verdict: str) -> None:
    found = ratio(own, peer)
    assert found.median == pytest.approx(median) and found.verdict == verdict
    assert found.low <= found.median <= found.high and verdict in str(found)


def test_few_rounds_give_no_verdict() -> None:
    with pytest.raises(BenchError, match="rounds=4 are too few"):
        ratio([1.0] * 4, [1.0] * 4)


def test_equals_seldom_get_a_verdict() -> None:
    noise = random.Random(0)

    def round_times() -> list[float]:
        return [noise.lognormvariate(0, 0.05) for _ in range(7)]

    verdicts = [ratio(round_times(), round_times()).verdict for _ in range(2000)]
    assert sum(verdict != "no verdict" for verdict in verdicts) / 2000 < 0.03
