"""The routing that is drawn, against a router by hand on the same activations."""

import numpy as np
import pytest
import torch

from llama import Transformer
from llama.config import ModelConfig, MoEConfig
from llama.tokenizer_training import train_tokenizer
from pipelines.explain.registry import ExplainError
from pipelines.explain.routing import drawn_layers, repeated_alike, route, untrained

TEXT = "a cat and a dog, a dog and a cat"


def model_of(vocab_size: int, **moe: object) -> Transformer:
    config = ModelConfig(
        vocab_size=vocab_size,
        dim=32,
        num_layers=3,
        num_heads=2,
        max_seq_len=64,
        moe=MoEConfig(num_experts=5, top_k=2, expert_hidden_dim=8, first_dense_layers=1, **moe),
    )
    model = Transformer(config)
    model.init_weights(3)
    return model


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_weights_are_those_of_the_best_experts(score: str) -> None:
    tokenizer = train_tokenizer([TEXT], 280)
    model = model_of(tokenizer.vocab_size, score=score, normalize_top_k=True, route_scale=1.5)
    routing = route("m", model, tokenizer, TEXT, trained=False)
    assert list(routing.weights_TE) == [1, 2], "layer 0 is dense"
    assert "".join(routing.tokens).replace("␣", " ") == TEXT

    inputs = {}
    for layer in (1, 2):
        model.layers[layer].feed_forward.register_forward_pre_hook(
            lambda module, args, layer=layer: inputs.__setitem__(layer, args[0])
        )
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode(TEXT)]))
    for layer, weights_TE in routing.weights_TE.items():
        logits = (
            inputs[layer][0].double().numpy()
            @ model.layers[layer].feed_forward.router.weight.detach().double().numpy().T
        )
        affinities = (
            np.exp(logits) / np.exp(logits).sum(1, keepdims=True) if score == "softmax" else 1 / (1 + np.exp(-logits))
        )
        expected = np.zeros_like(weights_TE)
        for token, row in enumerate(affinities):
            best = np.argsort(row)[-2:]
            expected[token, best] = 1.5 * row[best] / row[best].sum()
        np.testing.assert_allclose(weights_TE, expected, atol=1e-5)
        np.testing.assert_array_equal(routing.chosen_TE[layer], expected > 0)


def test_repeated_tokens_without_context_go_alike() -> None:
    name, model, tokenizer = untrained(None, TEXT)
    routing = route(name, model, tokenizer, TEXT, trained=False)
    chosen = routing.chosen_TE
    pairs = [(i, j) for j in range(len(routing.ids)) for i in range(j) if routing.ids[i] == routing.ids[j]]
    firsts = [(i, j) for i, j in pairs if i == routing.ids.index(routing.ids[i])]
    for layer, share in repeated_alike(routing).items():
        assert share == sum((chosen[layer][i] == chosen[layer][j]).all() for i, j in firsts) / len(firsts)


def test_a_long_text_is_cut_where_the_model_ends() -> None:
    tokenizer = train_tokenizer([TEXT], 280)
    long = " ".join(str(number) for number in range(90))
    routing = route("m", model_of(tokenizer.vocab_size), tokenizer, long, trained=False)
    assert len(routing.tokens) == 48
    assert routing.further_tokens == len(tokenizer.encode(long)) - 48


def test_four_layers_of_many_are_drawn() -> None:
    assert drawn_layers([1, 2, 3]) == [1, 2, 3]
    assert drawn_layers(list(range(48))) == [0, 16, 31, 47]


def test_what_has_no_experts_is_refused() -> None:
    with pytest.raises(ExplainError, match="--preset=tiny has no experts; .*tiny-moe"):
        untrained("tiny", TEXT)
    with pytest.raises(ExplainError, match="46,702,792,704 weights, too many"):
        untrained("mixtral-8x7b", TEXT)
    dense = Transformer(ModelConfig(vocab_size=300, dim=32, num_layers=1, num_heads=2))
    with pytest.raises(ExplainError, match="the model has no experts"):
        route("the model", dense, train_tokenizer([TEXT], 280), TEXT, trained=True)
