"""A packed row is its documents, each alone: loss and gradients in float64."""

from dataclasses import replace

import pytest
import torch

from llama.attention import CausalAttend
from llama.config import ModelConfig, RopeScaling
from llama.losses import IGNORE_INDEX
from llama.model import Transformer
from llama.training.attention import BlockCausalAttend
from llama.training.batch import Batch, check_packable, loss_sum
from tests.llama.training.helpers import DENSE, MOE

LENGTHS = [[70, 1, 40, 19], [130], [3, 64, 63]]
"""Of the documents in each row; blocks of 64 queries end inside and at the end of documents."""
LONG = {"max_seq_len": 130}


def packed(vocab_size: int) -> Batch:
    """Every document's last label, and a few others, do not count."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(vocab_size, (3, 130), generator=generator)
    labels = torch.randint(vocab_size, (3, 130), generator=generator)
    labels[torch.rand(3, 130, generator=generator) < 0.2] = IGNORE_INDEX
    documents = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in LENGTHS])
    labels[:, :-1][documents[:, 1:] != documents[:, :-1]] = IGNORE_INDEX
    return Batch(inputs, labels, documents)


def alone(batch: Batch) -> list[Batch]:
    return [
        Batch(*(each[row : row + 1, begin : begin + length] for each in (batch.inputs, batch.labels)))
        for row, lengths in enumerate(LENGTHS)
        for begin, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False)
    ]


def loss_and_gradients(model: Transformer, batches: list[Batch], attend=CausalAttend):
    model.zero_grad()
    total = sum(loss_sum(model, batch, attend) for batch in batches)
    total.backward()
    return total.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attend", [BlockCausalAttend, CausalAttend])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(replace(DENSE, **LONG), id="rope"),
        pytest.param(replace(MOE, **LONG), id="moe"),
        pytest.param(replace(DENSE, position="learned", **LONG), id="learned"),
        pytest.param(replace(DENSE, position="sinusoidal", **LONG), id="sinusoidal"),
        pytest.param(replace(DENSE, position="alibi", **LONG), id="alibi"),
        pytest.param(replace(MOE, position="t5", **LONG), id="t5-moe"),
        pytest.param(replace(DENSE, sliding_window=20, num_kv_heads=2, **LONG), id="window"),
    ],
)
def test_a_packed_row_is_its_documents_each_alone(config: ModelConfig, attend):
    model = Transformer(config)
    model.init_weights(0)
    model.double()
    batch = packed(config.vocab_size)
    loss, gradients = loss_and_gradients(model, [batch], attend)
    expected, expected_gradients = loss_and_gradients(model, alone(batch))
    assert loss == pytest.approx(expected, rel=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-11, msg=name)
    together = loss_and_gradients(model, [replace(batch, documents=None)], attend)[0]
    assert abs(together - expected) > 1e-7 * expected


def test_a_batch_moves_and_counts_its_targets():
    batch = packed(61)
    assert batch.num_targets().item() == int((batch.labels >= 0).sum())
    moved = batch.to("meta")
    assert {moved.inputs.device.type, moved.labels.device.type, moved.documents.device.type} == {"meta"}
    assert replace(batch, documents=None).to("meta").documents is None


def test_frequencies_that_depend_on_the_sequence_are_refused():
    scaled = replace(DENSE, rope_scaling=RopeScaling(kind="dynamic_ntk", factor=4.0, original_max_seq_len=64), **LONG)
    check_packable(scaled, 64)
    check_packable(replace(scaled, rope_scaling=RopeScaling(kind="linear", factor=4.0)), 130)
    with pytest.raises(ValueError, match=r"rope_scaling\.kind=dynamic_ntk stretches beyond 64 .*set data\.packing"):
        loss_sum(Transformer(scaled), packed(61))
