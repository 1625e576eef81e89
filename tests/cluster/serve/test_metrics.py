"""The metrics, read back from Prometheus's text by prometheus_client's own parser."""

import pickle
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.serve import metrics
from cluster.serve.metrics import METRICS, Batch, Metrics, PrometheusSink, exposition
from tests.cluster.serve.test_record import _answered

RECORD = _answered()


def _samples(text: bytes) -> dict[tuple, float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def _total(samples: dict[tuple, float], name: str) -> float:
    """The sum over all series of a name; 0 where there is none."""
    return sum(value for key, value in samples.items() if key[0] == name)


def _value(samples: dict[tuple, float], name: str, **labels: str) -> float:
    """The sum over the series that carry these labels."""
    wanted = set(labels.items())
    values = [value for key, value in samples.items() if key[0] == name and wanted <= set(key[1:])]
    assert values, f"no {name} {labels}"
    return sum(values)


def test_a_request_shows_in_every_metric_it_concerns():
    collected = Metrics()
    collected.record(RECORD)
    collected.record(replace(RECORD, outcome="stop", predicted_cached_tokens=0, cached_tokens=16))
    collected.record(replace(RECORD, outcome="no_replica", first_token_s=None, attempts=()))
    collected.count(metrics.GENERATED_TOKENS, by=5)
    collected.count(metrics.REJECTS, "rate_limit_exceeded")
    sink = PrometheusSink(("m", "one"))
    sink.write(collected.take({(metrics.RUNNING, ("r0",)): 3}))
    found = _samples(exposition(sink.families()))
    for outcome in ("length", "stop", "no_replica"):
        assert _value(found, "caravan_requests_total", outcome=outcome, model="m", ingress="one") == 1
    assert _value(found, "caravan_retries_total", reason="replica_lost") == 2
    assert _value(found, "caravan_rejects_total", reason="rate_limit_exceeded") == 1
    assert _value(found, "caravan_prompt_tokens_total") == 80
    assert _value(found, "caravan_cached_tokens_total") == 32
    assert _value(found, "caravan_predicted_cached_tokens_total") == 32
    assert _value(found, "caravan_prediction_error_tokens_total") == 16 + 16
    assert _value(found, "caravan_generated_tokens_total") == 5
    assert _value(found, "caravan_preemptions_total") == 2
    assert _value(found, "caravan_pick_seconds_count") == 4
    assert _value(found, "caravan_time_to_first_token_seconds_count") == 2
    assert _value(found, "caravan_time_to_first_token_seconds_sum") == pytest.approx(2.0)
    assert _value(found, "caravan_time_to_first_token_seconds_bucket", le="1.0") == 2
    assert _value(found, "caravan_time_to_first_token_seconds_bucket", le="0.5") == 0
    assert _value(found, "caravan_inter_token_seconds_sum") == pytest.approx(0.5)
    assert _value(found, "caravan_longest_gap_seconds_sum") == pytest.approx(1.6)
    assert _value(found, "caravan_queue_seconds_sum") == pytest.approx(0.25)
    assert _value(found, "caravan_request_seconds_sum") == pytest.approx(5.0)
    assert _value(found, "caravan_replica_running", replica="r0") == 3


def test_counters_go_on_and_the_gauges_of_who_has_left_go():
    collected, sink = Metrics(), PrometheusSink(("m", "one"))
    for replica in ("r0", "r1"):
        collected.count(metrics.GENERATED_TOKENS, by=2)
        sink.write(collected.take({(metrics.RUNNING, (replica,)): 1}))
    found = _samples(exposition(sink.families()))
    assert _value(found, "caravan_generated_tokens_total") == 4
    assert [dict(key[1:])["replica"] for key in found if key[0] == "caravan_replica_running"] == ["r1"]
    assert collected.take({}) == Batch()


def test_observations_that_nobody_takes_do_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_OBSERVATIONS", 10)
    collected = Metrics()
    for _ in range(5):
        collected.record(RECORD)
    assert len(collected.take({}).observations) == 10


def test_what_has_not_happened_yet_is_zero_and_not_absent():
    found = _samples(exposition(PrometheusSink(("m", "one")).families()))
    assert _value(found, "caravan_prompt_tokens_total") == 0
    assert _value(found, "caravan_time_to_first_token_seconds_count") == 0


def test_several_processes_are_one_text():
    families = []
    for name in ("one", "two"):
        collected, sink = Metrics(), PrometheusSink(("m", name))
        collected.record(RECORD)
        sink.write(collected.take({}))
        families += pickle.loads(pickle.dumps(sink.families()))
    text = exposition(families)
    found = _samples(text)
    assert _value(found, "caravan_prompt_tokens_total") == 80
    assert _value(found, "caravan_prompt_tokens_total", ingress="two") == 40
    types = Counter(line for line in text.decode().splitlines() if line.startswith("# TYPE"))
    assert set(types.values()) == {1}


def test_every_metric_has_a_name_of_its_own_and_says_what_it_means():
    names = [name for metric in METRICS for name in metric.series]
    assert len(names) == len(set(names)) and len(METRICS) >= 20
    for metric in METRICS:
        assert metric.name.startswith("caravan_") and metric.help.endswith(".")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert list(metric.buckets) == sorted(set(metric.buckets)) and bool(metric.buckets) == (
            metric.kind == "histogram"
        )


def test_the_manual_lists_the_metrics_as_they_are():
    manual = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    listed = re.findall(r"^\| `(caravan_\w+)(?:\{([^}]*)\})?` \| (.*) \|$", manual, re.MULTILINE)
    assert listed == [(metric.name, ", ".join(metric.labels), metric.help) for metric in METRICS]
