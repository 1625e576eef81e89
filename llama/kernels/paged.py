"""Attention over the paged cache on a GPU (Triton): flash-decoding and chunked prefill, read through block tables.

Legend: T tokens of a step, H query heads, G key/value heads, R = H/G query heads that share one, D head dimension, P
cache slots, N sequences, W blocks of the longest; I items, C tiles in several parts, J these parts.

A tile is some neighbouring queries of one sequence with the R heads that share a key/value head, so that a key is read
once for all of them: row m of a tile is query m // R, head m % R. Softmax is online (FlashAttention, arXiv:2205.14135),
in fp32, in powers of 2. Few queries fill no GPU, so a tile's keys may be dealt out to several programs, each an item,
whose results are merged (Flash-Decoding, Dao et al. 2023). Sequences of few queries go in small tiles, the others in
large ones: a step is at most two launches, and a merge after each that needs it.

The host makes the lists of items from numbers that it has, once a step for each window, and never waits for the GPU.

`llama.engine.attention` asks `available` first, and computes the same in plain torch where this is False. What has been
measured is correctness, in Triton's interpreter on a CPU (tests/llama/kernels/test_paged.py), and that the kernels
compile for sm_80 and sm_90. No speed has been: the sizes of tiles and parts are reasoned, not tuned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama.upload import upload

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without
    triton = None

_ROWS = 16
"""Of a small tile: what a tensor core takes at least."""
_LARGE_ROWS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
_KEY_TILE_BYTES = {torch.float32: 8192, torch.bfloat16: 16384, torch.float16: 16384}
"""Of the keys read at once, and of the values. fp32 is multiplied without tensor cores: more of it spills registers."""
_MIN_PART = 4
"""Key tiles in a part, so that merging costs little beside reading."""


def available(q_THD: Tensor) -> bool:
    """Whether the kernels take these queries and a cache of their type; they compute no gradient."""
    return (
        triton is not None
        and q_THD.is_cuda
        and q_THD.dtype in _LARGE_ROWS
        and q_THD.shape[-1] <= 256
        and not torch.is_grad_enabled()
        and torch.cuda.get_device_capability(q_THD.device) >= (8, 0)
    )


def programs_to_fill(device: torch.device) -> int:
    """Two for each of the GPU's processors: one reads while the other computes."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _Tiles:
    """One launch."""

    rows: int
    items_I5: Tensor
    """Sequence, first query within its span, first and last + 1 key, and the part that it writes; -1: the output."""
    merges_C4: Tensor
    """Sequence and first query of a tile, the first and the number of its parts."""
    num_parts: int


class StepTables:
    """What the kernels read of a step beside tensors, uploaded once for all layers.

    Args:
        tables_NW: int32, each sequence's blocks; entries for positions that it does not see are not read.
        spans_N3: int32, each sequence's first row of T, and its first and last + 1 position of the step.
    """

    def __init__(self, tables_NW: np.ndarray, spans_N3: np.ndarray, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.tables_NW = upload(torch.from_numpy(tables_NW), device)
        self.spans_N3 = upload(torch.from_numpy(spans_N3), device)
        self._host_spans_N3 = spans_N3.astype(np.int64)
        self._device = device
        self._tiles: dict[tuple[int | None, int, int, int, int], tuple[_Tiles, ...]] = {}

    def tiles(self, window: int | None, groups: int, shared: int, large_rows: int, key_tile: int) -> tuple[_Tiles, ...]:
        """The launches of a layer with G `groups`, R = `shared`, that reads `key_tile` keys at once."""
        key = (window, groups, shared, large_rows, key_tile)
        if key not in self._tiles:
            queries_N = self._host_spans_N3[:, 2] - self._host_spans_N3[:, 1]
            small_N = queries_N * shared <= max(_ROWS, shared)
            self._tiles[key] = tuple(
                self._plan(sequences, max(rows, triton.next_power_of_2(shared)), window, groups, shared, key_tile)
                for rows, sequences in ((_ROWS, np.flatnonzero(small_N)), (large_rows, np.flatnonzero(~small_N)))
                if len(sequences)
            )
        return self._tiles[key]

    def _plan(
        self, sequences: np.ndarray, rows: int, window: int | None, groups: int, shared: int, key_tile: int
    ) -> _Tiles:
        """The tiles of these sequences, and parts of them that are about equally long and fill the GPU."""
        tile_queries = rows // shared
        _, start, end = self._host_spans_N3[sequences].T
        per_sequence = -(-(end - start) // tile_queries)
        of = np.repeat(np.arange(len(sequences)), per_sequence)
        query = _count_each(per_sequence) * tile_queries
        key_end = np.minimum(start[of] + query + tile_queries, end[of])
        key_begin = np.zeros_like(key_end) if window is None else np.maximum(start[of] + query - window + 1, 0)
        keys = key_end - key_begin

        longest = max(-(-int(keys.sum()) * groups // (programs_to_fill(self._device) * key_tile)), _MIN_PART) * key_tile
        parts = -(-keys // longest)
        length = -(-keys // (parts * key_tile)) * key_tile
        tile = np.repeat(np.arange(len(of)), parts)
        part_begin = key_begin[tile] + _count_each(parts) * length[tile]
        split = parts > 1
        place = np.where(split[tile], np.cumsum(split[tile]) - 1, -1)
        items = (
            sequences[of[tile]],
            query[tile],
            part_begin,
            np.minimum(part_begin + length[tile], key_end[tile]),
            place,
        )
        parts = parts[split]
        merges = (sequences[of[split]], query[split], np.cumsum(parts) - parts, parts)
        return _Tiles(rows, self._upload(items), self._upload(merges), int(parts.sum()))

    def _upload(self, columns: tuple[np.ndarray, ...]) -> Tensor:
        return upload(torch.from_numpy(np.stack(columns, axis=1).astype(np.int32)), self._device)


def _count_each(counts: np.ndarray) -> np.ndarray:
    """`[2, 3]` → `[0, 1, 0, 1, 2]`."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def attend(
    q_THD: Tensor,
    keys_PGD: Tensor,
    values_PGD: Tensor,
    step: StepTables,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Each query over its sequence's keys up to its own position, which are in the cache already: `[T, H, D]`."""
    _, heads, dim = q_THD.shape
    groups = keys_PGD.shape[1]
    shared = heads // groups
    padded = max(16, triton.next_power_of_2(dim))
    key_tile = min(max(_KEY_TILE_BYTES[q_THD.dtype] // (padded * q_THD.element_size()), 16), 64)
    if q_THD.stride(-1) != 1:
        q_THD = q_THD.contiguous()
    out_THD = q_THD.new_empty(q_THD.shape)
    with torch.cuda.device_of(q_THD):  # Triton launches on the current one
        for tiles in step.tiles(window, groups, shared, _LARGE_ROWS[q_THD.dtype], key_tile):
            partial_JGMD = q_THD.new_empty((tiles.num_parts, groups, tiles.rows, padded), dtype=torch.float32)
            sums_JGM2 = q_THD.new_empty((tiles.num_parts, groups, tiles.rows, 2), dtype=torch.float32)
            _attend[len(tiles.items_I5), groups](
                q_THD,
                keys_PGD,
                values_PGD,
                out_THD,
                step.tables_NW,
                step.spans_N3,
                tiles.items_I5,
                partial_JGMD,
                sums_JGM2,
                step.tables_NW.shape[1],
                *q_THD.stride()[:2],
                scale,
                softcap or 0.0,
                window or 0,
                step.block_size,
                groups,
                shared,
                dim,
                padded,
                tiles.rows,
                key_tile,
                num_warps=8 if tiles.rows * padded * q_THD.element_size() > 8192 else 4,
                num_stages=2,
            )
            if len(tiles.merges_C4):
                _merge[len(tiles.merges_C4), tiles.rows, groups](
                    partial_JGMD,
                    sums_JGM2,
                    out_THD,
                    step.spans_N3,
                    tiles.merges_C4,
                    groups,
                    shared,
                    dim,
                    padded,
                    tiles.rows,
                    num_warps=1,
                )
    return out_THD


if triton is not None:
    # The width of the tables differs from step to step: no compiled variants for it.
    @triton.jit(do_not_specialize=["width"])
    def _attend(
        q,
        keys,
        values,
        out,
        tables,
        spans,
        items,
        partial,
        sums,
        width,
        token_stride,
        head_stride,
        scale,
        softcap: tl.constexpr,
        window: tl.constexpr,
        block_size: tl.constexpr,
        groups: tl.constexpr,
        shared: tl.constexpr,
        dim: tl.constexpr,
        padded: tl.constexpr,
        rows: tl.constexpr,
        key_tile: tl.constexpr,
    ):
        item = items + tl.program_id(0) * 5
        group = tl.program_id(1)
        sequence = tl.load(item)
        first_query = tl.load(item + 1)
        key_begin = tl.load(item + 2)
        key_end = tl.load(item + 3)
        part = tl.load(item + 4)
        token = tl.load(spans + sequence * 3)
        start = tl.load(spans + sequence * 3 + 1)
        end = tl.load(spans + sequence * 3 + 2)
        table = tables + sequence.to(tl.int64) * width

        row = tl.arange(0, rows)
        query = first_query + row // shared
        head = group * shared + row % shared
        position = start + query
        # Rows are left over where R does not divide them.
        alive = (row < rows // shared * shared) & (position < end)
        column = tl.arange(0, padded)
        inside = column < dim
        queries = tl.load(
            q + ((token + query).to(tl.int64) * token_stride + head * head_stride)[:, None] + column[None, :],
            mask=alive[:, None] & inside[None, :],
            other=0.0,
        )
        highest = tl.full((rows,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((rows,), dtype=tl.float32)
        result = tl.zeros((rows, padded), dtype=tl.float32)
        for begin in range(key_begin, key_end, key_tile):
            key = begin + tl.arange(0, key_tile)
            own = key < key_end
            # What lies beyond may be another sequence's, even NaN, or no block: it is not read.
            slot = tl.load(table + key // block_size, mask=own, other=0).to(tl.int64) * block_size + key % block_size
            place = (slot * groups + group) * dim
            k = tl.load(keys + place[None, :] + column[:, None], mask=own[None, :] & inside[:, None], other=0.0)
            scores = tl.dot(queries, k, input_precision="ieee") * scale
            if softcap != 0:
                # tanh(x) = 1 − 2 / (exp(2x) + 1); an exponent that overflows gives 1.
                scores = softcap * (1 - 2 / (tl.exp(scores * (2 / softcap)) + 1))
            visible = own[None, :] & (key[None, :] <= position[:, None])
            if window != 0:
                visible = visible & (key[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores * 1.4426950408889634, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            # A row may see nothing yet: −inf minus itself is NaN.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            decay = tl.exp2(highest - base)
            total = total * decay + tl.sum(weights, axis=1)
            v = tl.load(values + place[:, None] + column[None, :], mask=own[:, None] & inside[None, :], other=0.0)
            result = tl.dot(weights.to(v.dtype), v, acc=result * decay[:, None], input_precision="ieee")
            highest = higher

        if part < 0:
            tl.store(
                out + (((token + query).to(tl.int64) * groups * shared + head) * dim)[:, None] + column[None, :],
                (result / total[:, None]).to(out.dtype.element_ty),
                mask=alive[:, None] & inside[None, :],
            )
        else:
            partial_row = (part.to(tl.int64) * groups + group) * rows + row
            tl.store(partial + partial_row[:, None] * padded + column[None, :], result, mask=alive[:, None])
            tl.store(sums + partial_row * 2, highest, mask=alive)
            tl.store(sums + partial_row * 2 + 1, total, mask=alive)

    @triton.jit
    def _merge(
        partial,
        sums,
        out,
        spans,
        merges,
        groups: tl.constexpr,
        shared: tl.constexpr,
        dim: tl.constexpr,
        padded: tl.constexpr,
        rows: tl.constexpr,
    ):
        """One row of a tile: Σ 2^(highest − max) · result / Σ 2^(highest − max) · total, over its parts."""
        merge = merges + tl.program_id(0) * 4
        row = tl.program_id(1)
        group = tl.program_id(2)
        sequence = tl.load(merge)
        query = tl.load(merge + 1) + row // shared
        count = tl.load(merge + 3)
        token = tl.load(spans + sequence * 3) + query
        position = tl.load(spans + sequence * 3 + 1) + query
        if (row < rows // shared * shared) & (position < tl.load(spans + sequence * 3 + 2)):
            column = tl.arange(0, padded)
            place = (tl.load(merge + 2).to(tl.int64) * groups + group) * rows + row
            highest = float("-inf")
            total = 0.0
            result = tl.zeros((padded,), dtype=tl.float32)
            for _ in range(count):
                part_highest = tl.load(sums + place * 2)
                higher = tl.maximum(highest, part_highest)
                # Never −inf: a part has more keys than a tile has queries, which all see some of the first part.
                decay = tl.exp2(highest - higher)
                weight = tl.exp2(part_highest - higher)
                total = total * decay + tl.load(sums + place * 2 + 1) * weight
                result = result * decay + tl.load(partial + place * padded + column) * weight
                highest = higher
                place += groups * rows
            out_row = (token.to(tl.int64) * groups + group) * shared + row % shared
            tl.store(out + out_row * dim + column, (result / total).to(out.dtype.element_ty), mask=column < dim)
