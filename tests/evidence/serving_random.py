"""Evidence that after 200 random happenings on a real Serve every router's index is what the replicas have cached.

    python tests/evidence/serving_random.py [--happenings 200] [--seed N] [--clients 8]

Under steady load, drawn from a seed: a replica is killed, one is added or taken away, other weights are put in place;
an item's block events are lost on their way to an ingress, one of them is, or they come after those that follow. Two
ingress processes; one to four replicas. Every 20 happenings, and at the end, each ingress's index is compared with each
replica's cache. No whole answer may be lost, no answer be other than a single engine's, and streams break only on
replicas that were killed. Prints the counts; exits with 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from cluster.serve import control, declaration  # noqa: E402
from cluster.serve.errors import ServeError  # noqa: E402
from cluster.serve.settings import AppArgs  # noqa: E402
from tests.cluster.serve.local_ray import local_ray  # noqa: E402
from tests.conftest import find_free_port  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402
from tests.evidence.faulty_serve import FOLDER, KINDS  # noqa: E402
from tests.evidence.serving_chaos import ENGINE, MODEL, Ground, Phase, index, prepared  # noqa: E402

SMALL = replace(ENGINE, num_blocks=128)
"""Fewer blocks than the prompts and answers have, so that there is something to tell all the time."""
MOST = 4
PATIENCE_S = 120.0
LOOK_EVERY = 20


class Happenings:
    """What can happen to a deployment, and how often it has."""

    def __init__(self, ground: Ground, faults: Path, draw: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._ground = ground
        self._faults = faults
        self._draw = draw
        self._replicas = 2
        self._model = 0

    def next(self, phase: Phase) -> None:
        kind = self._draw.choice([*KINDS, *KINDS, "kill", "kill", "scale", "scale", "swap"])
        self.counts[kind] += 1
        if kind in KINDS:
            (self._faults / f"{kind}-{self.counts.total()}").touch()
            time.sleep(self._draw.uniform(0.1, 1.0))
        elif kind == "kill":
            _until_done(lambda: phase.victims.add(self._ground.kill_replica()))
            time.sleep(self._draw.uniform(0.1, 4.0))
        elif kind == "scale":
            others = [n for n in (self._replicas - 1, self._replicas + 1) if 1 <= n <= MOST]
            self._replicas = self._draw.choice(others)
            _until_done(lambda: control.scale(self._replicas, dashboard_url=self._ground.dashboard_url))
        else:
            self._model = 1 - self._model
            model = self._ground.models[self._model]
            _until_done(lambda: control.update(model, dashboard_url=self._ground.dashboard_url, timeout_s=60))

    def settle(self) -> None:
        self._ground.wait_for(self._replicas, PATIENCE_S)
        deadline = time.monotonic() + 30
        while any(self._faults.iterdir()):
            if time.monotonic() > deadline:
                raise TimeoutError("no ingress takes the faults that were ordered")
            time.sleep(0.1)


def _until_done(work: Callable[[], object]) -> None:
    """What a kill just before keeps from succeeding is tried again, as its user would."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            work()
            return
        except (ServeError, OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise
            print(f"      {type(error).__name__}: {error}; once more", flush=True)
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--happenings", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, claims = random.Random(arguments.seed), Claims()
    with tempfile.TemporaryDirectory(prefix="caravan-random-") as folder:
        models, prompts, expected = prepared(Path(folder), draw, claims)
        faults = Path(folder) / "faults"
        faults.mkdir()
        (Path(folder) / "cwd").mkdir()
        os.environ[FOLDER] = str(faults)
        declaration.IMPORT_PATH = "faulty_serve:build"
        with local_ray(Path(folder) / "cwd", num_cpus=6, modules=[Path(__file__).parent / "faulty_serve"]) as url:
            args = AppArgs(model=models[0], served_name=MODEL, cpus_per_replica=0.25, engine=SMALL, ingresses=2)
            endpoint = control.deploy(
                args, replicas=2, dashboard_url=url, runtime_env=control.shipped_runtime_env(), port=find_free_port()
            )
            ground = Ground(url, endpoint, models, prompts, expected, claims, arguments.clients)
            happenings = Happenings(ground, faults, draw)
            with ground.under_load("random", models) as phase:
                for number in range(1, arguments.happenings + 1):
                    happenings.next(phase)
                    if number % LOOK_EVERY == 0 or number == arguments.happenings:
                        happenings.settle()
                        index(ground)
            print(f"      happenings: {dict(happenings.counts)}")
            control.undeploy(dashboard_url=url)
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
