"""Recomputed blocks against plain ones: the same gradients, less memory."""

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from llama.balance import RoutingStatistics, balance_loss, routing_sums
from llama.model import Transformer
from llama.moe import RoutingRecord
from llama.training.batch import Batch, loss_sum
from llama.training.config import check_compilable
from llama.training.recompute import recompute_activations
from llama.training.trainer import Trainer
from tests.llama.training.helpers import DENSE, MOE, Samples, difference, samples, train_config, whole


class LiveBytes(TorchDispatchMode):
    """Bytes of what was computed inside and is still held by anyone: autograd, a cache, a variable."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    def held(self):
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def backward(model_config, kind):
    """Gradients of every loss there is, the statistics before and after backward, bytes held when it begins."""
    model = Transformer(model_config)
    model.init_weights(0)
    names = list(model.state_dict())
    random = model_config.residual_dropout > 0
    for block in model.layers:
        recompute_activations(block, kind, random=random)
    assert list(model.state_dict()) == names
    tokens = samples(0, 4, train_config(seq_len=32), model_config.vocab_size)
    routing = RoutingRecord() if model_config.moe else None
    torch.manual_seed(3)
    with LiveBytes() as live:
        loss = loss_sum(model, Batch(tokens[:, :-1], tokens[:, 1:]), routing=routing)
    held, sums = live.held(), None
    if routing is not None:
        sums = routing_sums(routing.layers.values(), model_config.moe.balance_loss)
        statistics = RoutingStatistics(sums)
        loss = loss + balance_loss(model_config.moe.balance_loss, statistics).sum() + statistics.z_loss.sum()
    loss.backward()
    if routing is not None:
        again = routing_sums(routing.layers.values(), model_config.moe.balance_loss)
        assert torch.equal(again, sums) and sums[:, :4].sum() == len(routing.layers) * 4 * 32 * 2
    return {name: parameter.grad for name, parameter in model.named_parameters()}, held


SIGMOID = replace(MOE, moe=replace(MOE.moe, score="sigmoid", balance_loss="switch_sequence", capacity_factor=1.25))


@pytest.mark.parametrize(
    "model_config", [DENSE, MOE, SIGMOID, replace(DENSE, residual_dropout=0.3), replace(DENSE, norm="batchnorm")]
)
def test_gradients_are_equal_to_the_bit_and_less_is_kept(model_config):
    plain, most = backward(model_config, "none")
    selective, some = backward(model_config, "selective")
    full, least = backward(model_config, "full")
    for gradients in (selective, full):
        assert gradients.keys() == plain.keys()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in plain.items())
    assert least < 0.4 * most and least < some < 0.85 * most, (least, some, most)


def test_compiled_blocks_train_the_same():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen, ends, model = [], [], replace(DENSE, num_layers=1, num_kv_heads=2)
    for settings in ({}, {"compile": True, "activation_checkpointing": "full"}):
        config = train_config(steps=1, micro_batch=8, **settings)
        trainer = Trainer(model, config, Samples(config, model.vocab_size), on_metrics=seen.append)
        trainer.fit()
        ends.append(trainer.model.state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    plain, compiled = seen
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-6)
    assert compiled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)
    for name, weight in ends[0].items():  # AdamW's first step is of full size wherever there is any gradient
        assert difference(whole(ends[1][name]), whole(weight)) < 1e-5, name


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    train = train_config(compile=True, activation_checkpointing="selective")
    check_compilable(DENSE, train)
    with pytest.raises(ValueError, match=r"compile=True compiles no experts with .*activation_checkpointing=selective"):
        check_compilable(MOE, train)
    with pytest.raises(ValueError, match=r"compile=True compiles no batch norms with .*activation_checkpointing=sel"):
        check_compilable(replace(DENSE, norm="batchnorm"), train)
    config = train_config(compile=True, micro_batch=8)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"train\.compile=True needs a C\+\+ compiler, and no-such-compiler is not"):
        Trainer(DENSE, config, Samples(config, DENSE.vocab_size)).fit()
