import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.permutation import SampleOrder, permute


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 97, 255, 256, 257, 1000, 4095, 4097])
def test_permutation_is_a_bijection(size):
    image = permute(np.arange(size), size, 3, 5)
    assert sorted(image.tolist()) == list(range(size))


def test_permutation_depends_on_its_key_and_on_nothing_else():
    size = 1000
    keys = [(0, 0), (0, 1), (1, 0), (2, 7), (2, 7, 1), (2, 7, 0, 1)]
    images = [tuple(permute(np.arange(size), size, *key)) for key in keys]
    assert len(set(images)) == len(keys)
    one_by_one = [int(permute(np.array([index]), size, 2, 7)[0]) for index in range(size)]
    assert one_by_one == list(images[3])


def test_permutation_looks_random():
    size = 4096
    image = permute(np.arange(size), size, 1, 1)
    # Expected of a random permutation: correlation 0 +- 1/sqrt(size), one fixed point.
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 5 / size**0.5
    assert (image == np.arange(size)).sum() < 10
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 5 / size**0.5


def test_permutation_of_a_huge_range_needs_no_list():
    size = 10**12 + 7
    began = time.monotonic()
    image = permute(np.array([0, 1, size - 1]), size, 0, 0)
    assert len(set(image.tolist())) == 3 and all(0 <= number < size for number in image)
    assert time.monotonic() - began < 5


def places(order, samples):
    return list(zip(*(each.tolist() for each in order.locate(np.asarray(samples))), strict=True))


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(COUNTS, st.none() | st.integers(1, 14), st.integers(0, 2**31 - 1), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=150)
def test_each_epoch_has_every_row_once_in_windows_of_shards(counts, window, seed, random):
    order, size = SampleOrder(counts, seed, window), sum(counts)
    rows = Counter((shard, row) for shard, count in enumerate(counts) for row in range(count))
    found = places(order, range(3 * size))
    for epoch in range(3):
        assert Counter(found[epoch * size : (epoch + 1) * size]) == rows
    some = random.sample(range(3 * size), min(7, 3 * size))
    assert places(order, some) == [found[sample] for sample in some]
    # Windows, by what is found: so many shards after one another, all of their rows before the next window's.
    begin = 0
    while begin < 2 * size:
        shards, end = order.ahead(begin)
        here = {shard for shard, _ in found[begin:end]}
        after = {shard for shard, _ in found[end : order.ahead(end)[1]]}
        assert list(dict.fromkeys(shards)) == shards and set(shards) == here | after
        assert set(shards[: len(here)]) == here
        assert len(here) == min(window or len(counts), sum(map(bool, counts))) or end % size == 0
        assert end - begin == sum(counts[shard] for shard in here)
        assert all(order.ahead(sample) == (shards, end) for sample in (begin, end - 1))
        begin = end
    assert begin % size == 0


def test_without_a_window_it_is_the_permutation_of_all_rows():
    order = SampleOrder([3, 0, 5, 2], 11)
    starts = [(0, row) for row in range(3)] + [(2, row) for row in range(5)] + [(3, row) for row in range(2)]
    for epoch in (0, 4):
        expected = [starts[row] for row in permute(np.arange(10), 10, 11, epoch)]
        assert places(order, range(10 * epoch, 10 * epoch + 10)) == expected


def test_shards_and_rows_come_in_another_order_in_each_epoch_and_under_each_seed():
    counts = [20] * 12
    orders = [places(SampleOrder(counts, seed, 3), range(480)) for seed in (0, 1)]
    epochs = [tuple(found[begin : begin + 240]) for found in orders for begin in (0, 240)]
    assert len(set(epochs)) == 4
    assert len({tuple(dict.fromkeys(shard for shard, _ in epoch)) for epoch in epochs}) == 4
    assert [row for shard, row in epochs[0] if shard == 5] != [row for shard, row in epochs[1] if shard == 5]


def test_what_makes_no_order_is_refused():
    with pytest.raises(ValueError, match="shuffle_shards=0 must be at least 1"):
        SampleOrder([1], 0, 0)
    with pytest.raises(ValueError, match="no samples"):
        SampleOrder([0, 0], 0)
