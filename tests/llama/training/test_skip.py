import json
import math
import random
import statistics

from llama.training.skip import StepGuard


def test_without_sigma_only_what_is_not_finite_is_skipped():
    guard = StepGuard(0.0, 128)
    assert [guard.accepts(norm) for norm in (1.0, 1e9, math.inf, math.nan, 1.0)] == [True, True, False, False, True]
    assert guard.state()["norms"] == []


def test_an_outlier_is_judged_by_the_last_applied_norms():
    guard, applied = StepGuard(3.0, 8), []
    draw = random.Random(0)
    for step in range(200):
        norm = 50.0 if step % 10 == 9 else draw.uniform(1, 3)
        last = applied[-8:]
        expected = len(last) < 4 or norm <= statistics.mean(last) + 3.0 * statistics.stdev(last)
        assert guard.accepts(norm) == expected
        if expected:
            applied.append(norm)
    assert 150 < len(applied) <= 180 and 50.0 not in applied


def test_nothing_is_skipped_before_half_a_window_is_known():
    guard = StepGuard(1.0, 8)
    assert [guard.accepts(norm) for norm in (1.0, 1.0, 1.0, 99.0)] == [True] * 4
    fresh = StepGuard(1.0, 8)
    assert [fresh.accepts(norm) for norm in (1.0, 1.1, 0.9, 1.0, 99.0)] == [True] * 4 + [False]


def test_gradients_that_have_grown_for_good_are_taken_again():
    guard = StepGuard(2.0, 8)
    for norm in (1.0, 1.1, 0.9, 1.0):
        guard.accepts(norm)
    assert [guard.accepts(norm) for norm in (9.0, 9.1, 9.0, 9.2, 9.1)] == [False, False, False, True, True]


def test_a_restored_guard_decides_the_same():
    draw = random.Random(1)
    norms = [draw.lognormvariate(0, 1) for _ in range(100)]
    whole, first = StepGuard(1.0, 16), StepGuard(1.0, 16)
    expected = [whole.accepts(norm) for norm in norms]
    decided = [first.accepts(norm) for norm in norms[:50]]
    second = StepGuard(1.0, 16)
    second.restore(**json.loads(json.dumps(first.state())))
    assert decided + [second.accepts(norm) for norm in norms[50:]] == expected
    assert 0 < expected.count(False) < 50
