"""Bands and candidates against their definitions, signatures against the sets' similarity."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.minhash import FIRST_OF_BUCKET, RECALL, Bands, Signer, band_hashes, choose_bands, find_candidates


@given(st.floats(0.01, 1), st.integers(16, 1024))
def test_bands_have_most_rows_that_find_pairs_at_the_threshold(threshold, num_perm):
    bands = choose_bands(threshold, num_perm)
    assert bands.count * bands.rows <= num_perm
    if bands.rows > 1:
        assert 1 - (1 - threshold**bands.rows) ** bands.count >= RECALL
    wider = Bands(num_perm // (bands.rows + 1), bands.rows + 1)
    assert bands.rows == num_perm or wider.recall(threshold) < RECALL


def test_signatures_agree_as_often_as_the_sets_are_similar():
    generator = np.random.default_rng(0)
    bands = Bands(64, 16)
    sign = Signer(bands)
    for similarity in (0.2, 0.5, 0.8):
        common = round(3000 * similarity)
        both = generator.integers(0, 2**64, 6000 - common, np.uint64, endpoint=False)
        left, right = both[:3000], both[3000 - common : 6000 - common]
        expected = common / (6000 - common)
        agreement = np.mean(sign(left) == sign(right))
        assert agreement == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 1024))


def test_a_signature_does_not_depend_on_what_was_signed_before_or_on_the_order():
    ngrams = np.arange(1, 2000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    sign = Signer(Bands(4, 4))
    first = sign(ngrams)
    sign(ngrams[:5])
    assert np.array_equal(sign(ngrams[::-1]), first)
    assert np.array_equal(Signer(Bands(4, 4))(ngrams), first)
    assert first[:3].tolist() == [1980409, 2517861, 1494147]  # another value is another version of the stage


def test_band_hashes_are_equal_where_the_band_is():
    signatures = np.array([[1, 2, 3, 4], [1, 2, 4, 3], [2, 1, 3, 4]], np.uint32)
    first, second = band_hashes(signatures, Bands(2, 2))
    assert first[0] == first[1] != first[2]
    assert second[0] == second[2] != second[1]


columns = st.integers(0, 25).flatmap(
    lambda documents: st.lists(
        st.lists(st.integers(0, 5), min_size=documents, max_size=documents), min_size=1, max_size=4
    )
)


@given(columns, st.floats(0.05, 1), st.randoms(use_true_random=False))
def test_candidates_are_the_pairs_that_share_a_bucket_and_may_be_similar(bands, threshold, random):
    documents = len(bands[0])
    sizes = [random.randint(1, 9) for _ in range(documents)]
    found = find_candidates([np.array(band, np.uint64) for band in bands], np.array(sizes, np.int64), threshold)
    expected = [
        (first, second)
        for first, second in combinations(range(documents), 2)
        if any(band[first] == band[second] for band in bands)
        and min(sizes[first], sizes[second]) / max(sizes[first], sizes[second]) >= threshold
    ]
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert found.not_compared == 0


def test_equal_sets_meet_in_any_crowd():
    """Twins that share no band with each other alone: every bucket holds more than are compared."""
    kinds = np.arange(16 * FIRST_OF_BUCKET)
    bands = [np.tile(digit, 2).astype(np.uint64) for digit in (kinds % 8, kinds // 8 % 8, kinds // 64)]
    found = find_candidates(bands, np.ones(2 * len(kinds), np.int64), 0.5)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs >= {(kind, kind + len(kinds)) for kind in kinds.tolist()}


def test_in_a_crowded_bucket_each_is_compared_with_the_first():
    documents = 3 * FIRST_OF_BUCKET
    same, own = np.zeros(documents, np.uint64), np.arange(documents, dtype=np.uint64)
    found = find_candidates([same, own, same], np.ones(documents, np.int64), 0.5)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    expected = {pair for pair in combinations(range(documents), 2) if pair[0] < FIRST_OF_BUCKET}
    assert pairs == expected
    assert len(found.first) == len(expected)
    assert found.not_compared == 2 * (documents * (documents - 1) // 2 - len(expected))
