"""The routers' view after chaos, by seed: `python tests/evidence/router_chaos.py [--seeds 20]`.

Each seed is 200 random kills, lost, reordered and doubled items, broken and stalled streams, swaps, flushes, scale-ups
and -downs, under load, with two ingress processes in virtual time; see tests/cluster/serve/test_chaos.py. Exits
non-zero when an index differs from the union of the true caches, a request is lost, or anything is left of one.
"""

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.serve.replay import virtual_time  # noqa: E402
from tests.cluster.serve.test_chaos import run_chaos  # noqa: E402

HAPPENINGS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    logging.disable(logging.CRITICAL)
    seen: Counter[str] = Counter()
    for seed in range(1000, 1000 + seeds):
        seen += virtual_time.run(run_chaos(seed, HAPPENINGS))
    print(f"{seeds} seeds: " + ", ".join(f"{number} {kind}" for kind, number in seen.most_common()))
    print("every index equals the union of the replicas' caches, and nothing is left of any request")
    return 0


if __name__ == "__main__":
    sys.exit(main())
