import pytest

from cluster.serve.replay.load import at_load, endless_hit_rate, offered_load, offered_work_s, within
from cluster.serve.replay.measure import Outcome, Replay, summary
from cluster.serve.replay.timing import MODELLED_ENGINE, StepTime
from cluster.serve.replay.trace import Prompts, TraceRequest


def test_a_summary_counts_what_was_answered():
    outcomes = [
        Outcome(0.0, 100, "a", 1.0, 4.0, cached_tokens=50, predicted_tokens=60, work_s=3.0),
        Outcome(1.0, 300, "b", 4.0, 6.0, cached_tokens=0, predicted_tokens=0, work_s=1.0),
        Outcome(2.0, 500, error="full"),
    ]
    figures = summary(Replay(outcomes, 2, 8.0, picks_s=[1e-6, 3e-6]), deadline_s=2.0)
    assert (figures["requests"], figures["rejects"]) == (3, 1)
    assert (figures["ttft_mean"], figures["ttft_p50"], figures["ttft_p99"]) == (2.0, 1.0, 3.0)
    assert figures["e2e_mean"] == 4.5
    assert figures["goodput"] == pytest.approx(1 / 3)
    assert figures["hit_rate"] == 50 / 400 and figures["predicted_error"] == 10 / 400
    assert figures["imbalance"] == 0.5
    assert figures["pick_us_p50"] == pytest.approx(1) and figures["index_lag_ms_p99"] is None


def test_nobody_answered_is_no_division_by_zero():
    figures = summary(Replay([Outcome(0.0, 1, error="full")], 1, 1.0), 1.0)
    assert figures["ttft_mean"] is None and figures["goodput"] == 0 and figures["imbalance"] == 0


def test_load_is_work_over_capacity():
    timing = StepTime(fixed_s=0.01, prefill_s_per_token=0.001, decode_s_per_context_token=0.0001)
    requests = [TraceRequest(10.0 * number, 1000, 3, (2 * number, 2 * number + 1)) for number in range(11)]
    # Half of 1000 tokens in chunks of 2048, and three tokens that read 1000, 1001 and 1002.
    each = 500 * (0.001 + 0.01 / 2048) + 3003 * 0.0001
    work = offered_work_s(requests, 0.5, timing, MODELLED_ENGINE, Prompts())
    assert work == pytest.approx(11 * each)
    scaled = at_load(requests, 0.8, 4, work)
    assert scaled[0].at == 0 and scaled[-1].at * 4 * 0.8 == pytest.approx(work)
    assert offered_load(scaled, 4, work) == pytest.approx(0.8)
    assert within(requests, scaled[-1].at / 2, 0.8, 4, work) == 5
    assert within(requests, 1e9, 0.8, 4, work) == 11 and within(requests, 1e-9, 0.8, 4, work) == 1


def test_the_hit_rate_of_an_endless_cache():
    requests = [TraceRequest(0, 1024, 1, (1, 2)), TraceRequest(0, 1024, 1, (1, 3)), TraceRequest(0, 1024, 1, (1, 2))]
    assert endless_hit_rate(requests, Prompts()) == pytest.approx((512 + 1023) / 3072)
