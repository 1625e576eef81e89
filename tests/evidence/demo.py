"""Evidence for the newcomer's road: clones the repository, types the two commands' first one, and measures.

    python tests/evidence/demo.py [--keep FOLDER]

Needs only Python, git and make. Prints a table of claims and figures; exits non-zero when one does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
from llama.hf import load_pretrained
theirs, ours = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32), load_pretrained(sys.argv[1])
tokens = torch.randint(ours.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    difference = (ours(tokens) - theirs(tokens).logits).abs().max().item()
print(type(theirs).__name__, difference)
"""


class Claims:
    """Figures beside their bars; `failed` counts those that do not hold."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, claim: str, figure: object, holds: bool) -> None:
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'}  {claim:<68} {figure}", flush=True)


def run(*command: str, cwd: Path) -> tuple[float, str]:
    """Seconds and output of a command that must succeed."""
    started = time.monotonic()
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout[-4000:]}")
    return time.monotonic() - started, result.stdout


def latest_summary(clone: Path) -> dict:
    paths = sorted(clone.glob(".caravan/store/runs/*/summary.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(paths[-1].read_text())


def processes_of(clone: Path) -> list[str]:
    """Command lines of living processes that run from the clone's environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(clone) in command and int(entry.name) != os.getpid():
                found.append(command)
    return found


def newer_files(folder: Path, since: float) -> list[str]:
    """Files below `folder` that were written after `since`, in seconds since the epoch."""
    found = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            try:
                if os.lstat(path).st_mtime > since:
                    found.append(path)
            except OSError:
                continue
    return found


@contextmanager
def cloned(keep: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="caravan-demo-") as scratch:
        clone = keep or Path(scratch) / "caravan"
        run("git", "clone", "--quiet", str(REPOSITORY), str(clone), cwd=REPOSITORY)
        yield clone


def check_exports(clone: Path, claims: Claims) -> None:
    caravan, python = str(clone / ".venv/bin/caravan"), str(clone / ".venv/bin/python")
    moe = latest_summary(clone)["model"]
    run(caravan, "run", "pipelines/recipes/quickstart-dense.yaml", "--until", "export", cwd=clone)
    for kind, directory in (("MoE", moe), ("dense", latest_summary(clone)["model"])):
        _, output = run(python, "-c", LOGITS, directory, cwd=clone)
        name, difference = output.splitlines()[-1].split()
        claims.check(f"{kind} export: logits equal transformers' {name} to 1e-4", difference, float(difference) <= 1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="clone here, and leave it")
    arguments = parser.parse_args()
    claims, home, began = Claims(), Path.home(), time.time()
    temporary = tempfile.gettempdir()
    before = set(os.listdir(temporary))
    with cloned(arguments.keep) as clone:
        caravan = str(clone / ".venv/bin/caravan")
        setup, _ = run("make", "setup", cwd=clone)
        demo, output = run("make", "demo", cwd=clone)
        print(output)
        summary = latest_summary(clone)
        claims.check(
            "make demo on a fresh clone, installation included: <= 600 s", f"{setup + demo:.0f} s", setup + demo <= 600
        )
        claims.check("caravan run of the quickstart: <= 300 s", f"{demo:.0f} s", demo <= 300)
        share = summary["bits_per_byte"] / summary["unigram_bits_per_byte"]
        claims.check("bits per byte below 70% of the unigram's", f"{share:.1%}", share < 0.7)
        predicted, actual = summary["predicted_cached_tokens"], summary["cached_tokens"]
        claims.check("predicted cached tokens equal actual ones", f"{predicted} / {actual}", predicted == actual > 0)
        claims.check("nothing it started is left", processes_of(clone), not processes_of(clone))

        again, _ = run(caravan, "run", "pipelines/recipes/quickstart.yaml", cwd=clone)
        claims.check("the same run again: < 45 s", f"{again:.0f} s", again < 45)
        ran = [name for name, state in latest_summary(clone)["stages"].items() if state != "skipped"]
        claims.check("the same run again: only deploy runs", ran, ran == ["deploy"])
        check_exports(clone, claims)

        fresh = sorted(set(os.listdir(temporary)) - before - {"ray"})
        fresh = [name for name in fresh if not str(clone).startswith(f"{temporary}/{name}")]
        claims.check("nothing but Ray's folder is new in the temporary folder", fresh[:3], not fresh)
        stray = newer_files(home, began)
        claims.check("nothing is written to the home folder", stray[:3], not stray)
        _, status = run("git", "status", "--porcelain", cwd=clone)
        claims.check("the clone is as clean as before", status.splitlines()[:3], not status)
    sys.exit(bool(claims.failed))


if __name__ == "__main__":
    main()
