"""Evidence that a real Prometheus answers every query of the dashboard, from our `/metrics` and from Ray's.

    python tests/evidence/dashboard.py [--seconds 40]

Deploys a tiny model with two replicas, asks it steadily (each second request is refused), and lets Debian's
Prometheus (`apt install prometheus`) scrape the endpoint, and the exporters of Ray's nodes.
Then it asks for every expression of cluster/serve/grafana.json, in both forms of the names. Each must be understood,
and must have a value that is a number, but for those of RARE: they count what has not happened. Prints a line for each
panel; exits with 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import httpx  # noqa: E402
import ray  # noqa: E402

from tests.conftest import find_free_port  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402
from tests.evidence.serving_tools import MODEL, served  # noqa: E402

RARE = (
    "caravan_retries_total",
    "caravan_preemptions_total",
    "caravan_prediction_error_tokens_total",
    "caravan_replicas_wanted",
)
SCRAPE_S = 1


@contextmanager
def prometheus(folder: Path, endpoint: str) -> Iterator[str]:
    """One that scrapes the endpoint and Ray; yields its address."""
    program = shutil.which("prometheus")
    if program is None:
        sys.exit("there is no prometheus on this machine; apt install prometheus")
    exporters = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s"},
        "scrape_configs": [
            {"job_name": "caravan", "static_configs": [{"targets": [endpoint.removeprefix("http://")]}]},
            {"job_name": "ray", "static_configs": [{"targets": exporters}]},
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    port = find_free_port()
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=(folder / "log").open("w"),
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def ask_steadily(url: str, seconds: float) -> None:
    body = {"model": MODEL, "prompt": list(range(10, 90)), "max_tokens": 30, "ignore_eos": True, "stream": True}
    ends = time.monotonic() + seconds
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
        while time.monotonic() < ends:
            http.post("/v1/completions", json=body).raise_for_status()
            assert http.post("/v1/completions", json={**body, "model": "another"}).status_code == 404


def values(address: str, expression: str) -> list[float] | str:
    """Of each series; what Prometheus says when it does not understand."""
    answer = httpx.get(f"{address}/api/v1/query", params={"query": expression}, trust_env=False).json()
    if answer["status"] != "success":
        return answer["error"]
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def check(address: str, prefix: str, claims: Claims) -> None:
    dashboard = json.loads(files("cluster.serve").joinpath("grafana.json").read_text())
    refused, empty = [], []
    for panel in dashboard["panels"]:
        found = []
        for target in panel["targets"]:
            expression = target["expr"].replace("${prefix}", prefix).replace("$model", ".*")
            answer = values(address, expression.replace("$__rate_interval", "20s"))
            if isinstance(answer, str):
                refused.append(answer)
            elif not any(map(math.isfinite, answer)) and not any(name in expression for name in RARE):
                empty.append(f"{panel['title']}: {expression}")
            found.append(answer if isinstance(answer, str) else [round(value, 4) for value in answer])
        print(f"      {prefix}{panel['title']}: {found}")
    claims.check(f"queries that are not understood, {prefix or 'no prefix'}", refused[:3] or 0, not refused)
    claims.check(f"queries without a value, {prefix or 'no prefix'}", empty[:3] or 0, not empty)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0)
    arguments = parser.parse_args()
    claims = Claims()
    with (
        tempfile.TemporaryDirectory(prefix="caravan-dashboard-") as folder,
        served() as (url, _),
        prometheus(Path(folder), url) as address,
    ):
        ask_steadily(url, arguments.seconds)
        for prefix in ("", "ray_"):
            check(address, prefix, claims)
    sys.exit(claims.failed > 0)


if __name__ == "__main__":
    main()
