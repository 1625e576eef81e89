"""What a loader hands to a training step or an evaluation: tokens, what is to be predicted, and where documents lie.

Legend: B batch, L sequence, S source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama.attention import Attend, CausalAttend, document_positions
from llama.config import ModelConfig
from llama.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from llama.model import LanguageModel
    from llama.moe import RoutingRecord


@dataclass(frozen=True)
class Batch:
    """Sequences `[B, L]`, int64."""

    inputs: Tensor
    """Token ids, all of them in the vocabulary."""
    labels: Tensor
    """The token to predict at each position, `IGNORE_INDEX` where none is."""
    documents: Tensor | None = None
    """Rows that are packed with several documents: an id for each position, equal ids side by side. Attention and
    positions begin anew at each document. None: a row is one."""
    lengths: Tensor | None = None
    """`[B]` int64: positions of each row before the padding at its end, which is computed and counts nowhere. None:
    there is no padding."""

    source: Tensor | None = None
    """For an encoder–decoder, whose targets the inputs are: token ids `[B, S]`."""
    source_lengths: Tensor | None = None
    """`[B]` int64: tokens of each source before its padding. None: there is none."""

    def to(self, device: torch.device | str) -> Batch:
        optional = (self.documents, self.lengths, self.source, self.source_lengths)
        return Batch(
            self.inputs.to(device),
            self.labels.to(device),
            *(None if each is None else each.to(device) for each in optional),
        )

    def num_targets(self) -> Tensor:
        """How many labels count: a scalar, int64."""
        return (self.labels != IGNORE_INDEX).sum()

    def num_tokens(self) -> Tensor:
        """How many positions are no padding, those of sources aside: a scalar, int64."""
        if self.lengths is not None:
            return self.lengths.sum()
        return self.labels.new_full((), self.labels.numel())

    def counted(self) -> Tensor | None:
        """`[B, L]` bool: which positions are no padding; None if none of them is."""
        if self.lengths is None:
            return None
        return torch.arange(self.inputs.shape[1], device=self.inputs.device) < self.lengths[:, None]


def loss_sum(
    model: LanguageModel,
    batch: Batch,
    attend: Callable[[Tensor | None], Attend] = CausalAttend,
    routing: RoutingRecord | None = None,
) -> Tensor:
    """The sum of −log p(label) in nats over the labels that count.

    Args:
        attend: makes the attention for the batch's documents.
        routing: see `Transformer.forward`.

    Raises:
        ValueError: the batch has documents, and the model cannot keep them apart.
    """
    if batch.source is not None:
        return model(
            batch.source,
            batch.inputs,
            source_lengths=batch.source_lengths,
            attend=attend(batch.documents),
            labels=batch.labels,
        )
    positions = None
    if batch.documents is not None:
        check_packable(model.config, batch.inputs.shape[1])
        positions = document_positions(batch.documents)
    return model(
        batch.inputs, positions=positions, attend=attend(batch.documents), routing=routing, labels=batch.labels
    )


def check_packable(model: ModelConfig, seq_len: int) -> None:
    """Whether a document in a packed row of `seq_len` tokens is computed as if it were alone.

    Raises:
        ValueError: the frequencies depend on a sequence's length, and a row has one set of them.
    """
    scaling = model.rope_scaling
    if scaling is None or scaling.kind != "dynamic_ntk" or seq_len <= (scaling.original_max_seq_len or 0):
        return
    raise ValueError(
        f"model.rope_scaling.kind=dynamic_ntk stretches beyond {scaling.original_max_seq_len} tokens by the length of "
        f"the sequence, and documents packed into one of {seq_len} have lengths of their own; set "
        f"data.packing=concatenate, train.seq_len={scaling.original_max_seq_len} or another kind"
    )
