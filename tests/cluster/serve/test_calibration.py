"""Speeds learnt from first tokens, against the line that made them."""

import random

import pytest

from cluster.serve.calibration import Calibration


def _observe(calibration: Calibration, replica: str, base: float, slope: float, count: int = 400, noise: float = 0.05):
    rng = random.Random(replica)
    for _ in range(count):
        tokens = rng.randrange(1, 20_000)
        calibration.observe(replica, tokens, (base + slope * tokens) * rng.uniform(1 - noise, 1 + noise))


def test_the_line_is_found():
    calibration = Calibration(1 / 32_000)
    _observe(calibration, "a", base=0.2, slope=1e-4, noise=0)
    assert calibration.speed("a").base_s == pytest.approx(0.2, rel=0.01)
    assert calibration.speed("a").s_per_token == pytest.approx(1e-4, rel=0.01)


def test_before_anything_was_seen_the_prior_holds_then_what_the_peers_do():
    calibration = Calibration(1 / 32_000)
    assert calibration.speed("a").s_per_token == 1 / 32_000 and calibration.slowness("a") == 1
    calibration.observe("a", 3_000, 0.1)
    assert calibration.speed("a").s_per_token == pytest.approx(1 / 32_000, rel=0.2)
    _observe(calibration, "a", base=0, slope=1e-3)
    assert calibration.speed("new").s_per_token == pytest.approx(1e-3, rel=0.1)


def test_it_follows_a_change():
    calibration = Calibration(1 / 32_000)
    _observe(calibration, "a", base=0, slope=1e-3)
    _observe(calibration, "a", base=0, slope=1e-5)
    assert calibration.speed("a").s_per_token == pytest.approx(1e-5, rel=0.2)


def test_equal_machines_are_equally_slow_and_a_slow_one_shows():
    calibration = Calibration(1 / 32_000)
    for n in range(4):
        _observe(calibration, f"equal{n}", base=0.01, slope=1e-4 * (1 + n / 40))
    _observe(calibration, "slow", base=0.01, slope=4e-4)
    assert [calibration.slowness(f"equal{n}") for n in range(4)] == [1.0] * 4
    assert calibration.slowness("slow") == 4.0
    calibration.drop("slow")
    assert calibration.slowness("slow") == 1.0


def test_a_few_observations_make_nobody_slow():
    calibration = Calibration(1 / 32_000)
    _observe(calibration, "a", base=0.01, slope=1e-4, count=20)
    _observe(calibration, "b", base=0.01, slope=1e-3, count=20)
    assert calibration.slowness("a") == calibration.slowness("b") == 1.0
    _observe(calibration, "a", base=0.01, slope=1e-4, count=40)
    _observe(calibration, "b", base=0.01, slope=1e-3, count=40)
    assert calibration.slowness("b") >= 8 * calibration.slowness("a")


def test_equal_machines_stay_equal_where_hardly_anything_depends_on_the_tokens():
    calibration = Calibration(1 / 32_000)
    for n in range(4):
        _observe(calibration, f"equal{n}", base=0.05, slope=1e-8, noise=0.3)
    assert [calibration.slowness(f"equal{n}") for n in range(4)] == [1.0] * 4


def test_the_same_tokens_again_and_again_give_no_line_but_no_nonsense():
    calibration = Calibration(1 / 32_000)
    for _ in range(1000):
        calibration.observe("a", 0, 0.25)
    speed = calibration.speed("a")
    assert speed.base_s == pytest.approx(0.25, rel=0.05)
    assert 1 / 3_200_000 <= speed.s_per_token <= 100 / 32_000


@pytest.mark.parametrize("base", [0.02, 0.05, 0.1, 0.2])
def test_short_prompts_make_no_equal_machines_look_unequal(base):
    rng = random.Random(base)
    calibration = Calibration(1 / 32_000)
    unequal = 0
    for _ in range(1000):
        tokens = rng.randrange(40, 200)
        calibration.observe(rng.choice("ab"), tokens, (base + 1e-4 * tokens) * rng.lognormvariate(0, 0.3))
        unequal += calibration.slowness("a") != calibration.slowness("b")
    assert unequal < 30


def test_a_new_machine_does_not_look_fast_after_its_first_token():
    calibration = Calibration(1 / 32_000)
    for replica in "ab":
        _observe(calibration, replica, base=0.01, slope=1e-3)
    for tokens in (500, 2_000, 100):
        calibration.observe("new", tokens, 0.01 + 1e-3 * tokens)
        assert calibration.slowness("new") == 1
