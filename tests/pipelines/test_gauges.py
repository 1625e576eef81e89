"""What Prometheus would scrape, from a node of a running Ray."""

import re
import time
import urllib.request

import pytest

from pipelines.gauges import TrainGauges
from tests.pipelines.reports import report


@pytest.fixture
def endpoint():
    import ray

    from cluster.head import prepare_environment, temporary_folder

    prepare_environment(loopback=True)
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(temporary_folder()),
        _system_config={"metrics_report_interval_ms": 500},
    )
    yield f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ray.shutdown()


def scrape(url: str) -> dict[str, float]:
    """The run's values, by name and layer."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in re.findall(r"^(ray_caravan_train_\w+)\{([^}]*)\} (\S+)$", text, re.M):
        by_key = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if (by_key["run"], by_key["stage"]) == ("r1", "pretrain"):
            found[f"{name} {by_key.get('layer', '')}".strip()] = float(value)
    return found


@pytest.mark.integration
def test_the_nodes_endpoint_has_the_last_report(endpoint: str) -> None:
    gauges = TrainGauges("r1", "pretrain")
    gauges.set(report(1, val_loss=4.5))
    gauges.set(report(2, loss=3.25, expert_load={3: [0.75, 0.25]}, router_entropy={3: 0.5}))
    deadline, found = time.monotonic() + 60, {}
    while found.get("ray_caravan_train_step") != 2 and time.monotonic() < deadline:
        time.sleep(0.3)
        try:
            found = scrape(endpoint)
        except OSError:  # the node's agent comes up a little after the node
            continue
    assert found["ray_caravan_train_loss"] == 3.25
    assert found["ray_caravan_train_val_loss"] == 4.5  # measured a step ago
    assert found["ray_caravan_train_mfu"] == 0.25
    assert found["ray_caravan_train_expert_load 3"] == 1.5
    assert found["ray_caravan_train_router_entropy 3"] == 0.5
    assert "ray_caravan_train_balance_loss" not in found
