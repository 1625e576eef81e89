"""Evidence of what an operator sees and does by command: two ingresses, autoscaling, status and trace, by real load.

    python tests/evidence/serving_operator.py [--clients 12] [--show]

`caravan up`, `caravan deploy --ingresses 2 --min 1 --max 3` of a random model, then clients that ask long prompts one
after the other: replicas are added, each ingress answers, and every request can be traced whichever it went through.
The clients go away: one replica is left within three minutes. Nobody loses a request. `--show` prints the commands'
screens. About four minutes; exits with 1 when a claim fails.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import httpx  # noqa: E402

from tests.cluster.serve.tiny_model import save_tiny_model  # noqa: E402
from tests.conftest import find_free_port  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402

PROMPT_TOKENS, ANSWER_TOKENS = 480, 8
LARGEST = 3


@dataclass
class Caravan:
    """The command, with a home of its own."""

    home: Path

    def __call__(self, *arguments: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CARAVAN_"))}
        result = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=REPOSITORY,
            env={**kept, "CARAVAN_HOME": str(self.home), "OMP_NUM_THREADS": "1", "COLUMNS": "118"},
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise RuntimeError(f"caravan {' '.join(arguments)} failed:\n{result.stderr[-3000:]}")
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))


@dataclass
class Load:
    """Clients of `/v1/completions`; every request on a connection of its own, so that both ingresses get some."""

    url: str
    clients: int
    ids: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        for number in range(self.clients):
            self._threads.append(threading.Thread(target=self._ask_on, args=(number,), daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask_on(self, number: int) -> None:
        draw = random.Random(number)
        while not self._stop.is_set():
            prompt = [draw.randrange(10, 300) for _ in range(PROMPT_TOKENS)]
            body = {"model": "wide", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
            try:
                answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120, trust_env=False)
                answer.raise_for_status()
                self.ids.append(answer.headers["x-request-id"])
            except httpx.HTTPError as error:
                self.failed.append(f"{type(error).__name__} {error}")


def replicas_when(caravan: Caravan, wanted: Callable[[int], bool], timeout_s: float) -> tuple[float, int]:
    """Waits until the number that serves is one of those; the seconds, and the number."""
    began = time.monotonic()
    while True:
        running = [view for view in caravan.json("status")["replicas"] if view["state"] == "RUNNING" and view["fresh"]]
        seconds = time.monotonic() - began
        if wanted(len(running)) or seconds > timeout_s:
            return seconds, len(running)
        time.sleep(0.5)


def check(caravan: Caravan, url: str, clients: int, claims: Claims, show: bool) -> None:
    with Load(url, clients) as load:
        seconds, running = replicas_when(caravan, lambda running: running > 1, 90)
        claims.check("replicas under load", f"{running} after {seconds:.0f} s", running > 1)
        time.sleep(20)
        screen, lines = caravan("status"), len(caravan.json("status")["replicas"])
        claims.check("the screen has a line for each", lines, screen.count(" RUNNING") >= lines)
        if show:
            print(screen)
    answered = len(load.ids)
    claims.check("requests lost", f"{load.failed[:3] or 0} of {answered}", not load.failed)

    found: Counter[str] = Counter()
    wrong = []
    recent = load.ids[-40:]
    for request_id in recent:
        (record,) = caravan.json("trace", request_id)["requests"]
        found[record["ingress"]] += 1
        if not record["request_id"].startswith(request_id):
            wrong.append(request_id)
    claims.check("requests traced, by ingress", f"{dict(found)} of {len(recent)}", not wrong and len(found) == 2)
    if show:
        print(caravan("trace", recent[-1]))

    seconds, running = replicas_when(caravan, lambda running: running == 1, 180)
    claims.check("replicas when nobody asks", f"{running} after {seconds:.0f} s", running == 1)
    status = caravan.json("status")
    claims.check("its bounds are told", status["autoscaling"], status["autoscaling"] == [1, LARGEST])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    claims = Claims()
    with tempfile.TemporaryDirectory(prefix="caravan-operator-") as folder:
        model, port = save_tiny_model(Path(folder) / "model", dim=512), find_free_port()
        caravan = Caravan(Path(folder) / "home")
        caravan("up", "--num-cpus", "4")
        try:
            bounds = ["--min", "1", "--max", str(LARGEST)]
            options = ["--ingresses", "2", "--cpus-per-replica", "0.5", "--port", str(port), "--name", "wide"]
            caravan("deploy", str(model), *bounds, *options)
            check(caravan, f"http://127.0.0.1:{port}", arguments.clients, claims, arguments.show)
        finally:
            caravan("down")
    sys.exit(claims.failed > 0)


if __name__ == "__main__":
    main()
