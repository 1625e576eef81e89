"""Groups, similarities and the greedy choice against brute force."""

from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines import similarity
from pipelines.similarity import Pairs, drop_similar, group_documents, jaccard

graphs = st.integers(1, 30).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 40), min_size=count, max_size=count),
        st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=40),
    )
)


@given(graphs, st.integers(20, 200))
def test_groups_are_bounded_and_hold_what_is_connected(graph, limit):
    sizes, pairs = graph
    first, second = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    groups = group_documents(first, second, np.array(sizes, np.int64), limit).tolist()
    for group in set(groups):
        members = [size for size, own in zip(sizes, groups, strict=True) if own == group]
        assert sum(members) <= 2 * limit + max(members)
    for component in components(len(sizes), pairs):
        if sum(sizes[node] for node in component) <= limit:
            assert len({groups[node] for node in component}) == 1


def components(count: int, pairs: list[tuple[int, int]]) -> list[set[int]]:
    found = [{node} for node in range(count)]
    for pair in pairs:
        touched = [each for each in found if each & set(pair)]
        found = [each for each in found if not each & set(pair)] + [set().union(*touched)]
    return found


hashes = st.sets(st.integers(0, 2**64 - 1) | st.integers(0, 9), min_size=1)


@given(hashes, st.lists(hashes, min_size=1, max_size=4))
def test_jaccard(one, others):
    arrays = [np.array(sorted(each), np.uint64) for each in (one, *others)]
    found = jaccard(arrays[0], arrays[1:]).tolist()
    assert found == [len(one & other) / len(one | other) for other in others]


@given(st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.sampled_from([0.8, 0.9, 1.0])))
def test_a_document_goes_if_one_that_stays_is_before_it(similar):
    similar = {pair: similarity for pair, similarity in similar.items() if pair[0] < pair[1]}
    pairs = Pairs(
        np.array([first for first, _ in similar], np.int64),
        np.array([second for _, second in similar], np.int64),
        np.array(list(similar.values())),
    )
    dropped: dict[int, tuple[int, float]] = {}
    for second in range(10):
        stay = {first: s for (first, other), s in similar.items() if other == second and first not in dropped}
        if stay:
            dropped[second] = max(stay.items(), key=lambda item: (item[1], -item[0]))
    with patch.object(similarity, "_PAIRS", 3):
        found = drop_similar(pairs)
    assert list(zip(found.second.tolist(), found.first.tolist(), found.similarity.tolist(), strict=True)) == [
        (second, first, similarity) for second, (first, similarity) in dropped.items()
    ]
