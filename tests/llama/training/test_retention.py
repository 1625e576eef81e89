"""Which checkpoints stay: against a search over all sets, and on a real store."""

import itertools
import random

import torch

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.training.checkpoint import Checkpointer, kept
from llama.training.mesh import process_group


def rank(losses, step):
    """Place by validation loss, of equal ones the later first."""
    return sum((losses[other], -other) < (losses[step], -step) for other in losses if losses[other] is not None)


def test_equals_the_rules_checked_step_by_step():
    rng = random.Random(0)
    for _ in range(1000):
        steps = rng.sample(range(1, 60), rng.randint(1, 12))
        losses = {step: rng.choice([None, 1.0, 2.0, rng.random()]) for step in steps}
        last, best, every = rng.randint(1, 4), rng.randint(0, 4), rng.choice([0, 1, 5, 7])
        expected = {
            step
            for step in steps
            if sum(other > step for other in steps) < last
            or (losses[step] is not None and rank(losses, step) < best)
            or (every and step % every == 0)
        }
        assert kept(losses, keep_last=last, keep_best=best, keep_every=every) == expected
        assert max(steps) in expected


def test_the_best_are_a_set_that_no_exchange_improves():
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5}
    best = kept(losses, keep_last=1, keep_best=2) - {50}
    sums = {pair: sum(losses[step] for step in pair) for pair in itertools.combinations([10, 20, 30, 50], 2)}
    assert best == set(min(sums, key=sums.get)) == {20, 30}


def test_on_a_store(tmp_path):
    """Losses that fall and rise again; what a failed save left goes, and a rewritten step counts anew."""
    losses = {1: 5.0, 2: 4.0, 3: 1.0, 4: 3.0, 5: 2.0, 6: 6.0, 7: 7.0, 8: None}
    store = Store(tmp_path)

    def steps():
        return sorted({int(path.split("/")[0].removeprefix("step-")) for path in store.list()})

    with process_group():
        checkpointer = Checkpointer(store, Artifact, keep_last=1, keep_best=2, keep_every=4)
        for step, loss in losses.items():
            if step == 6:
                store.write_bytes("step-00000002/attempts/x/rank-00000.bin", b"half")
            checkpointer.begin(step, {"model.a": torch.ones(1)}, {"val_loss": loss}).result()
            assert steps() == sorted(
                kept({s: losses[s] for s in losses if s <= step}, keep_last=1, keep_best=2, keep_every=4)
            )
        assert steps() == [3, 4, 5, 8]
        assert {step: progress["val_loss"] for step, progress in checkpointer.committed().items()} == {
            step: losses[step] for step in (3, 4, 5, 8)
        }
        later = Checkpointer(store, Artifact, keep_last=1, keep_best=1)
        later.begin(9, {"model.a": torch.ones(1)}, {}).result()
        assert steps() == [3, 9]
