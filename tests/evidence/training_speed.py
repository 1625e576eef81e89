"""Evidence for the speed of a training step: runs the benchmarks beside transformers and holds them to their bars.

    python tests/evidence/training_speed.py

Needs the environment of `make setup`, one quiet core and about fifteen minutes. Exits non-zero when a bar is missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = {
    # Title: (arguments, least speed over transformers as shipped).
    "dense bf16": (["--precision=bf16"], 1.4),
    "dense fp32": (["--precision=fp32"], 1.8),
    "MoE bf16": (["--model=small-moe", "--batch=2"], 1.15),
}
LARGEST_LAYER_COST = 1.15


def bench(*arguments: str) -> dict:
    command = [sys.executable, "-m", "llama.bench", *arguments, "--json"]
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(result.stdout)


def main() -> None:
    failed = 0

    def check(claim: str, figure: str, holds: bool) -> None:
        nonlocal failed
        failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'}  {claim:<52} {figure}", flush=True)

    for title, (arguments, least) in TRAIN.items():
        report = bench("train", *arguments)
        ours, peer, tuned = report["rows"]
        speed = ours["versus_peer"]
        figure = f"{speed['median']:.2f}× ({speed['low']:.2f}–{speed['high']:.2f})"
        figure += f", {ours['tokens_per_second']:.0f} tok/s, {ours['ceiling_share']:.0%} of the GEMM ceiling"
        figure += f"; transformers with our settings {tuned['versus_peer']['median']:.2f}×"
        check(f"{title}: at least {least}× transformers", figure, speed["median"] >= least)
        memory = f"{ours['peak_mib']:.0f} and {peer['peak_mib']:.0f} MiB"
        check(f"{title}: peak memory not above transformers'", memory, ours["peak_mib"] <= peer["peak_mib"])
    for precision in ("bf16", "fp32"):
        cost = bench("moe-layer", f"--precision={precision}", "--rounds=15")["cost"]
        figure = f"{cost['median']:.2f}× ({cost['low']:.2f}–{cost['high']:.2f})"
        claim = f"MoE layer {precision}, 4096 tokens: at most {LARGEST_LAYER_COST}× dense"
        check(claim, figure, cost["median"] <= LARGEST_LAYER_COST)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
