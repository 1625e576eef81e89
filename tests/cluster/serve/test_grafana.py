"""The dashboard asks for metrics that exist, with labels that they have."""

import json
import re
from importlib.resources import files

from cluster.serve.metrics import METRICS, PROCESS_LABELS

DASHBOARD = json.loads(files("cluster.serve").joinpath("grafana.json").read_text())
SERIES = {name: metric for metric in METRICS for name in metric.series}
# Names of PromQL's own that appear in it, functions apart, which are followed by a parenthesis.
KEYWORDS = {"by", "without", "le"}


def _expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def _names(expression: str) -> set[str]:
    """The series that an expression reads."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(?:by|without) \([^)]*\)', "", expression.replace("${prefix}", ""))
    return set(re.findall(r"[A-Za-z_]\w*(?!\w|\s*\()", bare)) - KEYWORDS


def test_every_query_reads_metrics_that_exist():
    assert len(_expressions()) >= 20
    for expression in _expressions():
        names = _names(expression)
        assert names and names <= set(SERIES), expression
        assert expression.count("${prefix}caravan_") == expression.count("caravan_"), expression
        assert expression.count("(") == expression.count(")")
        for labels in re.findall(r"\b(?:by|without) \(([^)]*)\)", expression):
            known = {label for name in names for label in (*PROCESS_LABELS, *SERIES[name].labels)}
            known |= {"le"} if any(name.endswith("_bucket") for name in names) else set()
            assert set(labels.replace(" ", "").split(",")) <= known, expression


def test_the_test_sees_a_name_that_does_not_exist():
    assert _names('sum by (le) (rate(${prefix}caravan_nothing_total{model="x"}[5m])) / caravan_replicas') == {
        "caravan_nothing_total",
        "caravan_replicas",
    }


def test_every_metric_has_a_place_on_the_dashboard():
    shown = {name for expression in _expressions() for name in _names(expression)}
    assert [metric.name for metric in METRICS if not shown & set(metric.series)] == []


def test_counters_are_read_as_rates_and_quantiles_from_buckets():
    for expression in _expressions():
        for name in _names(expression):
            metric = SERIES[name]
            if metric.kind == "counter":
                assert f"rate(${{prefix}}{name}" in expression
            if metric.kind == "histogram":
                assert name.endswith("_bucket") and "histogram_quantile(" in expression and "sum by (le)" in expression


def test_panels_do_not_overlap_and_every_legend_is_a_label_of_the_query():
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) and len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), target
