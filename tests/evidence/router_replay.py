"""Claim: on the conversation trace our router beats the best of Ray's five, in bursts, spread and at saturation.

    python tests/evidence/router_replay.py --trace shared/data/mooncake_conversation.jsonl [--mode modelled]

Three replays with 4 replicas and the same coefficients: stamps as recorded at load 0.8, spread inside their grid at
0.8, and as recorded at 1.1. Each figure of ours is divided by the best of Ray's in that figure, its settings included,
at no more rejects. On Serve (`modelled`; `--settings best --together 2` takes half an hour a case) every policy's mean
time to the first token is also compared with what the simulation says for replicas of the same names, on the average of
five runs with other random numbers.

Exits with 1 when a ratio exceeds its bound, or the simulation is more than 10 % off. Needs Ray on this machine; quiet,
with --mode modelled.
"""

import argparse
import sys
from statistics import fmean
from typing import Any

from pipelines.bench.router import RouterBench, foretell, measure
from pipelines.bench.router_report import as_text

CASES = {
    "bursts": ({"stamps": "raw", "load": 0.8}, {"ttft_mean": 0.6, "ttft_p99": 0.6, "e2e_mean": 0.95}),
    "spread": ({"stamps": "spread", "load": 0.8}, {"ttft_mean": 0.75, "ttft_p99": 0.75, "e2e_mean": 1.0}),
    "saturated": ({"stamps": "raw", "load": 1.1}, {"ttft_mean": 0.95, "ttft_p99": 0.95}),
}
TOLERANCE = 0.10


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _foreseen(bench: RouterBench, report: dict[str, Any]) -> list[str]:
    """Policies of which the simulation says something else than Serve."""
    wrong = []
    seen = {
        f"{name}[{setting}]" if setting else name: own["ttft_mean"]
        for name, figures in report["policies"].items()
        for setting, own in (figures.get("settings") or {"": figures}).items()
    }
    for name, told in foretell(bench, report).items():
        off = fmean(told) / seen[name] - 1
        print(f"simulated mean time to first token, {name}: {off:+.1%} ({min(told):.2f} to {max(told):.2f} s)")
        if abs(off) > TOLERANCE:
            wrong.append(f"{name}: the simulation is {off:+.1%} off")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", required=True)
    parser.add_argument("--mode", choices=["sim", "modelled"], default="sim")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--together", type=int, default=6)
    parser.add_argument("--settings", choices=["all", "best"], default="all")
    parser.add_argument("--policies", default="", help="such as caravan,power_of_two [default: all]")
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    failures = []
    for case in options.cases.split(","):
        given, bounds = CASES[case]
        bench = RouterBench(
            trace=options.trace,
            mode=options.mode,
            requests=options.requests,
            repeat=options.repeat,
            together=options.together,
            settings=options.settings,
            policies=tuple(filter(None, options.policies.split(","))),
            **given,  # type: ignore[arg-type]
        )
        report = measure(bench, _say)
        print(f"\n{case}: {as_text(report)}")
        for metric, bound in bounds.items():
            found = report["comparison"][metric]
            holds = found["ratio"] <= bound
            print(f"{case}, {metric}: {found['ratio']:.3f} × {found['best_peer']}, at most {bound}: {holds}")
            if not holds:
                failures.append(f"{case}: {metric} is {found['ratio']:.3f} of {found['best_peer']}'s, not {bound}")
        rejects = {name: figures["rejects"] for name, figures in report["policies"].items()}
        if rejects["caravan"] > min(rejects.values()):
            failures.append(f"{case}: rejects {rejects}")
        if options.mode == "modelled":
            failures += [f"{case}: {line}" for line in _foreseen(bench, report)]
    print("\n".join(["", *failures]) if failures else "\nAll of it holds.")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
