"""LoRA against plain matrices, PEFT and transformers: the same logits, here and there."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from llama.hf import load_pretrained, save_pretrained
from llama.hf_adapter import load_adapter, save_adapter
from llama.hf_values import UnsupportedModel
from llama.lora import LoraConfig, apply_lora, init_adapters, lora_layers, merge_lora
from llama.training.config import OptimizerConfig
from llama.training.optim import build_optimizer
from tests.llama.hf_cases import build, error, experts, load_theirs, tokens

ALL = LoraConfig(rank=3, alpha=7, targets=("wq", "wk", "wv", "wo", "w1", "w2", "w3"))
ATTENTION = LoraConfig(rank=3, alpha=7)
SHARED = {"num_shared_experts": 1, "shared_hidden_dim": 20, "shared_gate": True}
MODELS = {
    "llama": ({"head_dim": 8}, ALL),
    "llama, interleaved here": ({"head_dim": 8, "rope_layout": "interleaved"}, ALL),
    "qwen3": ({"qk_norm": "head"}, ATTENTION),
    "mixtral": ({"moe": experts()}, ATTENTION),
    "qwen2-moe, shared experts and a dense layer": (
        {"moe": experts(normalize_top_k=False, dense_layers=(1,), **SHARED), "attention_bias": "qkv"},
        ALL,
    ),
    "ernie": (
        {"moe": experts(num_shared_experts=1, first_dense_layers=1, bias_update_rate=0.1), "num_kv_heads": 2},
        replace(ALL, targets=("wk", "wo")),  # its w1 PEFT takes for the routed experts'
    ),
    "caravan": ({"position": "alibi", "attention_bias": "qkvo"}, replace(ALL, targets=("wv", "w2"))),
}


def adapted(settings, config):
    """A model whose adapters have learned something for a few steps, by the training's own optimizer."""
    model = apply_lora(build(**settings), config).train()
    init_adapters(model, seed=5)
    optimizer = build_optimizer(model, OptimizerConfig(lr=3e-2))
    data = tokens(4, 13)
    for _ in range(4):
        logits = model(data[:, :-1])
        cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_peft_and_transformers_compute_the_same(name, tmp_path):
    peft = pytest.importorskip("peft")
    import llama.hf_model  # noqa: F401  # for what no architecture of transformers expresses

    settings, config = MODELS[name]
    base = build(**settings)
    model = adapted(settings, config)
    save_pretrained(base, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    data = tokens(2, 11)
    with torch.no_grad():
        ours, plain = model(data), base(data)
        assert error(ours, plain) > 0.03  # the adapters have a say
        theirs = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base"), tmp_path / "adapter").eval()
        assert error(theirs(data).logits, ours) <= 1e-5
        theirs.save_pretrained(tmp_path / "again")
        again = load_pretrained(tmp_path / "base")
        assert load_adapter(again, tmp_path / "again") == config
        assert error(again(data), ours) <= 1e-5
        merged = merge_lora(model)
        assert not lora_layers(merged) and all(parameter.requires_grad for parameter in merged.parameters())
        assert error(merged(data), ours) <= 1e-5
        save_pretrained(merged, tmp_path / "merged")
        assert error(load_theirs(tmp_path / "merged")(data).logits, ours) <= 1e-5


def test_only_adapters_learn_and_start_as_nothing():
    base, model = build(), apply_lora(build(), ATTENTION)
    init_adapters(model, seed=5)
    assert torch.equal(model(tokens(2, 9)), base(tokens(2, 9)))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    a = start["layers.0.attention.wq.lora_a"]
    assert a.shape == (3, 32) and 0.9 / 32**0.5 < a.abs().max() <= 32**-0.5
    assert not torch.equal(a, start["layers.1.attention.wq.lora_a"])
    trained = adapted({}, ATTENTION).state_dict()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert changed == {name for name in start if name.endswith((".lora_a", ".lora_b"))}
    assert len(changed) == 3 * 4 * 2
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == changed


def test_dropout_is_of_the_adapters_input_and_of_training_only():
    model = adapted({}, replace(ATTENTION, dropout=0.5))
    data = tokens(2, 9)
    assert torch.equal(model(data), model(data))
    model.train()
    assert not torch.equal(model(data), model(data))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "train.lora.rank=0 must be at least 1"),
        ({"alpha": 0}, "train.lora.alpha=0 must be at least 1"),
        ({"dropout": 1.0}, "train.lora.dropout=1.0 must lie in"),
        ({"targets": ()}, r"train.lora.targets=\[\] must be some of wq,"),
        ({"targets": ("wq", "wq")}, "each once"),
        ({"targets": ("experts",)}, r"train.lora.targets=\['experts'\] must be some of wq,"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        LoraConfig(**settings)


def test_layers_that_are_not_there_and_banks_of_experts_are_refused_by_name():
    for settings, target, said in [
        ({"moe": experts()}, "w1", "has w1, and .*its experts are banks, which take no adapter; leave it out"),
        ({"activation": "relu"}, "w3", "has w3, and this model has no such linear layer; leave it out"),
    ]:
        with pytest.raises(ValueError, match=said):
            apply_lora(build(**settings), LoraConfig(targets=("wq", target)))


def test_foreign_adapters_are_refused_by_what_is_foreign(tmp_path):
    save_adapter(adapted({}, ATTENTION), tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change, said in [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not .* changed base weights"),
        ({"r": 5}, r"lora_A.weight is \[3, 32\], the model calls for \[5, 32\]"),
        ({"r": 0}, "train.lora.rank=0"),
    ]:
        path.write_text(json.dumps({**settings, **change}))
        model = build()
        with pytest.raises(UnsupportedModel, match=said):
            load_adapter(model, tmp_path)
        assert not lora_layers(model)
    path.write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel, match=r"layers\.2\..* is of no layer of this model"):
        load_adapter(build(num_layers=2), tmp_path)
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(build(), tmp_path)
