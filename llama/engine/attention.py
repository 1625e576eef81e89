"""The paged key/value cache and the attention that reads it.

Legend: B = 1, T tokens of a step, H query heads, G key/value heads, R = H/G query heads sharing one, D head dimension,
N sequences of a group, L query tokens of each, S key positions (padded to the longest of the group).

A step's tokens are flat: one row, all requests behind one another. Token position p of a request lives in slot
`block_table[p // block_size] * block_size + p % block_size`. The plan of a step is made once and used by every layer.

Two shapes of work. Decoding sequences have one query each: they are gathered side by side, padded, and the R query
heads that share a key/value head become rows of one query matrix, which reads every key once. A prefill chunk is on
its own (N = 1), and its R heads share the keys by a stride-0 expand, so that the mask exists once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llama.config import ModelConfig


class PagedKVCache:
    """Keys and values of every layer: `[num_layers, num_blocks * block_size, G, D]` each."""

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, num_blocks * block_size, config.kv_heads, config.resolved_head_dim)
        self.block_size = block_size
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class SequenceSpan:
    """A request's part of a step: tokens `[start, end)`, in the cache blocks `block_ids`."""

    block_ids: Sequence[int]
    start: int
    end: int


@dataclass(frozen=True)
class _Group:
    """Sequences that are attended in one call."""

    rows_T: Tensor
    """`[N * L]`: their tokens' places in the step."""
    slots_NS: Tensor
    """Padding repeats the sequence's own last slot: no other request's values, not even a NaN, can leak in."""
    mask_NLS: Tensor | None
    """True where a query sees a key; None when every one does."""


@dataclass(frozen=True)
class AttentionPlan:
    """Where a step's keys and values go, and who reads what."""

    slots_T: Tensor
    decode_groups: tuple[_Group, ...]
    prefill_groups: tuple[_Group, ...]


def plan_attention(spans: Sequence[SequenceSpan], block_size: int, device: torch.device) -> AttentionPlan:
    """The plan of a step whose flat tokens are those of `spans`, one after the other."""
    slots_T = torch.empty(sum(span.end - span.start for span in spans), dtype=torch.int64)
    # Decodes of similar length go together: padding at most doubles what is read.
    decodes: dict[int, tuple[list[int], list[SequenceSpan]]] = defaultdict(lambda: ([], []))
    prefill_groups: list[_Group] = []
    row = 0
    for span in spans:
        length = span.end - span.start
        if length == 1:
            rows, members = decodes[span.end.bit_length()]
            rows.append(row)
            members.append(span)
        else:
            slots_NS, _ = _slots([span], block_size)
            slots_T[row : row + length] = slots_NS[0, span.start :]
            positions_S = torch.arange(span.end)
            mask_LS = positions_S[None, :] <= positions_S[span.start :, None]
            rows_T = torch.arange(row, row + length)
            prefill_groups.append(_Group(rows_T.to(device), slots_NS.to(device), mask_LS[None].to(device)))
        row += length
    decode_groups: list[_Group] = []
    for rows, members in decodes.values():
        slots_NS, seen_NS = _slots(members, block_size)
        rows_T = torch.tensor(rows)
        slots_T[rows_T] = slots_NS[:, -1]
        mask_NLS = None if seen_NS.all() else seen_NS[:, None].to(device)
        decode_groups.append(_Group(rows_T.to(device), slots_NS.to(device), mask_NLS))
    return AttentionPlan(slots_T.to(device), tuple(decode_groups), tuple(prefill_groups))


def _slots(spans: Sequence[SequenceSpan], block_size: int) -> tuple[Tensor, Tensor]:
    """Slots of the positions up to each span's end, `[N, S]`, and whether the position is one (not padding)."""
    ends_N1 = torch.tensor([[span.end] for span in spans])
    positions_S = torch.arange(int(ends_N1.max()))
    width = -(-len(positions_S) // block_size)
    # Blocks reserved for later chunks are of no use yet.
    tables = [list(span.block_ids[:width]) for span in spans]
    tables_NW = torch.tensor([table + [0] * (width - len(table)) for table in tables])
    own_NS = positions_S.minimum(ends_N1 - 1)
    slots_NS = tables_NW.gather(1, own_NS // block_size) * block_size + own_NS % block_size
    return slots_NS, positions_S < ends_N1


class PagedAttend:
    """The `Attend` (llama/attention.py) of one step: stores its keys and values, reads through the block tables."""

    def __init__(self, cache: PagedKVCache, plan: AttentionPlan) -> None:
        self._cache = cache
        self._plan = plan

    def __call__(self, layer: int, q_BLHD: Tensor, k_BLGD: Tensor, v_BLGD: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._plan.slots_T, k_BLGD[0])
        values.index_copy_(0, self._plan.slots_T, v_BLGD[0])
        q_THD = q_BLHD[0]
        out_THD = torch.empty_like(q_THD)
        for group in self._plan.decode_groups:
            out_THD[group.rows_T] = _attend_decodes(q_THD[group.rows_T], keys, values, group)
        for group in self._plan.prefill_groups:
            out_THD[group.rows_T] = _attend_prefill(q_THD[group.rows_T], keys, values, group)
        return out_THD[None]


def _gather(cache_PGD: Tensor, slots_NS: Tensor) -> Tensor:
    """`[N, G, S, D]` of the cache's slots."""
    gathered = cache_PGD.flatten(1).index_select(0, slots_NS.flatten())
    return gathered.view(*slots_NS.shape, *cache_PGD.shape[1:]).transpose(1, 2)


def _attend_decodes(q_NHD: Tensor, keys_PGD: Tensor, values_PGD: Tensor, group: _Group) -> Tensor:
    """`[N, H, D]`: head h reads key/value head h // R, so the R heads of one are neighbours."""
    k_NGSD, v_NGSD = _gather(keys_PGD, group.slots_NS), _gather(values_PGD, group.slots_NS)
    q_NGRD = q_NHD.unflatten(1, (k_NGSD.shape[1], -1))
    mask_N11S = None if group.mask_NLS is None else group.mask_NLS[:, None]
    return scaled_dot_product_attention(q_NGRD, k_NGSD, v_NGSD, attn_mask=mask_N11S).flatten(1, 2)


def _attend_prefill(q_LHD: Tensor, keys_PGD: Tensor, values_PGD: Tensor, group: _Group) -> Tensor:
    """`[L, H, D]`; the key/value heads stand in the batch place."""
    k_GSD, v_GSD = _gather(keys_PGD, group.slots_NS)[0], _gather(values_PGD, group.slots_NS)[0]
    q_GRLD = q_LHD.unflatten(1, (k_GSD.shape[0], -1)).permute(1, 2, 0, 3)
    k_GRSD, v_GRSD = (x_GSD[:, None].expand(-1, q_GRLD.shape[1], -1, -1) for x_GSD in (k_GSD, v_GSD))
    mask_11LS = None if group.mask_NLS is None else group.mask_NLS[None]
    out_GRLD = scaled_dot_product_attention(q_GRLD, k_GRSD, v_GRSD, attn_mask=mask_11LS)
    return out_GRLD.permute(2, 0, 1, 3).flatten(1, 2)
