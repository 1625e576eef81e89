"""The paged key/value cache and the attention that reads it.

Legend: B = 1, T tokens of a step, H query heads, G key/value heads, R = H/G query heads sharing one, D head dimension,
N sequences of a group, L query tokens of each, S key positions (padded to the longest of the group).

A step's tokens are flat: one row, all requests behind one another. Token position p of a request lives in slot
`block_table[p // block_size] * block_size + p % block_size`. The plan of a step is made once and used by every layer;
layers of different sliding windows read different keys, so it lists what to read for each window.

Two shapes of work. Decoding sequences have one query each: they are gathered side by side, padded, and the R query
heads that share a key/value head become rows of one query matrix, which reads every key once. A prefill chunk is on
its own (N = 1), and its R heads share the keys by a stride-0 expand, so that the mask exists once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from llama.attention import ScoreBias, Scoring, attend_visible, visible_keys
from llama.config import ModelConfig
from llama.kernels import cpu, huge_pages, paged
from llama.upload import upload


class PagedKVCache:
    """Keys and values of every layer: `[num_layers, num_blocks * block_size, G, D]` each."""

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, num_blocks * block_size, config.kv_heads, config.resolved_head_dim)
        self.block_size = block_size
        self.keys = huge_pages.zeros(shape, dtype, device)
        self.values = huge_pages.zeros(shape, dtype, device)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks `(source, destination)` in every layer; sources are read before any destination is written."""
        if not pairs:
            return
        source_P, destination_P = upload(torch.tensor(pairs), self.keys.device).T
        for cache in (self.keys, self.values):
            blocks = cache.unflatten(1, (-1, self.block_size))
            blocks[:, destination_P] = blocks[:, source_P]


@dataclass(frozen=True)
class SequenceSpan:
    """A request's part of a step: tokens `[start, end)`, in the cache blocks `block_ids`."""

    block_ids: Sequence[int]
    start: int
    end: int

    def first_visible(self, window: int | None) -> int:
        """The first position that any of its tokens sees."""
        return 0 if window is None else max(0, self.start - window + 1)


@dataclass(frozen=True)
class _Group:
    """Sequences that are attended in one call, each from the first key that it sees."""

    rows_T: Tensor
    """`[N * L]`: their tokens' places in the step."""
    slots_NS: Tensor
    """Padding repeats the sequence's own last slot: no other request's values, not even a NaN, can leak in."""
    visible_NLS: Tensor | None
    """True where a query sees a key; None when every one does."""
    query_positions_NL: Tensor
    """Like the keys' on the host: only a bias reads them, once a step."""
    key_positions_NS: Tensor

    @property
    def decodes(self) -> bool:
        return self.query_positions_NL.shape[1] == 1


class AttentionPlan:
    """What every layer of a step reads and writes: `tables_NW` and `spans_N3` as the CPU's kernel takes them
    (llama/kernels/cpu.py), and for the GPU's and for plain torch what these need, made when first asked for.

    The block tables are copied: a request may lose its blocks while the step runs.
    """

    def __init__(self, spans: Sequence[SequenceSpan], block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self._device = device
        widths = [-(-span.end // block_size) for span in spans]
        self.tables_NW = np.full((len(spans), max(widths)), -1, dtype=np.int32)
        self.spans_N3 = np.empty((len(spans), 3), dtype=np.int32)
        row = 0
        for n, (span, width) in enumerate(zip(spans, widths, strict=True)):
            self.tables_NW[n, :width] = span.block_ids[:width]
            self.spans_N3[n] = row, span.start, span.end
            row += span.end - span.start
        self._groups: dict[int | None, tuple[_Group, ...]] = {}

    def groups(self, window: int | None) -> tuple[_Group, ...]:
        """Who reads what in the layers of a sliding window; None for those that see all keys."""
        if window is not None and window >= self.spans_N3[:, 2].max():
            window = None
        if window not in self._groups:
            spans = [
                SequenceSpan(table, start, end)
                for table, (_, start, end) in zip(self.tables_NW.tolist(), self.spans_N3.tolist(), strict=True)
            ]
            self._groups[window] = _plan_groups(spans, self.block_size, self._device, window)
        return self._groups[window]

    @cached_property
    def slots_T(self) -> Tensor:
        """Where the step's keys and values go."""
        row_N, start_N, end_N = self.spans_N3.T
        sequence_T = np.repeat(np.arange(len(row_N)), end_N - start_N)
        position_T = np.arange(len(sequence_T)) + (start_N - row_N)[sequence_T]
        blocks_T = self.tables_NW[sequence_T, position_T // self.block_size].astype(np.int64)
        return upload(torch.from_numpy(blocks_T * self.block_size + position_T % self.block_size), self._device)

    @cached_property
    def on_gpu(self) -> paged.StepTables:
        return paged.StepTables(self.tables_NW, self.spans_N3, self.block_size, self._device)


def _plan_groups(
    spans: Sequence[SequenceSpan], block_size: int, device: torch.device, window: int | None
) -> tuple[_Group, ...]:
    # Decodes that read about as many keys go together: padding at most doubles what is read.
    decodes: dict[int, tuple[list[int], list[SequenceSpan]]] = defaultdict(lambda: ([], []))
    prefills: list[_Group] = []
    row = 0
    for span in spans:
        length = span.end - span.start
        if length == 1:
            rows, members = decodes[(span.end - span.first_visible(window)).bit_length()]
            rows.append(row)
            members.append(span)
        else:
            rows_T = torch.arange(row, row + length)
            prefills.append(_plan_group(rows_T, [span], block_size, device, window))
        row += length
    groups = [
        _plan_group(torch.tensor(rows), members, block_size, device, window) for rows, members in decodes.values()
    ]
    return (*groups, *prefills)


def _plan_group(
    rows_T: Tensor, spans: list[SequenceSpan], block_size: int, device: torch.device, window: int | None
) -> _Group:
    """The group of `spans`, all of one length, whose tokens lie at `rows_T` of the step."""
    length = spans[0].end - spans[0].start
    firsts = [span.first_visible(window) for span in spans]
    firsts_N1, ends_N1 = torch.tensor([firsts, [span.end for span in spans]])[:, :, None]
    positions_NS = firsts_N1 + torch.arange(max(span.end - first for span, first in zip(spans, firsts, strict=True)))
    key_positions_NS = positions_NS.minimum(ends_N1 - 1)
    query_positions_NL = ends_N1 + torch.arange(-length, 0)
    visible_NLS: Tensor | None
    if length > 1:
        visible_NLS = visible_keys(query_positions_NL, key_positions_NS, window)
    else:
        # What is read of a decoding sequence starts at the first key it sees and ends with its query.
        visible_NLS = (positions_NS < ends_N1)[:, None]
        if visible_NLS.all():
            visible_NLS = None
    return _Group(
        upload(rows_T, device),
        upload(_slots(spans, firsts, key_positions_NS, block_size), device),
        None if visible_NLS is None else upload(visible_NLS, device),
        query_positions_NL,
        key_positions_NS,
    )


def _slots(spans: list[SequenceSpan], firsts: list[int], positions_NS: Tensor, block_size: int) -> Tensor:
    """The slots of `positions_NS`, of which row n's lie in `[firsts[n], spans[n].end)`."""
    # Blocks before the first key, and those reserved for later chunks, are of no use.
    first_blocks = [first // block_size for first in firsts]
    tables = [
        list(span.block_ids[first_block : -(-span.end // block_size)])
        for span, first_block in zip(spans, first_blocks, strict=True)
    ]
    width = max(map(len, tables))
    tables_NW = torch.tensor([table + [0] * (width - len(table)) for table in tables])
    index_NS = positions_NS // block_size - torch.tensor(first_blocks)[:, None]
    return tables_NW.gather(1, index_NS) * block_size + positions_NS % block_size


class PagedAttend:
    """The `Attend` (llama/attention.py) of one step: stores its keys and values, reads through the block tables."""

    def __init__(self, cache: PagedKVCache, plan: AttentionPlan) -> None:
        self._cache = cache
        self._plan = plan
        self._biases: dict[int | None, tuple[ScoreBias, list[Tensor]]] = {}
        """By window: the last bias asked for, and its values for each group; layers share them."""

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor, scoring: Scoring) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if scoring.bias is None and scoring.dropout == 0:
            native_THD = cpu.paged_attention(
                keys,
                values,
                q_BLHD[0],
                k_BLGD[0],
                v_BLGD[0],
                self._plan.tables_NW,
                self._plan.spans_N3,
                self._plan.block_size,
                scale=scoring.scale,
                softcap=scoring.softcap,
                window=scoring.window,
            )
            if native_THD is not None:
                return native_THD[None]
        keys.index_copy_(0, self._plan.slots_T, k_BLGD[0])
        values.index_copy_(0, self._plan.slots_T, v_BLGD[0])
        q_THD = q_BLHD[0]
        if scoring.bias is None and scoring.dropout == 0 and paged.available(q_THD):
            step, scale, softcap, window = self._plan.on_gpu, scoring.scale, scoring.softcap, scoring.window
            return paged.attend(q_THD, keys, values, step, scale=scale, softcap=softcap, window=window)[None]
        out_THD = torch.empty_like(q_THD)
        groups = self._plan.groups(scoring.window)
        for group, bias_NHLS in zip(groups, self._group_biases(groups, scoring), strict=True):
            attend = _attend_decodes if group.decodes else _attend_prefill
            out_THD[group.rows_T] = attend(q_THD[group.rows_T], keys, values, group, scoring, bias_NHLS)
        return out_THD[None]

    def _group_biases(self, groups: tuple[_Group, ...], scoring: Scoring) -> Sequence[Tensor | None]:
        """Each group's bias, -inf where a key is not visible; None without a bias."""
        bias = scoring.bias
        if bias is None:
            return [None] * len(groups)
        known = self._biases.get(scoring.window)
        if known is None or known[0] is not bias:
            known = (bias, [_masked_bias(bias, group) for group in groups])
            self._biases[scoring.window] = known
        return known[1]


def _masked_bias(bias: ScoreBias, group: _Group) -> Tensor:
    device = group.slots_NS.device
    bias_NHLS = bias(group.query_positions_NL.to(device), group.key_positions_NS.to(device))
    if group.visible_NLS is None:
        return bias_NHLS
    return bias_NHLS.masked_fill(~group.visible_NLS[:, None], -torch.inf)


def _gather(cache_PGD: Tensor, slots_NS: Tensor) -> Tensor:
    """`[N, G, S, D]` of the cache's slots."""
    gathered = cache_PGD.flatten(1).index_select(0, slots_NS.flatten())
    return gathered.view(*slots_NS.shape, *cache_PGD.shape[1:]).transpose(1, 2)


def _attend_decodes(
    q_NHD: Tensor, keys_PGD: Tensor, values_PGD: Tensor, group: _Group, scoring: Scoring, bias_NH1S: Tensor | None
) -> Tensor:
    """`[N, H, D]`: head h reads key/value head h // R, so the R heads of one are neighbours."""
    k_NGSD, v_NGSD = _gather(keys_PGD, group.slots_NS), _gather(values_PGD, group.slots_NS)
    q_NGRD = q_NHD.unflatten(1, (k_NGSD.shape[1], -1))
    visible_N11S = bias_NGRS = None
    if bias_NH1S is not None:
        bias_NGRS = bias_NH1S.squeeze(2).unflatten(1, q_NGRD.shape[1:3])
    elif group.visible_NLS is not None:
        visible_N11S = group.visible_NLS[:, None]
    return attend_visible(q_NGRD, k_NGSD, v_NGSD, visible_N11S, scoring, bias_NGRS).flatten(1, 2)


def _attend_prefill(
    q_LHD: Tensor, keys_PGD: Tensor, values_PGD: Tensor, group: _Group, scoring: Scoring, bias_1HLS: Tensor | None
) -> Tensor:
    """`[L, H, D]`; the key/value heads stand in the batch place."""
    k_GSD, v_GSD = _gather(keys_PGD, group.slots_NS)[0], _gather(values_PGD, group.slots_NS)[0]
    q_GRLD = q_LHD.unflatten(1, (k_GSD.shape[0], -1)).permute(1, 2, 0, 3)
    k_GRSD, v_GRSD = (x_GSD[:, None].expand(-1, q_GRLD.shape[1], -1, -1) for x_GSD in (k_GSD, v_GSD))
    visible_11LS = bias_GRLS = None
    if bias_1HLS is not None:
        bias_GRLS = bias_1HLS[0].unflatten(0, q_GRLD.shape[:2])
    elif group.visible_NLS is not None:
        visible_11LS = group.visible_NLS[None]
    out_GRLD = attend_visible(q_GRLD, k_GRSD, v_GRSD, visible_11LS, scoring, bias_GRLS)
    return out_GRLD.permute(2, 0, 1, 3).flatten(1, 2)
