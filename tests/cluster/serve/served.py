"""What the operator's routes of a running application say."""

import time
from collections import Counter

import httpx


def replicas_of(http: httpx.Client) -> dict[str, dict]:
    return {entry["replica"]: entry for entry in http.get("/caravan/replicas").raise_for_status().json()["replicas"]}


def pids_of(http: httpx.Client) -> dict[str, int]:
    return {replica: entry["info"]["pid"] for replica, entry in replicas_of(http).items() if entry["info"]}


def wait_until(condition, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.05)


def totals_of(http: httpx.Client) -> Counter:
    totals: Counter = Counter()
    for entry in replicas_of(http).values():
        load = entry["load"] or {}  # a replica that has just come has not told it yet
        totals.update({**load, "active": entry["active_requests"]})
    return totals
