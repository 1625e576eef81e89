"""Records, metrics and the log of one ingress process, without Ray."""

import asyncio
import logging
from dataclasses import replace

import pytest

from cluster.serve import metrics
from cluster.serve.api_error import ApiError
from cluster.serve.messages import ReplicaInfo, ReplicaLoad, ReplicaUpdate
from cluster.serve.metrics import Batch, exposition
from cluster.serve.observer import Observer
from cluster.serve.state import RoutingState
from llama.engine import CacheSnapshot
from tests.cluster.serve.test_metrics import _samples, _value
from tests.cluster.serve.test_record import REQUEST, _chunk

INFO = ReplicaInfo("a", 1, "n", "w", 400, 512, 16, 200)
LOAD = ReplicaLoad(3, 2, 150, 640, 0, 0, 0, 0, 0)


def _observer() -> Observer:
    state = RoutingState()
    state.set_replicas(["a", "b"])
    state.apply_update("a", ReplicaUpdate("e", LOAD, snapshot=CacheSnapshot("e", 0, ()), info=INFO))
    return Observer(state, model="m", ingress="i")


def _answer(observer: Observer, name: str, *reasons: str | None, ends_with: BaseException | None = None) -> None:
    request = replace(REQUEST, request_id=name)
    with observer.following(request) as recording, recording.attempt(lambda: ("a", None)):
        for count, reason in enumerate(reasons, start=1):
            observer.chunk(recording, "a", 16, _chunk(count, reason))
        if ends_with is not None:
            raise ends_with


def test_however_a_request_ends_there_is_a_record_a_count_and_a_line(caplog):
    observer = _observer()
    lost = ApiError(503, "gone", code="replica_lost")
    with caplog.at_level(logging.INFO, "ray.serve"):
        _answer(observer, "whole", None, "stop")
        for name, error in (("lost", lost), ("left", asyncio.CancelledError()), ("defect", RuntimeError("secret"))):
            with pytest.raises(type(error)):
                _answer(observer, name, None, ends_with=error)
        with pytest.raises(GeneratorExit):
            _answer(observer, "read", "length", ends_with=GeneratorExit())
    found = {record.request_id: (record.status, record.outcome) for record in observer.records.newest(9)}
    assert found == {
        "whole": (200, "stop"),
        "lost": (503, "replica_lost"),
        "left": (499, "cancelled"),
        "defect": (500, "internal_error"),
        "read": (200, "length"),
    }
    assert [record.message.split()[1] for record in caplog.records] == [
        f"id={name}" for name in ("whole", "lost", "left", "defect", "read")
    ]
    assert "secret" not in caplog.text
    samples = _samples(exposition(asyncio.run(observer.families())))
    for _, outcome in found.values():
        assert _value(samples, "caravan_requests_total", outcome=outcome) == 1
    assert _value(samples, "caravan_generated_tokens_total") == 2 + 1 + 1 + 1 + 1


def test_the_replicas_are_gauges():
    observer = _observer()
    observer.refused("rate_limit_exceeded")
    samples = _samples(exposition(asyncio.run(observer.families())))
    assert _value(samples, "caravan_rejects_total", reason="rate_limit_exceeded") == 1
    assert _value(samples, "caravan_replicas") == 2 and _value(samples, "caravan_replicas_fresh") == 1
    assert _value(samples, "caravan_replica_running", replica="a") == 3
    assert _value(samples, "caravan_replica_waiting", replica="a") == 2
    assert _value(samples, "caravan_replica_kv_used_ratio", replica="a") == pytest.approx(0.25)
    assert _value(samples, "caravan_replica_pending_prefill_seconds", replica="a") == pytest.approx(0.02)
    assert _value(samples, "caravan_replica_weights", replica="a", weights_id="w") == 1
    assert not [key for key in samples if ("replica", "b") in key]  # it has not reported anything


def test_every_sink_gets_everything_once_and_a_failing_one_does_not_end_the_reports(monkeypatch, caplog):
    monkeypatch.setattr("cluster.serve.observer.REPORT_S", 0.01)

    class Sink:
        def __init__(self) -> None:
            self.batches: list[Batch] = []

        def write(self, batch: Batch) -> None:
            self.batches.append(batch)
            if len(self.batches) == 1:
                raise OSError("not now")

    async def run() -> None:
        observer.start(sink)
        _answer(observer, "r", "stop")
        while len(sink.batches) < 3:
            await asyncio.sleep(0.01)
        observer.stop()

    observer, sink = _observer(), Sink()
    asyncio.run(asyncio.wait_for(run(), 10))
    assert [batch.counts.get((metrics.REQUESTS, ("stop",)), 0) for batch in sink.batches][:3] == [1, 0, 0]
    assert all((metrics.RUNNING, ("a",)) in batch.gauges for batch in sink.batches)
    assert "could not be reported" in caplog.text
