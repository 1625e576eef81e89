"""Evidence that an encoder–decoder learns through the pipeline: the recipe as it is, which reverses, and set to sort.

    python tests/evidence/seq2seq.py

Runs both with the command in a temporary store, on a Ray cluster of two cores that each run starts for itself, then
asks each run for a sequence with `caravan predict`. Needs the environment of `make setup` and two quiet cores; five
minutes. Exits non-zero unless each run, from the command to its end, took at most `SECONDS` and answered `EXACT_MATCH`
of the held-out sources whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.evidence.demo import Claims  # noqa: E402

EXACT_MATCH = 0.99
SECONDS = 300.0
TASKS = {"reverse": lambda source: source[::-1], "sort": sorted}


def caravan(home: Path, *arguments: str, text: str | None = None) -> str:
    """What a command prints that must succeed."""
    environment = {**os.environ, "CARAVAN_HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, input=text)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
    return result.stdout


def main() -> None:
    claims = Claims()
    recipe = str(REPOSITORY / "pipelines" / "recipes" / "reverse.yaml")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        store = ("--store", str(home / "store"))
        for task, solve in TASKS.items():
            settings = ("--set", f"name={task}", "--set", f"pairs.task={task}")
            began = time.monotonic()
            out = caravan(home, "run", recipe, *settings, *store, "--run-id", task, "--address", "local", "--json")
            seconds, summary = time.monotonic() - began, json.loads(out)
            exact = summary["exact_match"]
            figure = f"{exact:.2%}, {summary['token_accuracy']:.2%} of the tokens"
            claims.check(
                f"{task}: at least {EXACT_MATCH:.0%} of the held-out targets whole", figure, exact >= EXACT_MATCH
            )
            claims.check(
                f"{task}: from the command to its end in {SECONDS:.0f} s", f"{seconds:.0f} s", seconds <= SECONDS
            )
            source = [3, 14, 1, 5, 9, 2, 6, 5, 13]
            said = caravan(home, "predict", task, *store, text=" ".join(map(str, source)))
            right = said.split() == [str(number) for number in solve(source)]
            claims.check(f"{task}: caravan predict answers {' '.join(map(str, source))}", said.strip(), right)
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
