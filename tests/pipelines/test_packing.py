from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.packing import best_fit, concatenate, count_targets, lay_out

LENGTHS = st.lists(st.integers(2, 40), max_size=30)
SEQ_LENS = st.integers(1, 12)
PACKINGS = ("concatenate", "best_fit")


def stream_of(lengths):
    """Every token is its own place in the stream, from 1 on; 0 is padding."""
    return np.arange(1, sum(lengths) + 1)


def documents_of(layout, rows):
    """The documents as a reader puts them together again: by number, pieces in row order, shared tokens once."""
    found: dict[int, list[int]] = {}
    offsets, row_lengths = layout.offsets(), layout.row_lengths()
    for row in range(layout.num_rows):
        columns = layout.columns[offsets[row] : offsets[row + 1]].tolist()
        assert columns[0] == 0 and columns == sorted(set(columns))
        assert not rows[row, row_lengths[row] :].any() and rows[row, : row_lengths[row]].all()
        ends = [*columns[1:], int(row_lengths[row])]
        for number, begin, end in zip(layout.numbers[offsets[row] :], columns, ends, strict=False):
            piece = rows[row, begin:end].tolist()
            whole = found.setdefault(int(number), [])
            assert not whole or whole[-1] == piece[0]
            whole += piece[1:] if whole else piece
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("packing", PACKINGS)
@given(LENGTHS, SEQ_LENS)
def test_the_documents_come_back_whole(packing, lengths, seq_len):
    layout = lay_out(packing, np.array(lengths, int), seq_len)
    rows = layout.fill(stream_of(lengths), 0)
    assert rows.shape == (layout.num_rows, seq_len + 1)
    ends = np.cumsum(lengths, dtype=int)
    assert documents_of(layout, rows) == [
        list(range(end - length + 1, end + 1)) for end, length in zip(ends.tolist(), lengths, strict=True)
    ]


@pytest.mark.parametrize("packing", PACKINGS)
@given(LENGTHS, SEQ_LENS, st.integers(0, 1 << 32))
def test_each_token_but_a_first_one_is_a_target_once(packing, lengths, seq_len, seed):
    layout = lay_out(packing, np.array(lengths, int), seq_len)
    rows = layout.fill(stream_of(lengths), 0)
    targets: Counter[int] = Counter()
    offsets = layout.offsets()
    for row in range(layout.num_rows):
        starts = set(layout.columns[offsets[row] : offsets[row + 1]].tolist()) if packing == "best_fit" else set()
        targets.update(int(rows[row, t]) for t in range(1, layout.row_lengths()[row]) if t not in starts)
    firsts = {1 + sum(lengths[:number]) for number in range(len(lengths) if packing == "best_fit" else 1)}
    assert targets == Counter(set(range(1, sum(lengths) + 1)) - firsts)
    assert count_targets(packing, np.array(lengths, int)) == targets.total() or not lengths
    learned = np.random.default_rng(seed).random(sum(lengths)) < 0.5
    expected = sum(bool(learned[token - 1]) for token in targets)
    assert not lengths or count_targets(packing, np.array(lengths, int), learned) == expected


@given(LENGTHS.filter(bool), SEQ_LENS)
def test_concatenated_rows_are_windows_of_the_stream(lengths, seq_len):
    layout = concatenate(np.array(lengths), seq_len)
    stream = stream_of(lengths).tolist()
    windows = [stream[begin : begin + seq_len + 1] for begin in range(0, len(stream) - 1, seq_len)]
    padded = [window + [0] * (seq_len + 1 - len(window)) for window in windows]
    assert layout.fill(stream_of(lengths), 0).tolist() == padded
    assert layout.samples == sum(len(window) == seq_len + 1 for window in windows)


@given(LENGTHS, SEQ_LENS)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, seq_len):
    layout = best_fit(np.array(lengths, int), seq_len)
    pieces = Counter(layout.numbers.tolist())
    for number, length in enumerate(lengths):
        assert pieces[number] == (1 if length <= seq_len + 1 else -(-(length - 1) // seq_len))
    assert layout.lengths.min(initial=2) >= 2 and layout.samples == layout.num_rows


def fewest_rows(lengths, capacity):
    """By trying everything."""

    @cache
    def fewest(rest, rooms):
        if not rest:
            return len(rooms)
        length, *others = rest
        choices = [fewest(tuple(others), tuple(sorted((*rooms, capacity - length))))]
        for index, room in enumerate(rooms):
            if room >= length:
                left = tuple(sorted((*rooms[:index], room - length, *rooms[index + 1 :])))
                choices.append(fewest(tuple(others), left))
        return min(choices)

    return fewest(tuple(sorted(lengths, reverse=True)), ())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 13), min_size=1, max_size=7), st.just(12))
def test_best_fit_keeps_to_its_bound(lengths, seq_len):
    """Dósa 2007 for decreasing orders: at most 11/9 of the fewest, and 6/9 of a row."""
    assert best_fit(np.array(lengths), seq_len).num_rows <= (11 * fewest_rows(lengths, seq_len + 1) + 6) // 9


def naive_best_fit_decreasing(lengths, capacity):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def test_rows_have_the_room_that_best_fit_decreasing_leaves():
    lengths = np.clip(np.random.default_rng(0).lognormal(3, 1, 2000).astype(int), 2, 65)
    layout = best_fit(lengths, 64)
    assert sorted((65 - layout.row_lengths()).tolist()) == naive_best_fit_decreasing(lengths.tolist(), 65)
    assert lengths.sum() / (layout.num_rows * 65) > 0.98


def test_rows_follow_the_documents():
    """So that the first rows are of the first documents, whatever their lengths."""
    layout = best_fit(np.array([9, 3, 5, 2, 5, 3, 2]), 4)
    latest = [int(layout.numbers[layout.rows == row].max()) for row in range(layout.num_rows)]
    assert latest == sorted(latest)


def test_a_document_without_a_target_is_refused():
    with pytest.raises(ValueError, match="document 1 has 1 tokens; give at least 2"):
        lay_out("best_fit", np.array([2, 1]), 4)
