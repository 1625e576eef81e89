"""The loss by position against each document's own log-probabilities, and the picture of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cluster.artifact import Artifact
from cluster.placement import WorkerNeeds
from cluster.storage import Store
from llama.config import ModelConfig, RopeScaling
from llama.model import Transformer
from llama.training.batch import Batch
from pipelines.extrapolate import (
    ExtrapolateConfig,
    ExtrapolateTask,
    draw_extrapolation,
    extrapolate_checkpoint,
    extrapolate_stage,
    measure,
    scalings_of,
    smoothed,
    write_extrapolation,
)
from pipelines.figures import own_style, png
from pipelines.loader import held_out_batches
from pipelines.shard_set import ShardSet
from pipelines.sources import DataError
from pipelines.stage import StageContext
from tests.llama.engine.models import random_model
from tests.pipelines.shard_files import random_shards, write_shards

TRAIN, FACTOR = 4, 4
LENGTH = TRAIN * FACTOR
VOCAB = 61
MODEL = ModelConfig(vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, multiple_of=16, max_seq_len=LENGTH)
CONFIG = ExtrapolateConfig(factor=FACTOR, rows=1000, batch_size=3)
KINDS = ("linear", "ntk", "dynamic_ntk", "yarn", "llama3")


def double(config: ModelConfig) -> Transformer:
    return random_model(config).double().eval()


def shards_of(folder, packing, rows=8):
    """A set of random rows, the first so many of them held out, and these rows' tokens, cut at documents if packed."""
    _, splits = random_shards(Store(folder / "drawn"), packing=packing, seq_len=LENGTH)
    for shards in splits.values():
        for row in (row for each in shards for row in each):
            row.tokens = [token % VOCAB for token in row.tokens]
    splits["validation"] = [[row for each in splits["validation"] for row in each][:rows]] if rows else []
    artifact = write_shards(Store(folder / "small"), splits, LENGTH, packing)
    pieces = []
    for row in (row for each in splits["validation"] for row in each):
        starts = row.starts if packing == "best_fit" else [0]
        pieces += [row.tokens[a:b] for a, b in zip(starts, [*starts[1:], len(row.tokens)], strict=True)]
    return artifact, pieces


@torch.inference_mode()
def by_hand(model, pieces, scaling=None):
    """Summed −log p by position and its number of targets, each piece by itself, from the logits."""
    plain, sums, counts = model.config, [0.0] * LENGTH, [0] * LENGTH
    original = {} if scaling in ("linear", "ntk") else {"original_max_seq_len": TRAIN}
    for multiple in range(1, FACTOR + 1):
        if scaling == "dynamic_ntk":  # the stretch is that of the multiple
            stretch = RopeScaling("ntk", float(multiple))
        else:
            stretch = scaling and RopeScaling(scaling, float(FACTOR), **original)
        model.config = replace(plain, rope_scaling=stretch)
        for tokens in pieces:
            logits = model(torch.tensor([tokens[:-1]]))[0]
            for place in range(TRAIN * (multiple - 1), min(TRAIN * multiple, len(tokens) - 1)):
                sums[place] -= logits[place].log_softmax(-1)[tokens[place + 1]].item()
                counts[place] += 1
    model.config = plain
    return sums, counts


def means(sums, counts, width):
    return [
        sum(sums[at : at + width]) / sum(counts[at : at + width]) if any(counts[at : at + width]) else None
        for at in range(0, LENGTH, width)
    ]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_under_each_scaling_it_is_the_mean_of_the_targets_at_a_position(tmp_path, packing):
    artifact, pieces = shards_of(tmp_path, packing)
    model, batches = double(MODEL), list(held_out_batches(ShardSet(artifact), CONFIG.batch_size))
    assert len(batches) == 3
    found = measure(model, batches, TRAIN, CONFIG)
    assert list(found["curves"]) == ["rope", *(f"rope under {kind}" for kind in KINDS)]
    assert (found["train_seq_len"], found["factor"], found["positions"]) == (TRAIN, FACTOR, list(range(1, LENGTH + 1)))
    for name, scaling in zip(found["curves"], (None, *KINDS), strict=True):
        sums, counts = by_hand(model, pieces, scaling)
        assert found["curves"][name] == pytest.approx(means(sums, counts, 1), rel=1e-9)
        assert found["loss_by_multiple"][name] == pytest.approx(means(sums, counts, TRAIN), rel=1e-9)
    assert found["within"]["own"] == found["loss_by_multiple"]["rope"][0]
    assert found["beyond_twice"] == {
        name.removeprefix("rope under ").replace("rope", "own"): pytest.approx(sum(losses[2:]) / (FACTOR - 2))
        for name, losses in found["loss_by_multiple"].items()
    }
    dynamic, plain, ntk = (
        found["loss_by_multiple"][f"rope{kind}"] for kind in (" under dynamic_ntk", "", " under ntk")
    )
    assert dynamic[0] == pytest.approx(plain[0]) and dynamic[1] != pytest.approx(ntk[1], rel=1e-4)


@pytest.mark.parametrize("position", ["alibi", "learned", "sinusoidal", "t5", "none"])
def test_other_positions_have_their_own_curve_alone(tmp_path, position):
    artifact, pieces = shards_of(tmp_path, "concatenate")
    model = double(replace(MODEL, position=position))
    found = measure(model, list(held_out_batches(ShardSet(artifact), 3)), TRAIN, CONFIG)
    assert found["curves"] == {position: pytest.approx(means(*by_hand(model, pieces), 1), rel=1e-9)}


def test_a_curve_of_many_positions_is_of_means_over_runs():
    config = ExtrapolateConfig(factor=3, batch_size=2)
    model = double(replace(MODEL, max_seq_len=1800, num_layers=1, position="none"))
    tokens = torch.randint(VOCAB, (1, 1801), generator=torch.Generator().manual_seed(0))
    found = measure(model, [Batch(tokens[:, :-1], tokens[:, 1:])], 600, config)
    losses = -model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None]).flatten()
    assert found["positions"] == list(range(3, 1801, 3))
    assert found["curves"]["none"] == pytest.approx(losses.view(-1, 3).mean(1).tolist(), rel=1e-9)
    assert found["loss_by_multiple"]["none"] == pytest.approx(losses.view(3, -1).mean(1).tolist(), rel=1e-9)


def test_a_model_trained_with_a_scaling_is_measured_under_that():
    own = replace(MODEL, rope_scaling=RopeScaling("linear", 2.0))
    assert scalings_of(own, TRAIN, CONFIG) == {}
    tokens = torch.randint(VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    assert list(measure(double(own), [Batch(tokens[:, :-1], tokens[:, 1:])], TRAIN, CONFIG)["curves"]) == [
        "rope, linear"
    ]


NEEDS = WorkerNeeds(cpus=1)


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ({"position": "learned", "max_seq_len": 15}, {}, "model.max_seq_len=15 positions .* set model.max_seq_len=16"),
        ({"position": "alibi"}, {"scalings": ["yarn"]}, r"extrapolate.scalings=\['yarn'\] .* model.position is alibi"),
        (
            {"rope_scaling": RopeScaling("ntk", 2.0)},
            {"scalings": ["yarn"]},
            "model.position is rope with rope_scaling.kind=ntk; leave them out",
        ),
        ({"head_dim": 2}, {"scalings": ["ntk"]}, "model.head_dim=2 is too small for model.rope_scaling.kind=ntk"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(model, settings, words):
    config = ExtrapolateConfig(factor=FACTOR, **settings)
    with pytest.raises(ValueError, match=words):
        extrapolate_stage(replace(MODEL, **model), TRAIN, config, NEEDS, 0)


def test_the_stage_waits_for_the_shards_that_it_is_given():
    stage = extrapolate_stage(replace(MODEL, position="learned"), TRAIN, CONFIG, NEEDS, 0, "long_shards")
    assert (stage.name, stage.upstream) == ("extrapolate", ("long_shards", "pretrain"))


@pytest.mark.parametrize("settings", [{"factor": 1}, {"rows": 0}, {"scalings": ["cubic"]}, {"length": 2}])
def test_a_setting_out_of_range_is_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        ExtrapolateConfig(**settings)


class Ready:
    """Stands for `Trained`: a model that is there."""

    def load(self):
        return double(MODEL)


def test_rows_of_another_length_and_none_at_all_are_refused(tmp_path):
    artifact, _ = shards_of(tmp_path / "there", "concatenate")
    task = ExtrapolateTask(Ready(), TRAIN, CONFIG, artifact, "cpu", 1)
    assert extrapolate_checkpoint(replace(task, config=ExtrapolateConfig(factor=FACTOR, rows=2)))["rows"] == 2
    with pytest.raises(DataError, match="have rows of 16 tokens, and 20 are wanted"):
        extrapolate_checkpoint(replace(task, train_seq_len=5))
    empty, _ = shards_of(tmp_path / "empty", "concatenate", rows=0)
    with pytest.raises(DataError, match="the validation split has no row of 16 tokens"):
        extrapolate_checkpoint(replace(task, shards=empty))


RESULT = {
    "train_seq_len": 8,
    "factor": 4,
    "rows": 2,
    "positions": list(range(1, 33)),
    "curves": {"rope under yarn": [3.1] * 30 + [None] * 2, "rope": [3.0] * 8 + [4.0] * 24},
    "loss_by_multiple": {"rope": [3.0, 4.0, 4.0, 4.0], "rope under yarn": [3.1] * 4},
}


def test_the_artifact_has_the_curves_and_the_picture_and_its_metadata_the_means(tmp_path):
    attempt = Artifact(Store(tmp_path / "artifact")).begin()
    store = Store(tmp_path)
    context = StageContext("extrapolate", "key", {}, store, store, [], attempt, lambda event: None)
    metadata = write_extrapolation(context, RESULT)
    assert metadata == {name: RESULT[name] for name in ("train_seq_len", "factor", "rows", "loss_by_multiple")}
    assert attempt.store.read_json("extrapolation.json") == RESULT
    assert {entry.path for entry in context.entries} == {"extrapolation.json", "extrapolation.png"}


def test_the_picture_shows_every_curve_with_its_break_at_the_length_of_training():
    with own_style():
        figure = draw_extrapolation(RESULT["positions"], RESULT["curves"], 8)
        picture = png(figure)
    (axes,) = figure.axes
    yarn, rope, boundary = axes.get_lines()
    assert rope.get_ydata().tolist() == RESULT["curves"]["rope"]
    assert [line.get_label() for line in (rope, yarn)] == ["rope", "rope under yarn"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["rope", "rope under yarn", "length of training (8)"]
    assert np.isnan(yarn.get_ydata()[-1]) and boundary.get_xdata() == [8, 8]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8\n1×", "16\n2×", "24\n3×", "32\n4×"]
    assert int.from_bytes(picture[16:20], "big") == 1200


def test_smoothing_is_a_mean_over_the_values_that_there_are():
    values = np.array([1.0, np.nan, 4.0, 7.0, np.nan, np.nan, np.nan])
    expected = []
    for at in range(len(values)):
        near = [value for value in values[max(0, at - 1) : at + 2] if not math.isnan(value)]
        expected.append(sum(near) / len(near) if near else math.nan)
    np.testing.assert_allclose(smoothed(values, 3), expected)
    np.testing.assert_allclose(smoothed(values, 1), values)
    assert smoothed(np.array([]), 3).size == 0
