import json
from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from llama.bench.harness import BenchError
from pipelines.bench import router
from pipelines.bench.router import RouterBench, foretell, measure
from pipelines.bench.router_report import Findings, as_text
from pipelines.cli_bench import bench

FIGURES = {
    "ttft_mean", "ttft_p50", "ttft_p90", "ttft_p99", "e2e_mean", "e2e_p50", "e2e_p90", "e2e_p99", "rejects", "hit_rate",
    "goodput", "imbalance", "pick_us_p50", "pick_us_p99", "index_lag_ms_p50", "index_lag_ms_p99",
}  # fmt: skip


def _figures(mean: float, p99: float = 1.0, whole: float = 1.0) -> dict[str, float]:
    return {"ttft_mean": mean, "ttft_p99": p99, "e2e_mean": whole}


def test_the_command_reports_policies_in_seconds(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": 400 * number,
            "input_length": 1500,
            "output_length": 20,
            "hash_ids": [0, number % 5, 100 + number],
        }
        for number in range(40)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    arguments = [
        "--trace",
        str(trace),
        "--replicas",
        "2",
        "--mode",
        "sim",
        "--seconds",
        "600",
        "--load",
        "0.7",
        "--json",
    ]
    policies = ["--policies", "caravan,round_robin,oracle", "--repeat", "2", "--jobs", "1"]
    result = CliRunner().invoke(bench, ["router", *arguments, *policies], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert list(report["policies"]) == ["caravan", "round_robin", "oracle"]
    for figures in report["policies"].values():
        assert figures.keys() >= FIGURES
        assert 0 < figures["ttft_mean"] < figures["e2e_mean"] < 10 and figures["rejects"] == 0
    assert report["given"]["load"] == pytest.approx(0.7, rel=0.02) and report["given"]["requests"] == 40
    assert report["comparison"]["ttft_mean"]["best_peer"] == "round_robin"
    assert report["comparison"]["ttft_mean"]["noise"] is not None
    assert "oracle finds" in result.stderr
    table = as_text(report)
    assert "round_robin" in table and "ttft_mean: " in table


def test_what_is_foretold_is_for_replicas_of_the_names_in_the_report(monkeypatch):
    bench = RouterBench(requests=40, replicas=2, policies=("consistent_hash",), jobs=1)
    with router._workers(bench.jobs) as submit:  # one process for all three, which takes seconds to import Ray
        monkeypatch.setattr(router, "_workers", lambda jobs: nullcontext(submit))
        report = measure(bench)
        told = foretell(bench, report, runs=2)["consistent_hash"]
        assert told == [report["policies"]["consistent_hash"]["ttft_mean"]] * 2
        report["policies"]["consistent_hash"]["names"] = ["other", "names"]
        assert foretell(bench, report, runs=1)["consistent_hash"] != told[:1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"replicas": 0}, "replicas=0"),
        ({"load": 0.0}, "load=0.0"),
        ({"seconds": -1.0}, "seconds=-1.0"),
        ({"model": "there"}, "--model has no effect with --mode sim"),
        ({"trace": "there", "burst": 3}, "--burst"),
        ({"trace": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"policies": ("best",)}, "policies='best' is none of"),
        ({"policies": ("oracle",), "mode": "modelled"}, "policies=oracle exist in --mode sim only"),
    ],
)
def test_what_cannot_be_measured_is_said(settings, said):
    with pytest.raises(BenchError, match=said):
        measure(RouterBench(**settings))


def test_the_best_setting_stands_for_a_policy():
    findings = Findings(["peer", "other"])
    findings.add("peer", "x=1", _figures(2.0))
    findings.add("peer", "x=2", _figures(1.5))
    findings.add("other", "", _figures(3.0))
    assert findings.rivals() == []
    findings.add("caravan", "", _figures(1.0))
    assert findings.rivals() == [("caravan", ""), ("peer", "x=2")]
    policies = findings.policies()
    assert policies["peer"]["setting"] == "x=2" and policies["peer"]["ttft_mean"] == 1.5
    assert policies["peer"]["settings"]["x=1"]["ttft_mean"] == 2.0
    assert "settings" not in policies["other"]


def test_each_metric_has_its_own_best_peer_and_noise_decides():
    findings = Findings(["peer", "other"])
    findings.add("caravan", "", _figures(1.0, 8.0, 10.0))
    findings.add("peer", "", _figures(2.0, 9.0, 9.0))
    findings.add("other", "", _figures(3.0, 4.0, 12.0))
    once = findings.comparison()
    assert once["ttft_mean"] == {"ratio": 0.5, "best_peer": "peer", "noise": None, "verdict": "no verdict"}
    findings.add("caravan", "", _figures(1.0, 8.0, 9.4))
    findings.add("peer", "", _figures(2.2, 9.0, 7.2))
    twice = findings.comparison()
    assert twice["ttft_mean"]["ratio"] == pytest.approx(1 / 2.1) and twice["ttft_mean"]["verdict"] == "better"
    assert twice["ttft_mean"]["noise"] == pytest.approx(0.2 / 2.1)
    assert (twice["ttft_p99"]["best_peer"], twice["ttft_p99"]["ratio"]) == ("other", 2.0)
    assert twice["ttft_p99"]["verdict"] == "worse"
    # 9.7 against 8.1, but the peer's runs differ by 22 %.
    assert twice["e2e_mean"]["verdict"] == "no verdict"
