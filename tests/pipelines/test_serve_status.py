"""What the status commands show, drawn at the widths of common screens."""

import json
import time
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from cluster.serve.messages import ReplicaInfo, ReplicaLoad
from cluster.serve.state import ReplicaStatus
from cluster.serve.view import AppStatus, Endpoint, ReplicaProcess
from pipelines.serve_status import headline, lines, look, seconds, table

NODE = "1f" * 28
INFO = ReplicaInfo("abcd1234", 12_345, NODE, "9e" * 16, 400, 512, 16, 200)
LOAD = ReplicaLoad(3, 12, 50, 32_000, 4096, 1000, 450, 7000, 0)


def _entry(replica: str, generated: int, age_s: float = 0.0, **load) -> dict:
    """As `GET /caravan/replicas` gives it."""
    found = ReplicaStatus(
        replica, INFO, replace(LOAD, generated_tokens=generated, **load), True, 150, 15, age_s, 1 / 32_000, 0.0021
    )
    return asdict(found)


def _status(*entries: dict, starting: int = 0) -> AppStatus:
    processes = [ReplicaProcess(entry["replica"], "RUNNING", 12_345, NODE) for entry in entries]
    processes += [ReplicaProcess(f"start{n:03}", "STARTING", None, None) for n in range(starting)]
    return AppStatus("RUNNING", "", Endpoint("http://127.0.0.1:8000", "tiny"), processes, list(entries), "/m", None)


def _drawn(found, width: int) -> list[str]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table(found, width))
    return capture.get().splitlines()


def test_a_view_is_the_controllers_list_with_the_ingress_numbers():
    before = look(_status(_entry("abcd1234", 7000)), 100.0)
    assert before.tokens_per_s is None
    # The second report is half a second old: 3 s after the first, in which 900 tokens came.
    found = look(_status(_entry("abcd1234", 7900, 0.5), starting=1), 103.5, before)
    view, starting = found.replicas
    assert (view.running, view.waiting, view.pid, view.weights_id) == (3, 12, 12_345, "9e" * 16)
    assert view.tokens_per_s == pytest.approx(300) == found.tokens_per_s
    assert view.pending_prefill_s == pytest.approx(1.0) and view.hit_rate == pytest.approx(0.45)
    assert view.kv_used == pytest.approx(0.75) and view.index_lag_s == 0.0021
    assert starting.state == "STARTING" and starting.fresh is None and starting.tokens_per_s is None
    text = json.loads(json.dumps(found.as_json()))
    assert text["replicas"][0]["tokens_per_s"] == pytest.approx(300) and text["endpoint"]["served_name"] == "tiny"


def test_what_is_not_known_is_not_shown_as_a_number():
    fresh_start = _entry("abcd1234", 0, prompt_tokens=0, cached_tokens=0) | {
        "info": None,
        "fresh": False,
        "lag_s": None,
    }
    view = look(_status(fresh_start), 0.0).replicas[0]
    assert view.hit_rate is None and view.kv_used is None and view.index_lag_s is None
    silent = look(replace(_status(_entry("abcd1234", 1)), routing=None), 0.0)
    assert silent.replicas[0].running is None
    assert headline(silent).endswith("1 replica, 0 live, the endpoint does not answer")


@pytest.mark.parametrize("width", [80, 109, 110, 160])
def test_a_row_is_one_line_that_fits_and_shows_every_column(width):
    entries = [_entry(f"abcd123{n}", 7000 + n, draining=n == 1) for n in range(3)]
    found = look(_status(*entries, starting=1), 101.0, look(_status(*entries), 100.0))
    drawn = _drawn(found, width)
    assert len(drawn) == 5 and all(len(line.rstrip()) <= width for line in drawn)
    assert "…" not in "".join(drawn)
    assert ("node" in drawn[0] and "weights" in drawn[0]) == (width >= 110)
    for cell in ("abcd1231", "draining", "12345", "12", "1.0s", "75%", "45%", "2.1ms", "live"):
        assert cell in drawn[2].split(), cell


def test_plain_lines_are_one_for_the_endpoint_and_one_for_each_replica():
    found = look(_status(_entry("abcd1234", 7000), starting=1), 1.0)
    first, second, third = lines(found, time.struct_time((2026, 1, 2, 3, 4, 5, 0, 0, 0)))
    assert first == "03:04:05 tiny at http://127.0.0.1:8000/v1: RUNNING, 2 replicas, 1 live"
    assert second.startswith("03:04:05 abcd1234 RUNNING pid=12345 node=1f1f1f1f weights=9e9e9e9e run=3 wait=12 ")
    assert third == "03:04:05 start000 STARTING"


def test_an_empty_application_is_a_line():
    scaled = replace(_status(_entry("abcd1234", 7000)), autoscaling=(1, 4))
    assert headline(look(scaled, 0.0)).endswith("RUNNING, 1 replica, 1 live, from 1 to 4 as the load asks")
    assert headline(look(_status(), 0.0)) == "tiny at http://127.0.0.1:8000/v1: RUNNING, 0 replicas, 0 live"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00004, "0"), (0.0021, "2.1ms"), (0.25, "250ms"), (0.9999, "1000ms"), (12.34, "12.3s")],
)
def test_times_are_short(value, text):
    assert seconds(value) == text
