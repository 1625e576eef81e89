"""Evidence that a sweep which is killed and resumed gives the same table.

    python tests/evidence/sweep_kills.py [--kills N] [--seed N]

A small sweep is run to its end in one store. In another its driver is killed with SIGKILL at random moments, N times,
and resumed each time; then all its figures must be equal to the last digit to those of the first, but for what is
measured with a clock or of the memory. Trainings keep checkpoints, so that some are resumed in the middle.

Needs the environment of `make setup` and about six minutes. Exits non-zero when a claim fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = {
    "name": "small",
    "data": {"sources": [{"uri": "stdlib"}], "max_bytes": 600_000, "validation_fraction": 0.1},
    "tokenizer": {"vocab_size": 400},
    "model": {"dim": 48, "num_layers": 2, "num_heads": 4, "max_seq_len": 64},
    "train": {"steps": 60, "global_batch": 8, "micro_batch": 8, "seq_len": 64, "checkpoint_every": 10},
}
SWEEP = {
    "name": "kills",
    "recipe": RECIPE,
    "set": {"train.validate_every": 20},
    "grid": {"model.norm": ["rmsnorm", "layernorm"], "model.position": ["rope", "alibi"]},
    "seeds": [0, 1],
    "measures": ["pretrain.val_loss", "pretrain.loss", "evaluate.bits_per_byte", "curve.gap"],
    "expect": [{"lower": "rmsnorm-rope", "than": "layernorm-rope"}],
}
MEASURED = ("tokens_per_second", "memory_bytes", "machine", "run_id", "seconds", "report")
LIMIT_SECONDS = 900.0


def figures(value: Any) -> Any:
    """What must be the same."""
    if isinstance(value, dict):
        return {key: figures(item) for key, item in value.items() if key not in MEASURED}
    return [figures(item) for item in value] if isinstance(value, list) else value


class Workplace:
    def __init__(self, folder: Path) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "CARAVAN_"))}
        self.environment = kept | {"PYTHONPATH": str(REPOSITORY), "CARAVAN_HOME": str(folder / "home")}
        self.sweep = folder / "sweep.yaml"
        self.sweep.write_text(yaml.safe_dump(SWEEP, sort_keys=False))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "pipelines.cli", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(line, env=self.environment, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)

    def run(self, *arguments: str) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
        if process.returncode:
            raise SystemExit(f"caravan {' '.join(arguments)}: exit code {process.returncode}\n{err[-3000:]}")
        return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="caravan-kills-") as name:
        folder = Path(name)
        place = Workplace(folder)
        place.run("up", "--no-service", "--num-cpus", "2")
        try:
            began = time.monotonic()
            whole = json.loads(place.run("sweep", str(place.sweep), "--store", f"{name}/whole", "--json"))
            seconds = time.monotonic() - began
            print(f"run to its end: {seconds:.0f} s", flush=True)
            store = ["--store", f"{name}/killed"]
            driver = place.start("sweep", str(place.sweep), "--run-id", "killed", *store)
            kills = 0
            while kills < arguments.kills:
                wait = draw.uniform(0.1, 0.35) * seconds
                try:
                    driver.wait(wait)
                    break
                except subprocess.TimeoutExpired:
                    driver.kill()
                    driver.communicate()
                kills += 1
                left = len(list(Path(f"{name}/killed/artifacts/pretrain").glob("*/manifest.json")))
                print(f"killed after {wait:.0f} s: {left} of 8 trainings are committed", flush=True)
                driver = place.start("resume", "killed", *store)
            driver.communicate(timeout=LIMIT_SECONDS)
            resumed = json.loads(place.run("resume", "killed", *store, "--json"))
        finally:
            place.run("down")
    same = figures(whole) == figures(resumed)
    if not same:
        print(json.dumps(figures(whole), indent=1), json.dumps(figures(resumed), indent=1), sep="\n--- resumed\n")
    print(f"{'ok  ' if same and kills else 'FAIL'} after {kills} kills every figure of the table is the same")
    return 0 if same and kills else 1


if __name__ == "__main__":
    sys.exit(main())
