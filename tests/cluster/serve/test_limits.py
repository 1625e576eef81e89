"""Rates and concurrency, against a clock that the test moves."""

import random

import pytest

from cluster.serve.limits import Allowance, Bucket, Limits, RateLimited, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_was_taken_flows_back_evenly(clock):
    bucket = Bucket(60, clock)
    assert [bucket.take(20) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(5) == pytest.approx(5)
    clock.now += 5
    assert bucket.take(5) == 0 and bucket.take(1) == pytest.approx(1)
    clock.now += 1000
    assert bucket.level() == 60 and bucket.full_s() == 0


def test_whoever_waits_as_told_is_let_in_and_never_before(clock):
    bucket, dice = Bucket(97, clock), random.Random(0)
    for _ in range(300):
        amount = dice.choice([1, 3, 10, 97, 500])
        wait = bucket.take(amount)
        if wait:
            clock.now += wait * 0.99
            assert bucket.take(amount) > 0
            clock.now += wait * 0.0101
            assert bucket.take(amount) == 0
        clock.now += dice.random()


def test_over_time_no_more_is_taken_than_the_rate_and_one_burst(clock):
    bucket, dice, started, taken = Bucket(600, clock), random.Random(1), 1000.0, 0
    for _ in range(5000):
        amount = dice.randrange(1, 60)
        taken += amount if bucket.take(amount) == 0 else 0
        clock.now += dice.random() / 2
        assert taken <= 600 + (clock.now - started) * 10 + 1e-6
    assert taken > 0.95 * (clock.now - started) * 10


def test_a_debt_is_paid_back_before_anything_is_taken_and_more_than_a_minute_fits_after_rest(clock):
    bucket = Bucket(60, clock)
    bucket.spend(90)
    assert bucket.take(1) == pytest.approx(31)
    bucket.spend(-30)
    assert bucket.take(1) == pytest.approx(1)
    bucket.spend(-1000)
    assert bucket.level() == 60
    assert bucket.take(100) == 0 and bucket.level() == -40


def test_requests_at_once(clock):
    allowance = Allowance(Limits(concurrency=2, requests_per_minute=100), clock)
    allowance.enter()
    allowance.enter()
    with pytest.raises(RateLimited, match="2 requests at once") as caught:
        allowance.enter()
    assert caught.value.status == 429 and caught.value.retry_after_s == 1
    assert allowance.headers()["x-ratelimit-remaining-requests"] == "98", "a refused request costs nothing"
    allowance.leave()
    allowance.enter()


def test_requests_a_minute(clock):
    allowance = Allowance(Limits(requests_per_minute=3), clock)
    for _ in range(3):
        allowance.enter()
        allowance.leave()
    with pytest.raises(RateLimited) as caught:
        allowance.enter()
    error = caught.value
    assert (error.kind, error.code, error.retry_after_s) == ("requests", "rate_limit_exceeded", pytest.approx(20))
    assert allowance.headers() == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    clock.now += error.retry_after_s
    allowance.enter()
    assert allowance.running == 1


def test_tokens_a_minute(clock):
    allowance = Allowance(Limits(tokens_per_minute=600), clock)
    allowance.enter()
    allowance.take_tokens(500)
    with pytest.raises(RateLimited) as caught:
        allowance.take_tokens(200)
    assert caught.value.kind == "tokens" and caught.value.retry_after_s == pytest.approx(10)
    assert allowance.headers()["x-ratelimit-remaining-tokens"] == "100"
    allowance.spend_tokens(300)
    assert allowance.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited):
        allowance.enter()
    clock.now += 20.2
    allowance.enter()


def test_without_limits_there_are_none_and_no_headers(clock):
    allowance = Allowance(Limits(), clock)
    for _ in range(1000):
        allowance.enter()
        allowance.take_tokens(10**9)
        allowance.spend_tokens(10**9)
    assert allowance.headers() == {}


def test_new_limits_keep_what_they_do_not_change(clock):
    allowance = Allowance(Limits(requests_per_minute=2, concurrency=2), clock)
    allowance.enter()
    allowance.enter()
    allowance.set(Limits(requests_per_minute=2, concurrency=3, tokens_per_minute=5))
    with pytest.raises(RateLimited, match="2 requests a minute"):
        allowance.enter()
    allowance.set(Limits(concurrency=2))
    with pytest.raises(RateLimited, match="at once"):
        allowance.enter()


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shares_of_a_limit(processes):
    share = Limits(100, 10_000, 4).share(processes)
    assert share.requests_per_minute * processes <= 100 < (share.requests_per_minute + 1) * processes
    assert share.tokens_per_minute * processes <= 10_000
    assert 4 <= share.concurrency * processes < 4 + processes
    assert Limits().share(processes) == Limits()
    assert Limits(1, 1, 1).share(processes) == Limits(1, 1, 1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0171, "18ms"), (0.9999, "1000ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s")]
)
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert duration(seconds) == text
