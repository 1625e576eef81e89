"""The validation loss against one process over the rows, and a training that it must not disturb."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.attention import CausalAttend
from llama.losses import IGNORE_INDEX
from llama.model import Transformer
from llama.training.batch import Batch, loss_sum
from llama.training.checkpoint import Checkpointer, load_model_weights
from llama.training.config import ParallelConfig
from llama.training.mesh import build_mesh, process_group
from llama.training.parallel import apply_parallel
from llama.training.trainer import Trainer
from llama.training.validation import validation_loss
from tests.distributed import run_ranks
from tests.llama.training.helpers import DENSE, MOE, Samples, pad_labels, samples, train_config, whole

ROWS = 7
BASE = train_config(steps=5, checkpoint_every=2, keep_last=9, validate_every=2)


def rows():
    """Rows that training does not draw, and their labels, some of which do not count."""
    tokens = samples(5000, ROWS, BASE, MOE.vocab_size)
    return tokens[:, :-1], pad_labels(tokens[:, 1:], torch.tensor([16, 9, 16, 4, 16, 16, 12]))


def batches(rank, world_size):
    """This rank's rows, two at a time, filled up to as many batches as each rank has."""
    inputs, labels = (tensor[rank::world_size] for tensor in rows())
    batches = [Batch(*pair) for pair in zip(inputs.split(2), labels.split(2), strict=True)]
    empty = Batch(torch.zeros(1, 16, dtype=torch.int64), torch.full((1, 16), IGNORE_INDEX))
    return batches + [empty] * (-(-ROWS // (2 * world_size)) - len(batches))


def train(rank, world_size, folder):
    """With validation and without: the metrics and the weights."""
    found = []
    parallel = ParallelConfig(ep=world_size)
    for config, store in ((replace(BASE, parallel=parallel), folder), (train_config(steps=5, parallel=parallel), None)):
        seen = []
        trainer = Trainer(
            MOE,
            config,
            Samples(config, MOE.vocab_size, rank, world_size),
            Checkpointer(Store(store), Artifact, keep_last=9, keep_best=1) if store else None,
            validation=batches(rank, world_size) if config.validate_every else (),
            on_metrics=seen.append,
        )
        summary = trainer.fit()
        weights = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
        found.append((seen, summary, weights, torch.get_rng_state()))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folders = {world_size: tmp_path_factory.mktemp(f"ranks{world_size}") for world_size in (1, 2)}
    return {world_size: (folder, run_ranks(train, world_size, str(folder))) for world_size, folder in folders.items()}


@pytest.mark.integration
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_one_process_over_the_rows(trained, world_size):
    folder, ranks = trained[world_size]
    inputs, labels = rows()
    expected = {}
    for step in (2, 4, 5):
        model = Transformer(MOE)
        progress = load_model_weights(Artifact(Store(folder / f"step-{step:08d}")), model)
        with torch.no_grad():
            expected[step] = cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=-100).item()
        assert progress["val_loss"] == pytest.approx(expected[step], rel=1e-6)
    for (seen, summary, *_), _ in ranks:
        measured = {metrics.step: metrics.val_loss for metrics in seen if metrics.val_loss is not None}
        assert measured == pytest.approx(expected, rel=1e-6)
        assert summary.val_loss == measured[5] and summary.validation_seconds > 0


@pytest.mark.integration
def test_does_not_disturb_the_training(trained):
    for with_it, without in trained[2][1]:
        for validated, plain in zip(with_it[0], without[0], strict=True):
            for name in ("loss", "grad_norm", "tokens", "samples", "epoch", "expert_load", "router_entropy"):
                assert getattr(validated, name) == getattr(plain, name), name
        assert with_it[2].keys() == without[2].keys()
        assert all(torch.equal(with_it[2][name], tensor) for name, tensor in without[2].items())
        assert torch.equal(with_it[3], without[3])


def unequal(rank, world_size):
    config = train_config(validate_every=1)
    message = []
    for given in (batches(0, 1)[: 1 + rank], ()):
        with pytest.raises(ValueError) as raised:
            Trainer(DENSE, config, Samples(config, 61, rank, world_size), validation=given).fit()
        message.append(str(raised.value))
    return message


@pytest.mark.integration
def test_ranks_with_unequal_batches_are_refused_and_do_not_hang():
    for unequal_batches, none in run_ranks(unequal, 2):
        assert unequal_batches.startswith("ranks have 1 to 2 batches to validate on")
        assert none.startswith("ranks have 0 to 0 batches")


def test_a_loss_that_is_not_finite_is_none():
    config = train_config(steps=1, micro_batch=8, validate_every=1)
    seen = []
    inputs, labels = rows()
    for given in (labels, torch.full_like(labels, IGNORE_INDEX)):
        Trainer(DENSE, config, Samples(config, 61), validation=[Batch(inputs, given)], on_metrics=seen.append).fit()
    assert math.isfinite(seen[0].val_loss) and seen[1].val_loss is None


@pytest.mark.parametrize(
    "model_config",
    [
        replace(DENSE, residual_dropout=0.3, attention_dropout=0.2),
        replace(MOE, moe=replace(MOE.moe, capacity_factor=0.5)),
    ],
)
def test_drops_nothing_and_leaves_the_model_in_training(model_config):
    inputs, labels = rows()
    model = Transformer(model_config)
    model.init_weights(0)
    with torch.no_grad():
        expected = cross_entropy(model.eval()(inputs).flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    with process_group():
        apply_parallel(model.train(), build_mesh(ParallelConfig(), 1, "cpu"), "fp32")
        batch = Batch(inputs, labels)
        found = validation_loss(model, [batch], CausalAttend, torch.device("cpu"))
        dropping = loss_sum(model, batch).item() / batch.num_targets().item()
    assert found == pytest.approx(expected, rel=1e-6)
    assert dropping != pytest.approx(expected, rel=1e-5)
