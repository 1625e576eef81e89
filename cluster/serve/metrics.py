"""Every metric of serving, defined once, and its two ways out: Ray's metrics agent and the ingress's own `/metrics`.

On the request path a metric costs an append or an addition. A timer, or a scrape, takes what has come together
(`Metrics.take`) and writes it to both sinks, where a value costs 2 µs (prometheus_client) and 4 to 6 µs (Ray 2.60).

Each sample names the ingress process that made it, so several processes add up; but all of them watch the same
replicas, so what describes a replica is to be read with `max by (replica)`. At Ray's agent the names begin with
`ray_`, and the `_sum` of a histogram is made of the midpoints of its buckets: trust its quantiles, not its mean.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, Protocol

import prometheus_client
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry

from cluster.serve.record import RequestRecord

PROCESS_LABELS = ("model", "ingress")
"""Of every metric, before its own labels."""

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_PICK_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 0.1)


@dataclass(frozen=True)
class Metric:
    """A metric's name, kind, meaning, own labels, and a histogram's bucket bounds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its time series in Prometheus."""
        suffixes = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return tuple(self.name + suffix for suffix in suffixes)


def _histogram(name: str, buckets: tuple[float, ...], help: str) -> Metric:
    return Metric(f"caravan_{name}", "histogram", help, buckets=buckets)


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"caravan_{name}", "counter", help, labels)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"caravan_{name}", "gauge", help, labels)


FIRST_TOKEN = _histogram("time_to_first_token_seconds", _LATENCY_S, "From a request's arrival to its first token.")
INTER_TOKEN = _histogram("inter_token_seconds", _TOKEN_S, "A request's mean time between tokens after the first.")
LONGEST_GAP = _histogram("longest_gap_seconds", _TOKEN_S, "A request's longest time between two chunks.")
END_TO_END = _histogram("request_seconds", _LATENCY_S, "From a request's arrival to its last token.")
QUEUE = _histogram("queue_seconds", _LATENCY_S, "In the engine's queue, before a step computed a part of the request.")
PICK = _histogram("pick_seconds", _PICK_S, "The router's choice of a replica.")

REQUESTS = _counter("requests_total", "Requests that reached the router and ended, by how.", "outcome")
REJECTS = _counter("rejects_total", "Requests answered with an error, by its code.", "reason")
RETRIES = _counter("retries_total", "Attempts that failed and were followed by another, by why.", "reason")
PROMPT_TOKENS = _counter("prompt_tokens_total", "Prompt tokens of answered requests.")
CACHED_TOKENS = _counter("cached_tokens_total", "Prompt tokens that the engine found in its cache.")
PREDICTED_TOKENS = _counter("predicted_cached_tokens_total", "Prompt tokens that the router expected in the cache.")
PREDICTION_ERROR = _counter("prediction_error_tokens_total", "Cached tokens expected and not found, or the reverse.")
GENERATED_TOKENS = _counter("generated_tokens_total", "Tokens generated for this ingress.")
PREEMPTIONS = _counter("preemptions_total", "Times that requests lost their blocks and were computed again.")

REPLICAS = _gauge("replicas", "Replicas that Serve routes to.")
REPLICAS_WANTED = _gauge("replicas_wanted", "Replicas that the autoscaler asks for; absent while it is off.")
REPLICAS_FRESH = _gauge("replicas_fresh", "Those of them whose cache is known.")
RUNNING = _gauge("replica_running", "Requests that the replica computes.", "replica")
WAITING = _gauge("replica_waiting", "Requests in the replica's queue.", "replica")
PENDING_PREFILL = _gauge("replica_pending_prefill_seconds", "Predicted time for the prefills that wait.", "replica")
KV_USED = _gauge("replica_kv_used_ratio", "Part of the cache's blocks that requests hold.", "replica")
INDEX_LAG = _gauge("index_lag_seconds", "From a cache event's making to its being applied; last update.", "replica")
WEIGHTS = _gauge("replica_weights", "1 for the weights that the replica has.", "replica", "weights_id")

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))

MAX_OBSERVATIONS = 100_000
"""Of a batch; the oldest go first. Five seconds bring a few hundred, but somebody may never ask for them."""

Key = tuple[Metric, tuple[str, ...]]


@dataclass
class Batch:
    """What came together since the last one. Gauges are all there are now: what is missing is gone."""

    counts: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    observations: deque[tuple[Metric, float]] = field(default_factory=lambda: deque(maxlen=MAX_OBSERVATIONS))
    gauges: dict[Key, float] = field(default_factory=dict)


class Metrics:
    """Collects on one event loop; costs next to nothing until `take`."""

    def __init__(self) -> None:
        self._batch = Batch()

    def count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        self._batch.counts[metric, labels] += by

    def observe(self, metric: Metric, value: float | None) -> None:
        """None: there is nothing to observe."""
        if value is not None:
            self._batch.observations.append((metric, value))

    def record(self, record: RequestRecord) -> None:
        """All that one request tells at its end; its generated tokens are counted as they come."""
        self.count(REQUESTS, record.outcome)
        for attempt in record.attempts:
            self.observe(PICK, attempt.pick_s)
        for attempt in record.attempts[:-1]:
            self.count(RETRIES, attempt.outcome)
        if record.first_token_s is None:
            return
        self.observe(FIRST_TOKEN, record.first_token_s)
        self.observe(INTER_TOKEN, record.inter_token_s)
        self.observe(LONGEST_GAP, record.longest_gap_s)
        self.observe(END_TO_END, record.end_s)
        self.observe(QUEUE, record.queue_s)
        self.count(PROMPT_TOKENS, by=record.prompt_tokens)
        self.count(CACHED_TOKENS, by=record.cached_tokens)
        self.count(PREDICTED_TOKENS, by=record.predicted_cached_tokens)
        self.count(PREDICTION_ERROR, by=abs(record.predicted_cached_tokens - record.cached_tokens))
        self.count(PREEMPTIONS, by=record.preemptions)

    def take(self, gauges: Mapping[Key, float]) -> Batch:
        """What has come since the last call, with these gauges."""
        batch, self._batch = self._batch, Batch()
        batch.gauges = dict(gauges)
        return batch


class Sink(Protocol):
    """Where batches go."""

    def write(self, batch: Batch) -> None: ...


class PrometheusSink:
    """The text of `/metrics`: this process's metrics in a registry of their own."""

    def __init__(self, process: Sequence[str]) -> None:
        """`process`: values of PROCESS_LABELS."""
        prometheus_client.disable_created_metrics()  # a time for every series, which nobody reads
        self._process = tuple(process)
        self._registry = CollectorRegistry()
        self._metrics = {metric: self._make(metric) for metric in METRICS}
        # Zero from the start: else the first increase is lost to `rate`.
        plain = [metric for metric in METRICS if metric.kind != "gauge" and not metric.labels]
        self._plain = {metric: self._child(metric) for metric in plain}

    def _make(self, metric: Metric) -> Any:
        labels = (*PROCESS_LABELS, *metric.labels)
        if metric.kind == "histogram":
            return prometheus_client.Histogram(
                metric.name, metric.help, labels, registry=self._registry, buckets=metric.buckets
            )
        kind = prometheus_client.Counter if metric.kind == "counter" else prometheus_client.Gauge
        return kind(metric.name, metric.help, labels, registry=self._registry)

    def _child(self, metric: Metric, labels: tuple[str, ...] = ()) -> Any:
        return self._metrics[metric].labels(*self._process, *labels)

    def write(self, batch: Batch) -> None:
        for (metric, labels), value in batch.counts.items():
            self._child(metric, labels).inc(value)
        for metric, value in batch.observations:
            self._plain[metric].observe(value)
        for metric in METRICS:
            if metric.kind == "gauge":
                self._metrics[metric].clear()
        for (metric, labels), value in batch.gauges.items():
            self._child(metric, labels).set(value)

    def families(self) -> list[Family]:
        """What there is, to be sent to the process that is asked for it."""
        return list(self._registry.collect())


class RaySink:
    """Ray's metrics agent. Ray drops a gauge that has not been set for 20 s, so that a replica's end with it."""

    def __init__(self, process: Sequence[str]) -> None:
        from ray.util import metrics as ray_metrics

        tags = dict(zip(PROCESS_LABELS, process, strict=True))
        self._metrics: dict[Metric, Any] = {}
        for metric in METRICS:
            keys = (*PROCESS_LABELS, *metric.labels)
            made: Any
            if metric.kind == "histogram":
                made = ray_metrics.Histogram(metric.name, metric.help, list(metric.buckets), keys)
            elif metric.kind == "counter":
                made = ray_metrics.Counter(metric.name, metric.help, keys)
            else:
                made = ray_metrics.Gauge(metric.name, metric.help, keys)
            self._metrics[metric] = made.set_default_tags(tags)

    def write(self, batch: Batch) -> None:
        for (metric, labels), value in batch.counts.items():
            if value > 0:
                self._metrics[metric].inc(value, dict(zip(metric.labels, labels, strict=True)))
        for metric, value in batch.observations:
            self._metrics[metric].observe(value)
        for (metric, labels), value in batch.gauges.items():
            self._metrics[metric].set(value, dict(zip(metric.labels, labels, strict=True)))


def exposition(families: Iterable[Family]) -> bytes:
    """Prometheus's text format of one or several processes' metrics."""
    ordered = sorted(families, key=lambda family: family.name)
    merged = []
    for _, group in groupby(ordered, key=lambda family: family.name):
        first, *others = group
        first.samples += [sample for other in others for sample in other.samples]
        merged.append(first)
    registry = CollectorRegistry()
    registry.register(_Collected(merged))
    return prometheus_client.generate_latest(registry)


class _Collected(Collector):
    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> list[Family]:
        return self._families
