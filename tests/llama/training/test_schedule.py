import math

import pytest

from llama.training.config import ScheduleConfig
from llama.training.schedule import learning_rate

PEAK = 2e-3


def rates(config, steps=100):
    return [learning_rate(step, steps, PEAK, config) for step in range(steps)]


def test_warm_up_is_linear_and_starts_above_zero():
    warm = rates(ScheduleConfig(warmup_steps=20))[:20]
    assert warm == pytest.approx([PEAK * k / 20 for k in range(1, 21)])


def test_cosine_is_half_way_at_half_time_and_ends_at_the_floor():
    lr = rates(ScheduleConfig("cosine", warmup_steps=20, min_lr_ratio=0.1))
    assert lr[59] == pytest.approx(PEAK * (0.1 + 0.9 / 2))
    assert lr[39] == pytest.approx(PEAK * (0.1 + 0.9 * math.cos(math.pi / 8) ** 2))
    assert lr[99] == pytest.approx(PEAK * 0.1)
    assert lr[20:] == sorted(lr[20:], reverse=True)


def test_linear_falls_in_equal_steps_to_the_floor():
    lr = rates(ScheduleConfig("linear", warmup_steps=20, min_lr_ratio=0.2))
    falls = [before - after for before, after in zip(lr[19:], lr[20:], strict=False)]
    assert falls == pytest.approx([PEAK * 0.8 / 80] * 80)
    assert lr[99] == pytest.approx(PEAK * 0.2)


def test_constant_stays_at_the_peak():
    assert rates(ScheduleConfig("constant", warmup_steps=20))[19:] == [PEAK] * 81


def test_wsd_stays_at_the_peak_and_falls_in_equal_steps_over_the_last_share():
    lr = rates(ScheduleConfig("wsd", warmup_steps=20, min_lr_ratio=0.2, decay_ratio=0.25))
    assert lr[:20] == rates(ScheduleConfig("constant", warmup_steps=20))[:20]
    assert lr[20:75] == [PEAK] * 55
    assert lr[75:] == pytest.approx([PEAK * (1 - 0.8 * k / 25) for k in range(1, 26)])


def test_wsd_whose_warm_up_reaches_into_its_decay_and_of_one_step():
    lr = rates(ScheduleConfig("wsd", warmup_steps=8, min_lr_ratio=0.0, decay_ratio=0.5), steps=10)
    assert lr[7:] == pytest.approx([PEAK, PEAK / 2, 0.0])
    assert rates(ScheduleConfig("wsd", warmup_steps=0, min_lr_ratio=0.5), steps=1) == [PEAK / 2]


def test_without_warm_up_and_with_one_longer_than_the_run():
    assert rates(ScheduleConfig(warmup_steps=0, min_lr_ratio=0.0), steps=1) == pytest.approx([0.0])
    assert rates(ScheduleConfig(warmup_steps=50), steps=10)[-1] == pytest.approx(PEAK * 10 / 50)
