"""Evidence that the ready sweeps run, each in a new store by one command, and say what is known already.

    python tests/evidence/sweeps.py [--sweep NAME]... [--write] [--stores DIR]

Each must end within 15 minutes with a figure for every cell. Of what a sweep expects (`expect` in its file) `MUST` must
hold with every seed; the rest is printed as it was found. `--write` keeps the reports in docs/comparisons, from where
the last run's are read by people. `--stores` keeps the stores, and takes from them what is there: then the time says
nothing.

Needs the environment of `make setup` and an idle machine; about an hour and a half on two cores for all of them. Exits
non-zero when a claim fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SWEEPS = REPOSITORY / "pipelines/recipes/sweeps"
REPORTS = REPOSITORY / "docs/comparisons"
LIMIT_SECONDS = 900.0
MUST = {
    "positions": [
        *(f"alibi below {position}" for position in ("rope", "learned")),
        *(
            f"rope/extrapolate.beyond_twice.{scaling} below {position}"
            for scaling in ("ntk", "dynamic_ntk", "yarn")
            for position in ("rope", "learned")
        ),
    ],
    "balance": ["switch below none", "bias below none"],
    "repetition": ["fresh below 4-epochs", "fresh below 8-epochs"],
}
"""By sweep: expectations that are its own test."""


def run(name: str, write: bool, stores: Path | None) -> list[str]:
    """What is wrong with a sweep."""
    with tempfile.TemporaryDirectory(prefix="caravan-sweep-") as folder:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "CARAVAN_"))}
        environment = kept | {"PYTHONPATH": str(REPOSITORY), "CARAVAN_HOME": f"{folder}/home"}
        command = ["sweep", str((SWEEPS / f"{name}.yaml").relative_to(REPOSITORY)), "--json", "--address", "local"]
        command += ["--store", str(stores / name)] if stores is not None else []
        command += ["--out", str(REPORTS / name)] if write else []
        began = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *command],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - began
    if ended.returncode:
        return [f"exit code {ended.returncode}"]
    (REPORTS / name / "report.html").unlink(missing_ok=True)  # report.md and the pictures say the same
    figures: dict[str, Any] = json.loads(ended.stdout)
    wrong = [f"{seconds:.0f} s are more than {LIMIT_SECONDS:.0f}"] if seconds > LIMIT_SECONDS else []
    wrong += [f"{cell['cell']}: {why}" for cell in figures["cells"] for why in cell["missing"]]
    verdicts = {f"{each['lower']} below {each['than']}": each for each in figures["expected"]}
    for claim, each in verdicts.items():
        difference = each["difference"]
        by = f"{difference['mean']:+.4f} ({difference['lowest']:+.4f} to {difference['highest']:+.4f})"
        print(f"     {claim}, {each['measure']}: {each['verdict']}, {by}", flush=True)
    for claim in MUST.get(name, []):
        if claim not in verdicts or verdicts[claim]["verdict"] != "holds":
            wrong.append(f"{claim}: {verdicts[claim]['verdict'] if claim in verdicts else 'not asked'}")
    print(f"{'FAIL' if wrong else 'ok  '} {name}: {seconds:.0f} s", flush=True)
    return [f"{name}: {each}" for each in wrong]


def main() -> int:
    names = sorted(path.stem for path in SWEEPS.glob("*.yaml") if path.stem != "base")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", choices=names, action="append")
    parser.add_argument("--write", action="store_true", help="keep the reports in docs/comparisons")
    parser.add_argument("--stores", type=Path, help="folder for stores that are kept, and used again")
    arguments = parser.parse_args()
    wrong = [each for name in arguments.sweep or names for each in run(name, arguments.write, arguments.stores)]
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
