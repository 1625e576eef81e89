"""Evidence that the service keeps order: thirty runs from four clients at once, on a local cluster of two CPUs.

    python tests/evidence/service_runs.py [--runs N] [--seed N]

The runs are of a few recipes, so that many have stages in common; some must fail, some are stopped while they wait or
run; priorities are drawn. Asked of the end: every run is in the state that it should be in; of all runs with a stage in
common exactly one computed it, and no two were at it at the same time; every artifact is whole; whenever a run was
started none that still waited had a higher priority; none was left over.

Needs the environment of `make setup` and about five minutes. Exits non-zero when a claim fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from cluster.artifact import Artifact  # noqa: E402
from cluster.storage import Store  # noqa: E402
from pipelines.service.client import ServiceClient  # noqa: E402
from pipelines.service.queue import QueuePolicy  # noqa: E402
from pipelines.service.submission import OVER  # noqa: E402

CLIENTS = 4
PRIORITIES = (-10, 0, 0, 5, 20)
LIMIT_SECONDS = 1200.0


def recipe(folder: Path, corpus: int, *, fails: bool) -> dict[str, Any]:
    return {
        "name": f"corpus{corpus}",
        "data": {
            "sources": [{"uri": str(folder / f"corpus{corpus}")}],
            "validation_fraction": 0.1,
            "min_document_chars": 10**9 if fails else 8,
        },
        "tokenizer": {"vocab_size": 300},
        "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64},
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 1, "seq_len": 32},
    }


def command(environment: dict[str, str], *arguments: object) -> str:
    line = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    return subprocess.run(line, env=environment, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def submit_all(url: str, bodies: list[dict[str, Any]]) -> None:
    """By four clients at once."""

    def client(own: list[dict[str, Any]]) -> None:
        service = ServiceClient(url)
        for body in own:
            service.submit(body)
        service.close()

    threads = [threading.Thread(target=client, args=(bodies[number::CLIENTS],)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def drawn(folder: Path, number: int, draw: random.Random) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What is asked of the service, and the state that each run should end in."""
    bodies, expected = [], {}
    for index in range(number):
        run_id = f"r{index:02d}"
        kind = "failed" if index % 10 == 3 else "stopped" if index % 10 == 7 else "done"
        bodies.append(
            {
                "run_id": run_id,
                "recipe": recipe(folder, index % 4, fails=kind == "failed"),
                "until": draw.choice(["ingest", "dedup", "tokenizer"]),
                "priority": draw.choice(PRIORITIES),
                "tags": {"user": f"user{index % CLIENTS}"},
            }
        )
        expected[run_id] = kind
    return bodies, expected


class Starts:
    """Sees runs leave the queue, and who was passed over then."""

    def __init__(self) -> None:
        self.waiting: dict[str, dict[str, Any]] = {}
        self.wrong: list[str] = []
        self.longest = 0.0

    def look(self, runs: list[dict[str, Any]]) -> None:
        now = time.time()
        queued = {run["id"]: run for run in runs if run["state"] == "queued"}
        begun = [run for run in runs if run["id"] in self.waiting and run["state"] in ("starting", "running")]
        for run in begun:
            self.longest = max(self.longest, now - run["created"])
            for other in queued.values():
                if other["id"] in self.waiting and _rank(other, now) > _rank(run, now):
                    self.wrong.append(f"{run['id']} of {run['priority']} before {other['id']} of {other['priority']}")
        self.waiting = queued


def _rank(run: dict[str, Any], now: float) -> float:
    return run["priority"] + (now - run["created"]) // QueuePolicy().ageing_seconds


def check(claims: list[bool], what: str, holds: bool) -> None:
    claims.append(holds)
    print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    claims: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="caravan-evidence-") as name:
        folder = Path(name)
        for corpus in range(4):
            (folder / f"corpus{corpus}").mkdir()
            for number in range(40):
                text = f"def f{number}(x):\n    return x + {number} * {corpus}\n" * 5
                (folder / f"corpus{corpus}" / f"{number}.txt").write_text(text)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment["CARAVAN_HOME"] = str(folder / "home")
        record = json.loads(command(environment, "up", "--num-cpus", 2, "--allow", folder, "--json"))
        try:
            runs = go(record["service_url"], folder, arguments.runs, random.Random(arguments.seed), claims)
        finally:
            command(environment, "down")
        verify(Store(folder / "home" / "store"), runs, claims)
    return 0 if all(claims) else 1


def go(url: str, folder: Path, number: int, draw: random.Random, claims: list[bool]) -> list[dict[str, Any]]:
    bodies, expected = drawn(folder, number, draw)
    service = ServiceClient(url)
    began = time.monotonic()
    submit_all(url, bodies)
    print(f"{number} runs submitted in {time.monotonic() - began:.1f} s", flush=True)
    to_stop = {run_id for run_id, state in expected.items() if state == "stopped"}
    late = {run_id for run_id in to_stop if draw.random() < 0.5}
    for run_id in sorted(to_stop - late):
        service.stop(run_id)
    starts = Starts()
    while time.monotonic() - began < LIMIT_SECONDS:
        listed = service.runs({"limit": 1000})["runs"]
        starts.look(listed)
        states = {run["id"]: run["state"] for run in listed}
        for run_id in [each for each in late if states[each] in ("starting", "running")]:
            service.stop(run_id)
            late.discard(run_id)
        if set(states.values()) <= OVER:
            break
        time.sleep(0.2)
    runs = [service.run(run_id) for run_id in expected]
    ended = {run["id"]: run["state"] for run in runs}
    wrong = {run_id: (ended[run_id], expected[run_id]) for run_id in expected if ended[run_id] != expected[run_id]}
    check(claims, f"every run ended as it should: {dict(Counter(ended.values()))} {wrong or ''}", not wrong)
    seconds = time.monotonic() - began
    last = f"all were over after {seconds:.0f} s, the longest had waited {starts.longest:.0f} s"
    check(claims, f"none was left over: {last}", seconds < LIMIT_SECONDS)
    check(claims, f"started in the order of their priorities {starts.wrong[:5] or ''}", not starts.wrong)
    service.close()
    return runs


def verify(store: Store, runs: list[dict[str, Any]], claims: list[bool]) -> None:
    needed: Counter[tuple[str, str]] = Counter()
    computed: Counter[tuple[str, str]] = Counter()
    at_work: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for run in runs:
        for stage in run["stages"]:
            which = stage["stage"], stage["key"]
            if stage["state"] in ("done", "skipped"):
                needed[which] += 1
            if stage["state"] in ("done", "failed") and stage["started"]:
                at_work.setdefault(which, []).append((stage["started"], stage["ended"], run["id"]))
            computed[which] += stage["state"] == "done"
    twice = {which: computed[which] for which in needed if computed[which] != 1}
    shared = f"{len(needed)} stages were needed {sum(needed.values())} times"
    check(claims, f"{shared}, and computed once each {twice or ''}", not twice)
    together = [
        (which, one, other)
        for which, spans in at_work.items()
        for one, other in pairwise(sorted(spans))
        if one[1] > other[0]
    ]
    check(claims, f"no two were at work on one artifact at a time {together or ''}", not together)
    for stage, key in needed:
        Artifact(store.child("artifacts", stage, key)).verify()
    check(claims, f"{len(needed)} artifacts are whole", True)


if __name__ == "__main__":
    sys.exit(main())
