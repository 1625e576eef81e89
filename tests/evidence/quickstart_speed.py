"""Evidence that the quickstarts train no slower than at an earlier commit: both training loops, round by round.

    python tests/evidence/quickstart_speed.py [COMMIT] [--rounds N]

Clones this repository at COMMIT beside the working tree and trains the models of its recipes at their settings on
random tokens, two ranks under gloo, no Ray. Needs the environment of `make setup` and two quiet cores; six minutes.
Exits non-zero when a median ratio is below 1 by more than the noise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

REPOSITORY = Path(__file__).resolve().parents[2]
BEFORE_THE_MODEL_LIBRARY = "9676944"
NOISE = 0.05
"""Two runs of the same code have differed by this much on a shared machine with two cores."""
RECIPES = ("quickstart", "quickstart-dense")


class RandomTokens:
    """A loader of the recipe's shapes."""

    epoch = None

    def __init__(self, shape: tuple[int, int], vocab_size: int) -> None:
        self.shape, self.vocab_size = shape, vocab_size

    def __iter__(self) -> Iterator:
        import torch

        try:
            from llama.training.batch import Batch
        except ImportError:  # an earlier commit's loop takes inputs and targets in one tensor
            Batch = None
        generator = torch.Generator().manual_seed(0)
        while True:
            tokens = torch.randint(self.vocab_size, self.shape, generator=generator)
            yield tokens if Batch is None else Batch(tokens[:, :-1], tokens[:, 1:])

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def train(rank: int, world_size: int, recipe: Path) -> float:
    """Tokens per second over all ranks, the median of the reports after the first ones."""
    import torch

    from llama.training.trainer import Trainer
    from pipelines.recipe import Recipe

    torch.set_num_threads(1)
    loaded = Recipe.load(recipe)
    config = replace(loaded.train, steps=120, log_every=10, checkpoint_every=0)
    loader = RandomTokens((config.micro_batch, config.seq_len + 1), loaded.model.vocab_size)
    rates: list[float] = []
    Trainer(loaded.model, config, loader, on_metrics=lambda metrics: rates.append(metrics.tokens_per_second)).fit()
    return median(rates[3:])


def measure(checkout: Path, recipe: Path) -> float:
    """`train` with the code of a checkout, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", str(recipe)]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{checkout}, {recipe}: {result.stderr[-2000:]}")
    return float(result.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", default=BEFORE_THE_MODEL_LIBRARY)
    parser.add_argument("--rounds", type=int, default=6, help="an even number")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        from tests.distributed import run_ranks

        print(run_ranks(train, 2, options.measure)[0])
        return
    slower = False
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(before)], check=True)
        subprocess.run(["git", "-C", str(before), "checkout", "-q", options.commit], check=True)
        for recipe in RECIPES:
            path = before / "pipelines" / "recipes" / f"{recipe}.yaml"
            checkouts = {"then": before, "now": REPOSITORY}
            rates: dict[str, list[float]] = {"then": [], "now": []}
            for turn in range(options.rounds):
                for name in ("then", "now") if turn % 2 == 0 else ("now", "then"):
                    rates[name].append(measure(checkouts[name], path))
            ratios = [now / then for then, now in zip(rates["then"], rates["now"], strict=True)]
            low, _, high = quantiles(ratios, n=4, method="inclusive")
            holds = median(ratios) >= 1 - NOISE
            slower |= not holds
            figure = f"{median(rates['then']):,.0f} → {median(rates['now']):,.0f} tokens/s, {median(ratios):.2f}×"
            print(f"{'ok  ' if holds else 'FAIL'}  {recipe:<18} {figure} ({low:.2f}–{high:.2f})", flush=True)
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
