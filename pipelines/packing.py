"""How documents lie in rows of `seq_len + 1` tokens: as one stream, or each document in a row of its own if it fits.

A document is a run of at least two tokens of a shard's stream. What of it lies in one row is a piece. Both packings
make each token but a first one a target exactly once:

concatenate   Row i is the stream from i·seq_len to (i+1)·seq_len inclusive: neighbours share one token, the last
              target of one and the first input of the next. Every row but the last is full. Only the very first token
              of the stream is no target.
best_fit      A document of more than `seq_len + 1` tokens is cut into as many full pieces as it has, and a rest;
              consecutive pieces share one token, as the rows above do. Rests and shorter documents then share rows by
              best-fit decreasing: the longest first, each into the row with the least room that still holds it (Ding
              et al. 2024, "Fewer truncations improve language modeling", arXiv:2404.10830, §3). No piece's first token
              is a target. n pieces cost O(n log seq_len): rows of equal room are one entry of a sorted list.

Pure functions of the documents' lengths; what the tokens are plays no part.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipelines.data_config import Packing


@dataclass(frozen=True)
class Layout:
    """Where the pieces lie. Piece p is the stream's tokens `begins[p]` to `begins[p] + lengths[p]`, and lies in row
    `rows[p]` from column `columns[p]` on; pieces are sorted by row and column. All arrays are int64 `[pieces]`."""

    seq_len: int
    num_rows: int
    rows: np.ndarray
    columns: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    """The document of each piece; a document's pieces follow each other in row order."""
    samples: int
    """The first so many rows are those that training draws."""

    def row_lengths(self) -> np.ndarray:
        """Tokens in each row, `[num_rows]`; the rest of a row is padding, at its end."""
        return np.bincount(self.rows, self.lengths, self.num_rows).astype(np.int64)

    def offsets(self) -> np.ndarray:
        """Pieces before each row and before the end, `[num_rows + 1]`."""
        return np.searchsorted(self.rows, np.arange(self.num_rows + 1))

    def fill(self, stream: np.ndarray, padding: int) -> np.ndarray:
        """`[num_rows, seq_len + 1]`: the values of a stream of `[tokens]` where the layout puts them."""
        width = self.seq_len + 1
        filled = np.full(self.num_rows * width, padding, stream.dtype)
        places = (self.rows * width + self.columns, self.begins, self.lengths)
        for at, begin, length in zip(*(each.tolist() for each in places), strict=True):
            filled[at : at + length] = stream[begin : begin + length]
        return filled.reshape(self.num_rows, width)


def lay_out(packing: Packing, lengths: np.ndarray, seq_len: int) -> Layout:
    """The layout of documents of so many tokens each, one after the other in a stream.

    Raises ValueError for a document of fewer than two tokens, from which nothing can be learned."""
    if len(lengths) and int(lengths.min()) < 2:
        raise ValueError(f"document {int(lengths.argmin())} has {int(lengths.min())} tokens; give at least 2")
    return (concatenate if packing == "concatenate" else best_fit)(np.asarray(lengths, np.int64), seq_len)


def count_targets(packing: Packing, lengths: np.ndarray, learned: np.ndarray | None = None) -> int:
    """Tokens that are a target in some row: of all but the first ones, those that are `learned` (bool `[tokens]`)."""
    lengths = np.asarray(lengths, np.int64)
    firsts = (np.cumsum(lengths) - lengths)[: None if packing == "best_fit" else 1]
    if learned is None:
        return int(lengths.sum()) - len(firsts)
    return int(np.count_nonzero(learned)) - int(np.count_nonzero(learned[firsts]))


def concatenate(lengths: np.ndarray, seq_len: int) -> Layout:
    """Rows of the stream, one after the other; a document that begins with a row's last token has a piece in it."""
    ends = np.cumsum(lengths)
    starts, total = ends - lengths, int(lengths.sum())
    num_rows = -(-max(total - 1, 0) // seq_len)
    row_starts = np.arange(num_rows) * seq_len
    row_ends = np.minimum(row_starts + seq_len + 1, total)
    first = np.searchsorted(starts, row_starts, side="right") - 1
    last = np.searchsorted(starts, row_ends - 1, side="right") - 1
    rows, numbers = _ranges(first, last - first + 1)
    begins = np.maximum(starts[numbers], row_starts[rows])
    return Layout(
        seq_len=seq_len,
        num_rows=num_rows,
        rows=rows,
        columns=begins - row_starts[rows],
        begins=begins,
        lengths=np.minimum(ends[numbers], row_ends[rows]) - begins,
        numbers=numbers,
        samples=max(total - 1, 0) // seq_len,
    )


def best_fit(lengths: np.ndarray, seq_len: int) -> Layout:
    """Pieces in as few rows as best-fit decreasing finds. Rows are in the order of the last document in each."""
    starts = np.cumsum(lengths) - lengths
    full, rest = np.divmod(lengths - 1, seq_len)  # in targets: a piece of k tokens has k - 1 of them
    full_numbers, part = _ranges(np.zeros_like(full), full)
    rest_numbers = np.flatnonzero(rest)
    rest_rows, shared_rows = _best_fit_decreasing(rest[rest_numbers] + 1, seq_len + 1)
    # A shared row comes after the full rows of all its documents, and within a row documents are in order.
    latest = np.zeros(shared_rows, np.int64)
    np.maximum.at(latest, rest_rows, rest_numbers)
    order = np.lexsort((np.r_[part, full[latest]], np.r_[full_numbers, latest]))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    rows = np.r_[position[: len(full_numbers)], position[len(full_numbers) :][rest_rows]]
    numbers = np.r_[full_numbers, rest_numbers]
    piece_lengths = np.r_[np.full(len(full_numbers), seq_len + 1), rest[rest_numbers] + 1]
    begins = np.r_[starts[full_numbers] + part * seq_len, starts[rest_numbers] + full[rest_numbers] * seq_len]
    pieces = np.lexsort((numbers, rows))
    rows, piece_lengths = rows[pieces], piece_lengths[pieces]
    before = np.cumsum(piece_lengths) - piece_lengths
    row_starts = np.searchsorted(rows, np.arange(len(order)))
    return Layout(
        seq_len=seq_len,
        num_rows=len(order),
        rows=rows,
        columns=before - before[row_starts][rows],
        begins=begins[pieces],
        lengths=piece_lengths,
        numbers=numbers[pieces],
        samples=len(order),
    )


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each piece, `[pieces]`, and how many rows there are."""
    assigned = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    rooms: list[int] = []  # sorted: the rooms that some rows have left, and below each which rows those are
    with_room: dict[int, list[int]] = {}
    num_rows = 0
    pieces: Iterable[tuple[int, int]] = zip(order.tolist(), lengths[order].tolist(), strict=True)
    for piece, length in pieces:
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = num_rows, capacity
            num_rows += 1
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        assigned[piece] = row
        if left := room - length:
            if left not in with_room:
                rooms.insert(bisect_left(rooms, left), left)
                with_room[left] = []
            with_room[left].append(row)
    return assigned, num_rows


def _ranges(first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each i the numbers `first[i]`, `first[i] + 1`, ... of which there are `counts[i]`: each i, and the number."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts) + first[which]
