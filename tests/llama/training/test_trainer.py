"""The distributed trainer against a plain loop over the whole batch in one process.

The reference has no code of the trainer's: its losses are written out, its norm is one sum over all parameters, its
AdamW is torch's unfused one. What both share is the definition of the batch-level balance losses: they are taken over
one micro-step, that is one forward pass of all ranks together (`micro_batch · world_size` sequences). So the reference
runs chunks of that size.

AdamW divides a gradient by its own size, so where a gradient is next to nothing its rounding moves the weight at full
size. At eps=1e-8 that left one entry in each of five or six matrices of the MoE model more than 1e-5 off (up to 9e-5),
the same ones with and without expert parallelism. `eps` is 1e-5 here, above that rounding; and the gradients of all
three steps are compared, which a wrong step could not pass.
"""

import math
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.optimizer import register_optimizer_step_pre_hook

from llama import model as model_module
from llama.model import Transformer
from llama.moe import RoutingRecord
from llama.training.config import ParallelConfig
from llama.training.mesh import local
from llama.training.trainer import Trainer
from tests.distributed import run_ranks
from tests.llama.training.helpers import (
    DENSE,
    MOE,
    SAMPLES,
    Samples,
    difference,
    pad_labels,
    sample_lengths,
    samples,
    train_config,
    whole,
)


def variant(**moe_settings):
    return replace(MOE, moe=replace(MOE.moe, **moe_settings))


UNUSUAL_DENSE = replace(
    DENSE,
    position="t5",
    norm="layernorm",
    norm_placement="deepnorm",
    attention_bias="qkvo",
    qk_norm="head",
    ffn_bias=True,
)
# Three experts do not divide over two ranks, and an activation of one number less so.
UNUSUAL_MOE = replace(
    variant(num_experts=3), position="learned", norm_placement="sandwich", activation="swish_learned", sliding_window=5
)

SEQUENCE = variant(balance_loss="switch_sequence", score="sigmoid", shared_gate=True, balance_loss_weight=0.5)


def layout(dp_replicate, dp_shard, ep):
    return ParallelConfig(dp_replicate, dp_shard, ep)


# Every layout of one, two and four ranks, and each with one micro-step and with two.
MATRIX = {
    1: [layout(1, 1, 1)],
    2: [layout(1, 2, 1), layout(1, 2, 2), layout(2, 1, 1)],
    4: [layout(1, 4, 1), layout(1, 4, 2), layout(1, 4, 4), layout(2, 2, 1), layout(2, 2, 2)],
}

# (model, layout, micro-batch, steps, other settings, and whether rows are padded)
LAYOUTS = {
    world_size: [
        (model, parallel, 8 // world_size // accumulation, 3, {})
        for parallel in layouts
        for model in ((DENSE, MOE) if parallel.ep == 1 else (MOE,))
        for accumulation in (1, 2)
    ]
    for world_size, layouts in MATRIX.items()
}
LAYOUTS[2] += [
    (SEQUENCE, layout(1, 2, 2), 4, 1, {}),
    (SEQUENCE, layout(1, 2, 2), 1, 1, {}),
    (variant(balance_loss="importance_entropy", route_scale=2.0), layout(1, 2, 2), 4, 1, {}),
    (variant(balance_loss="frequency_entropy", balance_loss_weight=0.5), layout(1, 2, 2), 2, 1, {}),
    (variant(balance_loss="kl_uniform", z_loss_weight=0.0), layout(1, 2, 2), 2, 1, {}),
    (variant(balance_loss="expert_load", score="sigmoid"), layout(1, 2, 2), 4, 1, {}),
    (variant(balance_loss_weight=0.0, z_loss_weight=0.0), layout(1, 2, 2), 4, 1, {}),
    (DENSE, layout(1, 2, 1), 2, 1, {"padded": True}),
    (MOE, layout(1, 2, 2), 2, 3, {"padded": True}),
    (SEQUENCE, layout(1, 2, 2), 2, 1, {"padded": True}),
    (variant(balance_loss="expert_load"), layout(1, 2, 2), 4, 1, {"padded": True}),
    (UNUSUAL_DENSE, layout(1, 2, 1), 2, 3, {}),
    (UNUSUAL_MOE, layout(1, 2, 1), 2, 3, {}),
    (MOE, layout(1, 2, 2), 2, 3, {"activation_checkpointing": "full"}),
    (SEQUENCE, layout(1, 2, 2), 4, 1, {"activation_checkpointing": "selective"}),
    (MOE, layout(1, 2, 2), 2, 3, {}),  # once more
]
CASES = [(world_size, index) for world_size, layouts in LAYOUTS.items() for index in range(len(layouts))]


def at(world_size, *case, again=0, **settings):
    """The index of a case."""
    same = [index for index, found in enumerate(LAYOUTS[world_size]) if found[:3] == case and found[4] == settings]
    return same[again]


def balance_of(kind, probabilities, chosen, lengths):
    """The loss of one layer; `probabilities` and `chosen` are `[tokens, experts]`, the latter 0 or 1, those of
    sequences of `lengths` one after the other."""
    experts = probabilities.shape[1]
    if kind == "switch_sequence":
        sequences = (tensor.split(lengths) for tensor in (probabilities, chosen))
        return torch.stack([balance_of("switch", *pair, lengths) for pair in zip(*sequences, strict=True)]).mean()
    importance, load = probabilities.mean(0), chosen.sum(0) / chosen.sum()
    if kind == "switch":
        return experts * (load * importance).sum()
    if kind == "importance_entropy":
        return (importance * importance.log()).sum()
    if kind == "kl_uniform":
        return (importance * (importance * 4).log()).sum()
    # Of the load alone: its own value, its slope by the load times the importance for the gradient.
    value, slope = {
        "frequency_entropy": ((load * load.log()).sum(), load.log() + 1),
        "expert_load": (4 * load.square().sum() - 1, 8 * load),
    }[kind]
    through = (slope * importance).sum()
    return value + through - through.detach()


@cache
def reference(model_config, config, chunk, padded=False):
    """Trains in one process; `chunk` sequences share a balance loss. Returns what `train` returns."""
    model = Transformer(model_config)
    model.init_weights(config.seed)
    named = dict(model.named_parameters())
    start = {name: whole(parameter) for name, parameter in named.items()}
    tables = ("tok_embeddings.weight", "position_embeddings.weight", "relative_bias")
    plain = {name for name, parameter in named.items() if parameter.ndim < 2 or name in tables}
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[name] for name in named if name not in plain], "weight_decay": 0.1},
            {"params": [named[name] for name in plain], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=config.optimizer.eps,
        foreach=False,
    )
    lrs = [config.optimizer.lr * share for share in (0.5, 1.0, config.schedule.min_lr_ratio)][: config.steps]
    routers = {
        block.layer: block.feed_forward.router for block in model.layers if hasattr(block.feed_forward, "router")
    }
    moe = model_config.moe
    history, gradients, parts = [], {}, []
    for step, lr in enumerate(lrs):
        tokens = samples(step * config.global_batch, config.global_batch, config, model_config.vocab_size)
        lengths = torch.full((len(tokens),), config.seq_len)
        labels = tokens[:, 1:]
        if padded:
            lengths = sample_lengths(step * config.global_batch, config.global_batch, config)
            labels = pad_labels(labels, lengths)
        cross, counts = 0.0, {layer: torch.zeros(moe.num_experts) for layer in routers}
        for part, targets, sizes in zip(tokens.split(chunk), labels.split(chunk), lengths.split(chunk), strict=True):
            routing, share = RoutingRecord(), (sizes.sum() / lengths.sum()).item()
            real = (torch.arange(config.seq_len) < sizes[:, None]).flatten()
            logits = model(part[:, :-1], routing=routing)
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (labels >= 0).sum()
            cross += loss.item()
            for layer, router in routers.items():
                logits = routing.layers[layer].logits_TE[real]
                affinities = logits.softmax(-1) if moe.score == "softmax" else logits.sigmoid()
                chosen = one_hot((affinities + router.expert_bias).topk(2).indices, moe.num_experts).sum(1).float()
                counts[layer] += chosen.sum(0)
                probabilities = affinities / affinities.sum(-1, keepdim=True)
                balance = balance_of(moe.balance_loss, probabilities, chosen, sizes.tolist()) * (
                    len(part) / len(tokens) if moe.balance_loss == "switch_sequence" else share
                )
                z = logits.exp().sum(-1).log().pow(2).mean() * share
                loss = loss + moe.balance_loss_weight * balance + moe.z_loss_weight * z
                entropy = -(probabilities * probabilities.log()).sum(-1).mean() * share
                parts.append((step, balance.item() / len(routers), z.item() / len(routers), layer, entropy.item()))
            loss.backward()
        norm = math.sqrt(sum(parameter.grad.double().pow(2).sum().item() for parameter in named.values()))
        for parameter in named.values():
            parameter.grad *= min(1.0, config.optimizer.grad_clip / norm)
        gradients |= {f"{name}, step {step}": parameter.grad.clone() for name, parameter in named.items()}
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        for layer, router in routers.items():
            router.expert_bias += 0.01 * torch.sign(counts[layer].mean() - counts[layer])
        history.append((cross, norm))
    return {
        "start": start,
        "gradients": gradients,
        "end": {name: whole(tensor) for name, tensor in model.state_dict().items()},
        "history": history,
        "balance": [sum(balance for at, balance, *_ in parts if at == step) for step in range(config.steps)],
        "z": [sum(z for at, _, z, *_ in parts if at == step) for step in range(config.steps)],
        "entropy": [
            {layer: sum(entropy for at, *_, own, entropy in parts if (at, own) == (step, layer)) for layer in routers}
            for step in range(config.steps)
        ],
    }


def train(rank, world_size, layouts):
    """Trains every layout in turn on this group of ranks."""
    results = []
    for model_config, config, padded in layouts:
        seen, gradients, starts = [], {}, {}
        trainer = Trainer(
            model_config,
            config,
            Samples(config, model_config.vocab_size, rank, world_size, padded),
            on_metrics=seen.append,
        )

        def keep(*_, trainer=trainer, seen=seen, gradients=gradients, starts=starts):
            named = dict(trainer.model.named_parameters())
            gradients.update({f"{name}, step {len(seen)}": whole(parameter.grad) for name, parameter in named.items()})
            if not starts:
                starts.update({name: whole(parameter) for name, parameter in named.items()})

        hook = register_optimizer_step_pre_hook(keep)
        summary = trainer.fit()
        hook.remove()
        named = dict(trainer.model.named_parameters())
        results.append(
            {
                "start": starts,
                "gradients": gradients,
                "end": {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()},
                "history": [(metrics.loss, metrics.grad_norm) for metrics in seen],
                "metrics": [asdict(metrics) for metrics in seen],
                "summary": asdict(summary),
                "expert_bytes": sum(local(p).nbytes for name, p in named.items() if ".experts.w" in name),
            }
        )
    return results


def config_of(parallel, micro_batch, steps, settings):
    settings = {name: value for name, value in settings.items() if name != "padded"}
    return train_config(parallel=parallel, micro_batch=micro_batch, steps=steps, **settings)


def expected_of(world_size, index):
    """The reference takes no account of how the work is laid out, but for the size of a micro-step."""
    model, _, micro_batch, steps, settings = LAYOUTS[world_size][index]
    return reference(model, train_config(steps=steps), micro_batch * world_size, "padded" in settings)


@pytest.fixture(scope="module")
def trained():
    return {
        world_size: run_ranks(
            train,
            world_size,
            [(model, config_of(*settings), "padded" in settings[-1]) for model, *settings in layouts],
        )
        for world_size, layouts in LAYOUTS.items()
    }


@pytest.mark.integration
@pytest.mark.parametrize(("world_size", "index"), CASES)
def test_equals_one_process(trained, world_size, index):
    model_config, *settings = LAYOUTS[world_size][index]
    config = config_of(*settings)
    expected = expected_of(world_size, index)
    for ranks in trained[world_size]:
        result = ranks[index]
        assert all(torch.equal(result["start"][name], value) for name, value in expected["start"].items())
        for key in ("gradients", "end"):
            assert result[key].keys() == expected[key].keys()
            worst = {name: difference(result[key][name], value) for name, value in expected[key].items()}
            # A learned β is one number, whose gradient is a sum over all activations that all but cancels.
            off = {name: value for name, value in worst.items() if value > (1e-4 if "beta" in name else 1e-5)}
            assert not off, (key, off)
        for (loss, norm), (expected_loss, expected_norm) in zip(result["history"], expected["history"], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert norm == pytest.approx(expected_norm, rel=1e-5)
            assert norm > config.optimizer.grad_clip
        for step, metrics in enumerate(result["metrics"] if model_config.moe else []):
            assert metrics["balance_loss"] == pytest.approx(expected["balance"][step], rel=1e-5, abs=1e-6)
            assert metrics["z_loss"] == pytest.approx(expected["z"][step], rel=1e-5)
            assert metrics["router_entropy"] == pytest.approx(expected["entropy"][step], rel=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize(("world_size", "index"), CASES)
def test_experts_are_sharded_and_tokens_travel(trained, world_size, index):
    model_config, parallel, *_ = LAYOUTS[world_size][index]
    results = [ranks[index] for ranks in trained[world_size]]
    moe = model_config.moe
    banks = 3 if model_config.gated else 2
    total = 2 * banks * moe.num_experts * model_config.dim * moe.expert_hidden_dim * 4 if moe else 0
    assert [result["expert_bytes"] for result in results] == [total * parallel.dp_replicate // world_size] * world_size
    travelled = results[0]["summary"]["all_to_all_bytes"]
    assert (travelled > 0) == (parallel.ep > 1)
    assert travelled == sum(metrics["all_to_all_bytes"] for metrics in results[0]["metrics"])


@pytest.mark.integration
def test_the_same_seed_and_layout_give_the_same_to_the_bit(trained):
    first, second = (trained[2][0][at(2, MOE, layout(1, 2, 2), 2, again=again)] for again in (0, 1))
    assert first["history"] == second["history"]
    assert all(torch.equal(first["end"][name], value) for name, value in second["end"].items())


@pytest.mark.integration
@pytest.mark.parametrize("model_config", [DENSE, MOE])
def test_across_layouts_the_losses_are_the_same_to_rounding(trained, model_config):
    """In micro-steps of one size: the balance loss takes its averages over them."""
    histories = [
        trained[world_size][0][index]["history"]
        for world_size, index in CASES
        if LAYOUTS[world_size][index][0] == model_config and LAYOUTS[world_size][index][2] * world_size == 8
    ]
    assert len(histories) == (5 if model_config == DENSE else 9)
    for history in histories[1:]:
        assert [value for pair in history for value in pair] == pytest.approx(
            [value for pair in histories[0] for value in pair], rel=1e-6
        )


@pytest.mark.integration
def test_accumulation_changes_nothing_where_losses_are_of_sequences_and_tokens(trained):
    one, four = (trained[2][0][at(2, SEQUENCE, layout(1, 2, 2), micro_batch)] for micro_batch in (4, 1))
    for key in ("gradients", "end"):
        assert max(difference(four[key][name], value) for name, value in one[key].items()) <= 1e-5
    for key in ("loss", "balance_loss", "z_loss", "grad_norm"):
        assert four["metrics"][0][key] == pytest.approx(one["metrics"][0][key], rel=1e-6)


@pytest.mark.integration
def test_recomputed_blocks_change_no_bit_and_selective_ones_send_no_token_twice(trained):
    plain, full = (
        trained[2][0][at(2, MOE, layout(1, 2, 2), 2, **settings)]
        for settings in ({}, {"activation_checkpointing": "full"})
    )
    assert full["history"] == plain["history"]
    assert all(torch.equal(full["end"][name], value) for name, value in plain["end"].items())
    # There and back, in forward and again in backward; forward twice with recomputation.
    assert full["summary"]["all_to_all_bytes"] == 1.5 * plain["summary"]["all_to_all_bytes"]
    plain, selective = (
        trained[2][0][at(2, SEQUENCE, layout(1, 2, 2), 4, **settings)]
        for settings in ({}, {"activation_checkpointing": "selective"})
    )
    assert all(torch.equal(selective["end"][name], value) for name, value in plain["end"].items())
    assert selective["summary"]["all_to_all_bytes"] == plain["summary"]["all_to_all_bytes"]


@pytest.mark.integration
def test_metrics_are_global_and_the_same_on_every_rank(trained):
    moe = at(2, MOE, layout(1, 2, 2), 4)
    metrics = [ranks[moe]["metrics"] for ranks in trained[2]]
    assert metrics[0] == metrics[1]
    last = metrics[0][-1]
    assert last["tokens_per_second"] > 0 and 0 < last["mfu"] < 1 and last["memory_bytes"] > 2**20
    assert (last["samples"], last["epoch"], last["val_loss"]) == (24, 24 / SAMPLES, None)
    assert all(0 < entropy <= math.log(4) for entropy in last["router_entropy"].values())
    assert (last["step"], last["steps"], last["tokens"]) == (3, 3, 3 * 8 * 16)
    assert last["learning_rate"] == pytest.approx(3e-4)
    assert sorted(last["expert_load"]) == [1, 2]
    assert all(sum(load) == pytest.approx(1) and len(load) == 4 for load in last["expert_load"].values())
    assert 0.9 <= last["balance_loss"] < 1.5 and last["z_loss"] > 0
    dense = trained[2][0][0]["metrics"][-1]
    assert (dense["balance_loss"], dense["expert_load"], dense["all_to_all_bytes"]) == (None, {}, 0)


def bf16(rank, world_size):
    config = train_config(parallel=ParallelConfig(ep=2), steps=8, precision="bf16")
    seen = []
    trainer = Trainer(MOE, config, Samples(config, MOE.vocab_size, rank, world_size), on_metrics=seen.append)
    trainer.fit()
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    dtypes |= {tensor.dtype for state in trainer.optimizer.state.values() for tensor in state.values()}
    full = replace(config, precision="fp32")
    exact = []
    Trainer(MOE, full, Samples(full, MOE.vocab_size, rank, world_size), on_metrics=exact.append).fit()
    return [m.loss for m in seen], [m.loss for m in exact], dtypes


@pytest.mark.integration
def test_bf16_computes_roughly_the_same_and_keeps_fp32_masters():
    losses, exact, dtypes = run_ranks(bf16, 2)[0]
    assert dtypes == {torch.float32}
    assert losses != exact
    assert losses == pytest.approx(exact, rel=5e-3)


def mismatched(rank, world_size):
    messages = []
    for model, settings in [
        (MOE, {"parallel": ParallelConfig(ep=4)}),
        (DENSE, {"parallel": ParallelConfig(ep=2)}),
        (replace(MOE, moe=replace(MOE.moe, num_experts=3)), {"parallel": ParallelConfig(ep=2)}),
        (MOE, {"global_batch": 6}),
        (replace(MOE, activation="swish_learned"), {"parallel": ParallelConfig(ep=2)}),
    ]:
        config = train_config(**settings)
        with pytest.raises(ValueError) as raised:
            Trainer(model, config, Samples(config, model.vocab_size)).fit()
        messages.append(str(raised.value))
    return messages


@pytest.mark.integration
def test_a_config_that_does_not_fit_names_its_fields():
    too_wide, dense, odd, batch, learned = run_ranks(mismatched, 2)[0]
    assert too_wide.startswith("train.parallel.ep=4 does not divide dp_shard=2")
    assert dense.startswith("train.parallel.ep=2 splits experts, but the model is dense")
    assert odd.startswith("train.parallel.ep=2 does not divide model.moe.num_experts=3")
    assert batch.startswith("train.global_batch=6 is not divisible")
    assert learned.startswith("train.parallel.ep=2 splits experts, but model.activation=swish_learned")


def test_a_router_that_could_learn_nothing_is_refused():
    with pytest.raises(ValueError, match=r"normalize_top_k=True with model\.moe\.top_k=1 .*normalize_top_k=False"):
        Trainer(variant(top_k=1), train_config(), Samples(train_config(), 61))


def test_the_summary_of_a_loss_that_is_not_finite_is_json(monkeypatch):
    config = train_config(steps=1, micro_batch=8)
    monkeypatch.setattr(model_module, "linear_cross_entropy_sum", lambda hidden, *_: hidden.sum() * math.inf)
    assert Trainer(DENSE, config, Samples(config, DENSE.vocab_size)).fit().loss is None


def test_a_batch_of_the_wrong_shape_is_refused():
    config = train_config(micro_batch=8)
    wrong = Samples(replace(config, seq_len=12), MOE.vocab_size)
    with pytest.raises(ValueError, match=r"inputs are \(8, 12\), expected \(8, 16\)"):
        Trainer(MOE, config, wrong).fit()


def test_a_sequence_longer_than_the_model_takes_is_refused():
    config = train_config(seq_len=64)
    with pytest.raises(ValueError, match=r"train\.seq_len=64 is longer than model\.max_seq_len=32"):
        Trainer(MOE, config, Samples(config, MOE.vocab_size))
