"""Evidence for the speed and the memory of sharding: `caravan bench data` beside plain tokenizers and pyarrow.

    python tests/evidence/data_speed.py [MEGABYTES]

Runs the comparison on so much text (default and least: 200), then ours once on 50 MB and once on 1 GB, each on a fresh
Ray, for the largest resident size of a worker. Needs the environment of `make setup`, two quiet cores, 6 GB of disk and
about half an hour. Exits non-zero when a bar is missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.evidence.demo import Claims  # noqa: E402

LEAST_SPEED = 0.85
"""Of the peer's."""
LARGEST_GROWTH = 1.15
"""Of a worker's memory from the small input to one of twenty times its size."""
LEAST_MEGABYTES, SMALL_MEGABYTES, LARGE_MEGABYTES = 200, 50, 1000


def bench(*arguments: str) -> dict:
    command = [sys.executable, "-m", "pipelines.cli", "bench", "data", *arguments, "--json"]
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(result.stdout)


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else LEAST_MEGABYTES
    if megabytes < LEAST_MEGABYTES:
        sys.exit(f"{megabytes} MB are over too soon for a verdict; give at least {LEAST_MEGABYTES}")
    claims = Claims()
    report = bench(f"--megabytes={megabytes}")
    ours, peer = report["rows"]
    speed = report["speed"]
    figure = f"{speed['median']:.2f}× ({speed['low']:.2f}–{speed['high']:.2f}, {speed['verdict']}), "
    figure += f"{ours['megabytes_per_second']:.1f} and {peer['megabytes_per_second']:.1f} MB/s, "
    figure += f"{ours['tokens_per_second']:,.0f} tokens/s; start {ours['start_seconds']:.1f} s, not counted"
    claims.check(
        f"{megabytes} MB: at least {LEAST_SPEED}× tokenizers and pyarrow", figure, speed["median"] >= LEAST_SPEED
    )

    small, large = (bench("--memory", f"--megabytes={size}") for size in (SMALL_MEGABYTES, LARGE_MEGABYTES))
    peaks = [result["rows"][0]["peak_mib"] for result in (small, large)]
    plain = [result["rows"][1]["peak_mib"] for result in (small, large)]
    figure = f"{peaks[0]:.0f} and {peaks[1]:.0f} MiB, {peaks[1] / peaks[0]:.2f}× (the peer {plain[0]:.0f} and "
    figure += f"{plain[1]:.0f})"
    claim = f"a worker's memory from {SMALL_MEGABYTES} to {LARGE_MEGABYTES} MB: at most {LARGEST_GROWTH}×"
    claims.check(claim, figure, peaks[1] <= LARGEST_GROWTH * peaks[0])
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
