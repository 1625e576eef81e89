"""Scores and weights by distance, against the definitions of the methods and a softmax of our own."""

from typing import get_args

import numpy as np
import pytest

from llama.config import Position
from llama.position import alibi_slopes
from pipelines.explain.distance import Distances, compute


@pytest.fixture(scope="module")
def found() -> Distances:
    return compute()


def test_every_kind_is_there(found: Distances) -> None:
    assert list(found.positions) == list(get_args(Position))


def test_without_positions_no_distance_differs(found: Distances) -> None:
    none = found.positions["none"]
    length = len(none.scores)
    np.testing.assert_allclose(none.scores, none.scores[0], rtol=1e-5)
    np.testing.assert_allclose(none.weights, 1 / length, rtol=1e-5)


def test_alibi_subtracts_slope_times_distance(found: Distances) -> None:
    alibi, none = found.positions["alibi"], found.positions["none"]
    slopes = 2.0 ** -np.arange(1, 9)
    np.testing.assert_allclose(alibi_slopes(8), slopes)
    distance = np.arange(len(alibi.scores))
    np.testing.assert_allclose(alibi.head_scores, none.head_scores - slopes[:, None] * distance, atol=1e-4)
    # Equal content: the softmax of the last query is that of the biases alone.
    weights = np.exp(-slopes[:, None] * distance)
    np.testing.assert_allclose(alibi.weights, (weights / weights.sum(1, keepdims=True)).mean(0), rtol=1e-4)


def test_t5_has_one_number_for_a_bucket(found: Distances) -> None:
    scores = found.positions["t5"].head_scores
    # 32 buckets to 128: below 16 one each, and the last ones are 113 to 127 long together.
    np.testing.assert_allclose(scores[:, 113:127], scores[:, [113]] @ np.ones((1, 14)), atol=1e-5)
    assert len(np.unique(scores[0, :16].round(5))) == 16


@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_waves_favour_the_near(found: Distances, position: str) -> None:
    scores = found.positions[position].scores
    assert scores[0] == scores.max()
    assert scores[1:17].mean() > scores[64:].mean()
    np.testing.assert_allclose(found.positions[position].weights.sum(), 1, rtol=1e-5)


def test_learned_ones_know_nothing_at_the_start(found: Distances) -> None:
    scores = found.positions["learned"].scores
    assert scores[0] > 1.5 * scores[1:].max()
    assert abs(scores[1:17].mean() - scores[17:64].mean()) < 0.02
