import pytest
import torch

from llama import ModelConfig, Transformer
from llama.autocast import autocast_dtype, autocast_off


def test_says_what_autocast_would_do() -> None:
    x = torch.ones(2)
    assert autocast_dtype(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(x) == torch.bfloat16
        with autocast_off(x):
            assert autocast_dtype(x) is None and (x[None] @ x[:, None]).dtype == torch.float32
    assert autocast_dtype(x.to("meta")) is None


@pytest.mark.parametrize("labels", [False, True])
def test_a_model_computes_shapes_on_the_meta_device(labels: bool) -> None:
    config = ModelConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4)
    with torch.device("meta"):
        model, tokens = Transformer(config), torch.zeros(2, 5, dtype=torch.long)
    out = model(tokens, labels=tokens if labels else None)
    assert out.shape == (() if labels else (2, 5, 61))
