"""Evidence that no run is lost, whatever dies: service, driver, Ray head, store, at thirty random moments.

    python tests/evidence/service_chaos.py [--seed N] [--moments 30] [--keep FOLDER]

A cluster of `caravan up`, its store on a real S3 server (OpenStack Swift) behind a proxy. Short runs with stages in
common, and a few that train, are submitted all the time; at random moments something breaks:

    service      kill -9 of the service's process
    driver       kill -9 of a run's driver
    head         kill -9 of all processes of the cluster, or of its raylet and GCS alone, so that drivers, workers and
                 the service itself are left to find out; then `caravan up` with the same store, until it succeeds
    errors       the store answers 503, or connections break off at random, also between a request and its answer
    latency      every piece of a request to the store comes 0.7 s late
    hang         the store holds everything back, and does what it was asked when that ends

Faults of the store last 3 to 30 seconds, and other things break meanwhile. An operator submits again what was not
acknowledged, and resumes what is lost, failed or stopped, by the API or with `caravan resume`. Asked of the end: every
run that was acknowledged is listed by the service and by the store, and done; what was committed was whole at all
times, byte by byte; of every stage's key one attempt was committed and no other; contents are what they should be; no
process is left. Prints the counts; exits with 1 when a claim fails.

Needs the test dependencies; Swift is installed once into `.cache/swift`. About thirteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from cluster.artifact import Artifact  # noqa: E402
from cluster.storage import NotFound, StorageError  # noqa: E402
from pipelines.runs import Run, list_runs  # noqa: E402
from pipelines.service.client import ServiceClient, ServiceRefused, ServiceUnavailable  # noqa: E402
from pipelines.service.index import find_run  # noqa: E402
from tests.evidence.chaos_ground import STAGES, Ground, Watch, chaos_ground  # noqa: E402
from tests.evidence.chaos_stages import FILES, GRAPH, expected, read_journal  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402

KINDS = ("service",) * 7 + ("driver",) * 8 + ("head",) * 4 + ("errors",) * 4 + ("latency",) * 3 + ("hang",) * 4
FAMILIES, ACTIVE = 8, 7
_AGAIN = frozenset(("lost", "failed", "stopped"))
_DELAY_SECONDS = (2.0, 20.0)
_FAULT_SECONDS = (3.0, 30.0)
_DRAIN_SECONDS = 600.0
_QUIET_SECONDS = 90.0


def quick_recipe(ground: Ground, family: int, seconds: float, retries: int) -> dict[str, Any]:
    config = {"journal": str(ground.journal), "family": family, "seconds": seconds}
    own = {"uses": f"{STAGES}:compute", "config": config, "retries": retries, "retry_wait": 1.0}
    stages = {name: {**own, "after": list(after)} for name, after in GRAPH.items()}
    return {**training_recipe(ground, 0), "name": f"family{family}", "stages": stages}


def training_recipe(ground: Ground, corpus: int) -> dict[str, Any]:
    return {
        "name": f"corpus{corpus}",
        "data": {
            "sources": [{"uri": str(ground.folder / "corpus")}],
            "validation_fraction": 0.1,
            "min_document_chars": 8 + corpus,
        },
        "tokenizer": {"vocab_size": 300},
        "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64},
        "train": {"steps": 6, "checkpoint_every": 2, "global_batch": 2, "micro_batch": 1, "seq_len": 32},
    }


def requests(ground: Ground, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Runs to submit, without an end."""
    seconds = [draw.uniform(0.5, 4.0) for _ in range(FAMILIES)]
    number = 0
    while True:
        body: dict[str, Any] = {"run_id": f"r{number:03d}", "priority": draw.choice((0, 0, 5))}
        if number % 8 == 2:
            body |= {"recipe": training_recipe(ground, number // 16), "until": "pretrain"}
        else:
            family = draw.randrange(FAMILIES)
            body["recipe"] = quick_recipe(ground, family, seconds[family], draw.choice((0, 0, 2)))
            body["until"] = draw.choice(("left", "right", "last", "last"))
        yield body
        number += 1


class Operator:
    """Keeps some runs under way as long as `submitting`, and resumes what needs it."""

    def __init__(self, ground: Ground, draw: random.Random) -> None:
        self.submitting = True
        self.acknowledged: set[str] = set()
        self.states: dict[str, str] = {}
        self.resumed: list[tuple[str, str, str]] = []
        """Run, its state, and why, of each."""
        self.resumes: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._ground, self._draw = ground, draw
        self._requests = requests(ground, draw)
        self._asked: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Operator:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)

    @property
    def all_done(self) -> bool:
        return not self._asked and {self.states.get(run_id) for run_id in self.acknowledged} == {"done"}

    def _work(self) -> None:
        service = ServiceClient(self._ground.url)
        while not self._stop.wait(1.0):
            try:
                listed = service.runs({"limit": 1000})["runs"]
            except (ServiceUnavailable, ServiceRefused) as error:
                self._refused(error)
                continue
            self.states = {run["id"]: run["state"] for run in listed}
            if missing := self.acknowledged - self.states.keys():
                self.wrong.append(f"{len(missing)} of {len(self.acknowledged)} runs are not in a list")
            for run in listed:
                if run["state"] in _AGAIN:
                    self._resume(service, run)
            self._submit(service)

    def _submit(self, service: ServiceClient) -> None:
        under_way = sum(state != "done" for state in self.states.values())
        if self.submitting and not self._asked and under_way < ACTIVE:
            self._asked.append(next(self._requests))
        for body in list(self._asked):
            try:
                service.submit(body)
            except (ServiceUnavailable, ServiceRefused) as error:
                self._refused(error)
                if "exists already" not in str(error):
                    continue  # the next time; if it was done all the same, that is what we shall be told
            self._asked.remove(body)
            self.acknowledged.add(body["run_id"])

    def _resume(self, service: ServiceClient, run: dict[str, Any]) -> None:
        by_command = self._draw.random() < 0.2
        try:
            if not by_command:
                service.resume(run["id"])
        except (ServiceUnavailable, ServiceRefused) as error:
            self._refused(error)
            return
        if by_command:
            with self._ground.up_lock:
                ended = self._ground.command("resume", run["id"])
            if ended.returncode:
                self.refusals[ended.stderr.strip().splitlines()[-1][:150]] += 1
                return
        self.resumes["caravan resume" if by_command else "the API"] += 1
        self.resumed.append((run["id"], run["state"], run["error"]))

    def _refused(self, error: Exception) -> None:
        status = f"{error.status} " if isinstance(error, ServiceRefused) else ""
        if status in ("400 ", "500 "):
            self.wrong.append(f"the service answers {status}{error}")
        self.refusals[f"{status}{error}"[:150]] += 1


class Moments:
    """Breaks something at random moments."""

    def __init__(self, ground: Ground, draw: random.Random) -> None:
        self.back: list[float | None] = []
        """Seconds until the service answered, after each of its deaths that was not followed by the head's."""
        self._heads = 0
        self._ground, self._draw = ground, draw
        self._threads: list[threading.Thread] = []

    def go(self, number: int) -> Counter[str]:
        kinds = [KINDS[index % len(KINDS)] for index in range(number)]
        if number < len(KINDS):
            kinds = self._draw.sample(KINDS, number)
        self._draw.shuffle(kinds)
        began = time.monotonic()
        for index, kind in enumerate(kinds):
            time.sleep(self._draw.uniform(*_DELAY_SECONDS))
            did = self._until_there(kind)
            print(f"{index + 1:4} {time.monotonic() - began:6.0f} s  {kind:8} {did}", flush=True)
        for thread in self._threads:
            thread.join()
        return Counter(kinds)

    def _until_there(self, kind: str) -> str:
        """Once there is what is to break."""
        deadline = time.monotonic() + 150
        while True:
            try:
                return self._break(kind)
            except (IndexError, ValueError):  # no driver or service just now
                if time.monotonic() > deadline:
                    service = ServiceClient(self._ground.url)
                    runs = service.runs({"state": ["queued", "starting", "running"]})["runs"]
                    sys.exit(f"nothing of this kind to break, {kind}: {service.health()}, {runs}")
                time.sleep(0.2)

    def _break(self, kind: str) -> str:
        seconds = self._draw.uniform(*_FAULT_SECONDS)
        if kind == "service":
            did = self._ground.kill_service()
            self._threads.append(threading.Thread(target=self._await_service, daemon=True))
            self._threads[-1].start()
            return did
        if kind == "driver":
            return self._ground.kill_driver(self._draw)
        if kind == "head":
            self._heads += 1
            return self._ground.kill_head(whole=self._draw.random() < 0.5)
        weather = {"errors": self._draw.choice(("503", "flaky")), "latency": "slow", "hang": "hang"}[kind]
        return self._ground.break_store(weather, seconds)  # type: ignore[arg-type]

    def _await_service(self) -> None:
        heads, seconds = self._heads, self._ground.seconds_to_answer()
        if heads == self._heads:
            self.back.append(seconds)


def check_runs(ground: Ground, operator: Operator, claims: Claims) -> dict[tuple[str, str], int]:
    """How often each stage's key was needed."""
    service = ServiceClient(ground.url)
    listed = {run["id"]: run["state"] for run in service.runs({"limit": 1000})["runs"]}
    stored = set(list_runs(ground.store))
    asked = operator.acknowledged
    lost = sorted((asked - listed.keys()) | (asked - stored))
    claims.check(
        "runs acknowledged; in the service's list and in the store",
        f"{len(asked)}, {len(lost)} lost {lost[:5]}",
        not lost,
    )
    undone = {run_id: state for run_id, state in listed.items() if state != "done"}
    claims.check("of these done", f"{len(listed) - len(undone)} {undone or ''}", not undone)
    needed: Counter[tuple[str, str]] = Counter()
    contrary = []
    for run_id in sorted(stored):
        run, submission = Run.open(ground.store, run_id), find_run(ground.store, run_id).submission
        stages = run.status.stages
        if run.status.state != "done" or submission is None or submission.outcome != "done":
            contrary.append(f"{run_id}: {run.status.state}, {submission and submission.outcome}")
        contrary += [
            f"{run_id}: {name} {at.state}" for name, at in stages.items() if at.state not in ("done", "skipped")
        ]
        needed.update((name, at.key) for name, at in stages.items())
    claims.check("runs whose files say otherwise", contrary[:5] or 0, not contrary)
    service.close()
    return dict(needed)


def check_artifacts(ground: Ground, needed: dict[tuple[str, str], int], watch: Watch, claims: Claims) -> None:
    whole, absent, bad, strange = 0, 0, list(watch.damaged), []
    files = ground.store.list("artifacts")
    for stage, key in sorted({(path.split("/")[1], path.split("/")[2]) for path in files}):
        artifact = Artifact(ground.store.child("artifacts", stage, key))
        try:
            family = artifact.verify().metadata.get("family")
            whole += 1
            if stage in GRAPH and [artifact.files.read_bytes(f"{n}.bin") for n in range(FILES)] != expected(
                stage, int(str(family))
            ):
                strange.append(f"{stage}/{key}")
        except NotFound:
            absent += 1
            if (stage, key) in needed:
                bad.append(f"{stage}/{key} is not committed")
        except StorageError as error:
            bad.append(str(error))
    checkpoints = [
        path.removesuffix("/manifest.json")
        for path in files
        if "/checkpoints/" in path and path.endswith("/manifest.json")
    ]
    for folder in checkpoints:
        try:
            Artifact(ground.store.child(*folder.split("/"))).verify()
        except StorageError as error:
            bad.append(str(error))
    claims.check(
        "artifacts whole at the end; absent; damaged, then or at any look since",
        f"{whole} and {len(checkpoints)} checkpoints, {absent}, {bad[:3] or 0} ({watch.verified} looks)",
        not bad and whole >= len(needed),
    )
    claims.check("of other content than computed independently", strange or 0, not strange)


def check_commits(ground: Ground, needed: dict[tuple[str, str], int], claims: Claims) -> None:
    attempts = ground.commits.attempts
    twice = {folder: names for folder, names in attempts.items() if len(names) > 1}
    unseen = [f"artifacts/{stage}/{key}" for stage, key in needed if f"artifacts/{stage}/{key}" not in attempts]
    claims.check(
        "commits, of artifacts and checkpoints; committed twice",
        f"{sum(map(len, attempts.values()))} of {len(attempts)}; {twice or 0}",
        not twice and not unseen,
    )
    events = Counter(event for event, *_ in read_journal(ground.journal))
    quick = sum(stage in GRAPH for stage, _ in needed)
    print(
        f"      {len(needed)} stage keys were needed {sum(needed.values())} times; the {quick} quick ones were begun "
        f"{events['began']} times, and came to their end {events['ended']} times",
        flush=True,
    )


def check_processes(ground: Ground, claims: Claims) -> None:
    ground.down()
    deadline = time.monotonic() + _QUIET_SECONDS
    while (left := ground.left()) and time.monotonic() < deadline:
        time.sleep(1)
    claims.check("processes that are left, of this head and of those before", left or 0, not left)


def report(operator: Operator, moments: Moments, claims: Claims) -> None:
    states = Counter(state for _, state, _ in operator.resumed)
    print(f"      resumed {dict(operator.resumes)}: {dict(states)}", flush=True)
    for (state, error), count in Counter((state, error) for _, state, error in operator.resumed).most_common():
        print(f"      {count:4} {state}: {error[:160]}", flush=True)
    for refusal, count in operator.refusals.most_common(12):
        print(f"      {count:4} answers: {refusal}", flush=True)
    back = [seconds for seconds in moments.back if seconds is not None]
    if back:
        claims.check(
            "seconds from the service's death to its next answer, median and longest",
            f"{median(back):.1f}, {max(back):.1f}",
            len(back) == len(moments.back),
        )
    claims.check(
        "answers of the service that were wrong", Counter(operator.wrong).most_common(3) or 0, not operator.wrong
    )


@contextmanager
def place(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:  # short: sockets lie below it
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", type=int, default=len(KINDS))
    parser.add_argument("--keep", type=Path, help="a new folder for everything, with a short name; it is left")
    arguments = parser.parse_args()
    claims, began = Claims(), time.monotonic()
    print(f"      seed {arguments.seed}, {arguments.moments} moments", flush=True)
    with place(arguments.keep) as folder:
        (folder / "corpus").mkdir()
        for number in range(40):
            (folder / "corpus" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 9)
        with chaos_ground(folder, arguments.seed) as ground, Watch(ground.store, ground.commits) as watch:
            moments = Moments(ground, random.Random(arguments.seed))
            with Operator(ground, random.Random(arguments.seed + 1)) as operator:
                kinds = moments.go(arguments.moments)
                operator.submitting = False
                ground.mend_store()
                drained = time.monotonic()
                while not operator.all_done and time.monotonic() - drained < _DRAIN_SECONDS:
                    time.sleep(1)
                seconds = time.monotonic() - drained
            claims.check(
                "moments at which something broke",
                f"{kinds.total()}: {dict(kinds)}",
                kinds.total() == arguments.moments,
            )
            claims.check("seconds until all was done after the last", f"{seconds:.0f}", seconds < _DRAIN_SECONDS)
            report(operator, moments, claims)
            needed = check_runs(ground, operator, claims)
            check_artifacts(ground, needed, watch, claims)
            check_commits(ground, needed, claims)
            check_processes(ground, claims)
    print(f"      {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
