"""Evidence that the service is quick: from a submission to the first stage, a list of a thousand runs, a cached run.

    python tests/evidence/service_latency.py [--rounds N]

The first stage is at work when its worker says so, which is the time in the run's status; every round's recipe is
another, so that nothing is cached, and the one before has ended. The lists are of made-up runs with the files that real
ones have, on disk and on a real S3 server (OpenStack Swift), each read by a process that knows nothing yet. What the
graph costs is a whole `caravan run` of a recipe of which everything is committed, on a cluster that is up, beside the
same command's `--help`.

Needs the environment of `make setup` and about five minutes. Exits non-zero when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from cluster.storage import Store  # noqa: E402
from pipelines.runs import Run, StageStatus  # noqa: E402
from pipelines.service.client import ServiceClient  # noqa: E402
from pipelines.service.index import write_submission  # noqa: E402
from pipelines.service.submission import OVER, Submission  # noqa: E402
from tests.evidence.service_runs import command  # noqa: E402
from tests.swift import ACCESS_KEY, SECRET_KEY, running_swift  # noqa: E402

FIRST_STAGE_S, LOCAL_LIST_S, S3_LIST_S, CACHED_S = 8.0, 0.5, 2.0, 5.0
RUNS = 1000
STAGES = ("ingest", "dedup", "tokenizer", "shards", "pretrain", "evaluate", "export", "deploy")


def recipe(folder: Path, number: int) -> dict[str, Any]:
    return {
        "name": f"round{number}",
        "data": {
            "sources": [{"uri": str(folder / "corpus")}],
            "validation_fraction": 0.1,
            "min_document_chars": 8 + number,
        },
        "tokenizer": {"vocab_size": 300},
        "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64},
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 1, "seq_len": 32},
    }


def first_stages(service: ServiceClient, folder: Path, rounds: int) -> list[float]:
    """Seconds from the submission to the first stage, for each round."""
    taken = []
    for number in range(rounds + 1):
        asked = time.time()
        run_id = service.submit({"recipe": recipe(folder, number), "until": "ingest"})["id"]
        run = service.await_state(run_id, OVER, 120)
        assert run["state"] == "done", run["error"]
        taken.append(run["stages"][0]["started"] - asked)
    return taken[1:]  # the first meets a cluster that has just come up


def make_runs(store: Store) -> None:
    """A thousand runs such as the service and the drivers leave them, some still under way."""

    def make(number: int) -> None:
        run = Run.create(store, f"name: made{number % 7}\n", f"20260101-{number:06d}-abcdef", "export")
        over = number % 50 != 0
        run.status.state = "done" if over else "running"
        run.status.started = run.status.heartbeat = run.status.created
        run.status.ended = time.time() if over else None
        run.status.host = "elsewhere"
        run.status.stages = {name: StageStatus("done", "0" * 20, 1.0, 2.0, "a line of progress") for name in STAGES}
        run.save()
        run.directory.write_bytes("summary.json", b"{}")
        for picture in ("loss", "throughput"):
            run.directory.write_bytes(f"plots/{picture}.png", b"x" * 100)
        outcome = Submission(submitted=run.status.created, job_id=run.id, tries=1, outcome="done" if over else "")
        write_submission(store, run.id, outcome)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(make, range(RUNS)))


LIST = """
import json, sys, time
from cluster.storage import Store
from pipelines.service.index import RunIndex
index = RunIndex(Store(sys.argv[1]))
times = []
for _ in range(3):
    began = time.perf_counter()
    index.refresh()
    rows = index.rows()
    times.append(time.perf_counter() - began)
print(json.dumps([len(rows), *times]))
"""


def list_times(uri: str) -> tuple[float, float]:
    """Seconds of the first list of a new process, and of a later one; somebody has listed the runs before."""
    print(f"the first list ever: {_list(uri)[0]:.1f} s", flush=True)
    return _list(uri)


def _list(uri: str) -> tuple[float, float]:
    made = subprocess.run([sys.executable, "-c", LIST, uri], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    number, cold, *warm = json.loads(made.stdout)
    assert number == RUNS, number
    return cold, min(warm)


def cached_run(environment: dict[str, str], folder: Path) -> tuple[float, float, float]:
    """Wall-clock seconds of a cached `caravan run` and of `--help`, and what the run itself says it took."""
    path = folder / "cached.json"
    path.write_text(json.dumps(recipe(folder, 0)))
    command(environment, "run", path, "--until", "shards", "--json")
    began = time.monotonic()
    summary = json.loads(command(environment, "run", path, "--until", "shards", "--json"))
    whole = time.monotonic() - began
    assert set(summary["stages"].values()) == {"skipped"}, summary["stages"]
    began = time.monotonic()
    command(environment, "run", "--help")
    return whole, time.monotonic() - began, summary["seconds"]


def check(claims: list[bool], what: str, figure: float, bar: float) -> None:
    claims.append(figure <= bar)
    print(f"{'ok  ' if figure <= bar else 'FAIL'} {what}: {figure:.2f} s (bar {bar:g} s)", flush=True)


@contextmanager
def cluster(folder: Path, environment: dict[str, str]):
    record = json.loads(command(environment, "up", "--num-cpus", 2, "--allow", folder, "--json"))
    try:
        yield ServiceClient(record["service_url"])
    finally:
        command(environment, "down")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    claims: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="caravan-evidence-") as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        for number in range(40):
            (folder / "corpus" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 9)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment["CARAVAN_HOME"] = str(folder / "home")
        with cluster(folder, environment) as service:
            taken = first_stages(service, folder, arguments.rounds)
            print("from submission to the first stage: " + ", ".join(f"{each:.1f}" for each in taken), flush=True)
            check(claims, "median from submission to the first stage", median(taken), FIRST_STAGE_S)
            check(claims, "longest", max(taken), FIRST_STAGE_S)
            whole, help_only, itself = cached_run(environment, folder)
            print(f"a cached run: {whole:.1f} s of wall-clock, {itself:.1f} s by its summary; --help {help_only:.1f} s")
            check(claims, "a fully cached run, all of it", itself, CACHED_S)
        local = Store(folder / "many")
        make_runs(local)
        cold, warm = list_times(local.uri)
        check(claims, f"a list of {RUNS} runs on disk, by a new process (later {warm:.2f} s)", cold, LOCAL_LIST_S)
        with running_swift(folder / "swift") as swift:
            os.environ.update(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY)
            uri = swift.uri(swift.make_bucket(), "store")
            make_runs(Store(uri))
            cold, warm = list_times(uri)
            check(claims, f"a list of {RUNS} runs on S3, by a new process (later {warm:.2f} s)", cold, S3_LIST_S)
    return 0 if all(claims) else 1


if __name__ == "__main__":
    sys.exit(main())
