"""`CaravanForCausalLM` under transformers: what no architecture of transformers expresses, padding, Trainer."""

import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llama import ModelConfig
from llama.config import RopeScaling
from llama.hf import load_pretrained, save_pretrained
from tests.distributed import run_ranks
from tests.llama.hf_cases import VOCAB, build, error, experts, load_theirs, randomize, small_tokenizer, tokens

transformers = pytest.importorskip("transformers")
from llama.hf_model import CaravanConfig, CaravanForCausalLM  # noqa: E402 (needs transformers)

transformers.utils.logging.disable_progress_bar()

MODELS: dict[str, dict[str, Any]] = {
    "alibi, layernorm": {"position": "alibi", "norm": "layernorm", "ffn_bias": True},
    "learned, plain gelu": {"position": "learned", "activation": "gelu", "tie_embeddings": True},
    "t5, sandwich": {"position": "t5", "norm_placement": "sandwich", "attention_bias": "qkv"},
    "sinusoidal, deepnorm": {"position": "sinusoidal", "norm_placement": "deepnorm"},
    "batchnorm": {"norm": "batchnorm"},
    "nothing, learned swish": {"position": "none", "activation": "swish_learned", "attention_softcap": 5.0},
    "interleaved sigmoid experts": {
        "rope_layout": "interleaved",
        "sliding_window": 5,
        "moe": experts(score="sigmoid", first_dense_layers=1, bias_update_rate=0.1),
    },
}
each = pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())


@each
def test_directories_pass_between_both_worlds_unchanged(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = build(**settings)
    assert save_pretrained(model, tmp_path / "ours", max_shard_size=20_000) == "CaravanForCausalLM"
    theirs = load_theirs(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_pretrained(tmp_path / "theirs")
    batch = tokens(2, 20)
    with torch.no_grad():
        expected = model(batch)
        assert torch.equal(theirs(batch).logits, expected) and torch.equal(loaded(batch), expected)
        assert torch.equal(theirs(batch, logits_to_keep=2).logits, expected[:, -2:])
    assert loaded.config == model.config
    answer = theirs.generate(batch[:1, :7], max_new_tokens=12, do_sample=False)[0, 7:].tolist()
    assert answer == model.generate(batch[0, :7].tolist(), max_new_tokens=12, temperature=0.0)


def test_routing_biases_stay_fp32(tmp_path: Path) -> None:
    model = build(moe=experts(score="sigmoid", bias_update_rate=0.1))
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    theirs = load_theirs(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    for mine, other in zip(model.buffers(), theirs.buffers(), strict=True):
        assert other.dtype == torch.float32 and torch.equal(mine, other)


def caravan(**settings: Any) -> CaravanForCausalLM:
    model = CaravanForCausalLM(CaravanConfig(model=asdict(build(**settings).config)))
    randomize(model)
    return model.eval()


def padded(batch: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """`batch` with random tokens around it, and its mask."""
    rows = len(batch)
    noise = torch.randint(VOCAB, (rows, before + after))
    mask = torch.ones_like(batch)
    zeros = torch.zeros_like(noise)
    return (
        torch.cat((noise[:, :before], batch, noise[:, before:]), dim=1),
        torch.cat((zeros[:, :before], mask, zeros[:, before:]), dim=1),
    )


@each
@pytest.mark.parametrize(("before", "after"), [(0, 4), (4, 0), (3, 2)])
def test_padding_on_either_side_changes_nothing(settings: dict[str, Any], before: int, after: int) -> None:
    model, batch = caravan(**settings), tokens(2, 15)
    ids, mask = padded(batch, before, after)
    with torch.no_grad():
        alone = model(batch, labels=batch)
        answer = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert error(answer.logits[:, before : before + 15], alone.logits) <= 1e-5
    assert answer.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)


def test_rows_of_different_length_generate_what_they_would_alone() -> None:
    model, batch = caravan(position="alibi"), tokens(2, 9)
    ids, mask = padded(batch[1:, :5], 4, 0)
    both = model.generate(
        torch.cat((batch[:1], ids)),
        attention_mask=torch.cat((torch.ones_like(mask), mask)),
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
    )
    for row, prompt in ((both[0], batch[:1]), (both[1], batch[1:, :5])):
        assert row[9:].tolist() == model.generate(prompt, max_new_tokens=10, do_sample=False)[0, -10:].tolist()


def test_running_statistics_follow_each_forward_pass_in_training() -> None:
    model, batch = caravan(norm="batchnorm"), tokens(2, 9)
    norm = model.model.layers[0].attention_norm
    before = norm.running_mean.clone()
    model(batch)
    assert torch.equal(norm.running_mean, before)
    model.train()(batch)
    mean = model.model.tok_embeddings(batch).flatten(0, 1).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * mean)


def test_a_hole_in_the_mask_is_refused() -> None:
    model, batch = caravan(), tokens(1, 4)
    with pytest.raises(ValueError, match="padding between tokens"):
        model(batch, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"shape \[1, 3\]"):
        model(batch, attention_mask=torch.ones(1, 3))


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    """Shifted labels, -100 left out, and the divisor of accumulated batches, against their Llama."""
    model = build(rope_scaling=RopeScaling("linear", 2.0))
    save_pretrained(model, tmp_path)
    llama, ours = load_theirs(tmp_path), CaravanForCausalLM(CaravanConfig(model=asdict(model.config)))
    ours.model.load_state_dict(model.state_dict())
    batch = tokens(3, 12)
    labels = batch.masked_fill(torch.rand(batch.shape) < 0.3, -100)
    for count in (None, 50):
        mine = ours(batch, labels=labels, num_items_in_batch=count).loss
        assert mine.item() == pytest.approx(llama(batch, labels=labels, num_items_in_batch=count).loss.item(), rel=1e-5)
    loss, logits = ours(batch, labels=labels, return_dict=False)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_fresh_model_starts_as_ours_and_by_the_global_seed() -> None:
    config = CaravanConfig(model=asdict(ModelConfig(vocab_size=VOCAB, dim=64, num_layers=2, num_heads=4)))
    first, second = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    assert not torch.equal(first.model.tok_embeddings.weight, second.model.tok_embeddings.weight)
    torch.manual_seed(4)
    third = CaravanForCausalLM(config)
    torch.manual_seed(4)
    fourth = CaravanForCausalLM(config)
    assert all(torch.equal(a, b) for a, b in zip(third.parameters(), fourth.parameters(), strict=True))
    assert third.model.layers[0].attention.wq.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert third.model.layers[0].attention.wo.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_a_config_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="model.wheels"):
        CaravanConfig(model={"wheels": 4})
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    config = CaravanConfig(model=asdict(build().config))
    assert [getattr(config, name) for name in names] == [32, 3, 4, 128] and config.tie_word_embeddings is False
    for name in (*names, "tie_word_embeddings"):
        with pytest.raises(AttributeError, match=name):
            CaravanConfig(**{name: 1})
    assert CaravanConfig(vocab_size=5).model_config.vocab_size == 5


def test_gradient_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        caravan().gradient_checkpointing_enable()


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized(tmp_path: Path, tied: bool) -> None:
    model, batch = caravan(position="alibi", tie_embeddings=tied), tokens(2, 9)
    with torch.no_grad():
        before = model(batch).logits
        for size in (VOCAB + 9, VOCAB + 2):
            model.resize_token_embeddings(size)
            logits = model(batch).logits
            assert logits.shape[-1] == model.config.vocab_size == model.model.config.vocab_size == size
            assert torch.equal(logits[..., :VOCAB], before)
        assert model(torch.full((1, 2), size - 1)).logits.isfinite().all()
        model.save_pretrained(tmp_path / "theirs")
        save_pretrained(model.model, tmp_path / "ours", small_tokenizer(size))
        for directory in (tmp_path / "theirs", tmp_path / "ours"):
            assert torch.equal(load_pretrained(directory)(batch), logits)
            assert torch.equal(load_theirs(directory)(batch).logits, logits)


def test_label_smoothing_is_that_of_transformers(tmp_path: Path) -> None:
    """Trainer shifts the labels only for models that it knows as language models."""
    pytest.importorskip("accelerate")
    model = build()
    save_pretrained(model, tmp_path / "model")
    llama, ours = load_theirs(tmp_path / "model"), CaravanForCausalLM(CaravanConfig(model=asdict(model.config)))
    ours.model.load_state_dict(model.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    batch = tokens(2, 12)
    losses = [
        transformers.Trainer(each, arguments)
        .compute_loss(each, {"input_ids": batch, "labels": batch.masked_fill(batch < 9, -100)})
        .item()
        for each in (ours, llama)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_without_a_padding_token_every_embedding_is_trained(tmp_path: Path) -> None:
    save_pretrained(build(), tmp_path, small_tokenizer())
    llama = load_theirs(tmp_path)
    assert llama.get_input_embeddings().padding_idx is None
    llama(torch.zeros(1, 3, dtype=torch.long), labels=torch.zeros(1, 3, dtype=torch.long)).loss.backward()
    assert llama.get_input_embeddings().weight.grad[0].abs().sum() > 0


def train(directory: str, batches: list[Tensor]) -> dict[str, Tensor]:
    """One step of transformers.Trainer by plain SGD; returns the parameters afterwards."""
    model = caravan(position="alibi", moe=experts(score="sigmoid"))
    arguments = transformers.TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=len(batches) // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    # As many labels fewer as the row's number: the mean must be over tokens, not over ranks.
    data = [
        {"input_ids": row, "labels": torch.where(torch.arange(len(row)) < 2 * number, -100, row)}
        for number, row in enumerate(batches)
    ]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def train_rank(rank: int, world_size: int, directory: str, port: int, batches: list[Tensor]) -> dict[str, Tensor]:
    """What torchrun would set, in a process of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return train(directory, batches)


@pytest.mark.integration
def test_trainer_makes_the_same_step_alone_and_under_ddp(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    batches = list(tokens(4, 11))
    expected = train(str(tmp_path), batches)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for parameters in run_ranks(train_rank, 2, str(tmp_path), port, batches):
        assert parameters.keys() == expected.keys()
        for name, tensor in parameters.items():
            assert error(tensor, expected[name]) <= 1e-5, name
