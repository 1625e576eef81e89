"""Small random models for the tests of Hugging Face directories, in shapes that hide no mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama import ModelConfig, MoEConfig, Transformer
from llama.tokenizer import Tokenizer

VOCAB = 67


def build(**settings: Any) -> Transformer:
    """One key/value head and head_dim ≠ dim / heads unless told otherwise; every parameter and buffer random."""
    shape = {"vocab_size": VOCAB, "dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 1, "head_dim": 12}
    config = ModelConfig(**{**shape, "hidden_dim": 40, "max_seq_len": 128, "tie_embeddings": False, **settings})
    model = Transformer(config)
    model.init_weights(seed=1)
    randomize(model)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias") and (config.moe is None or not config.moe.bias_update_rate):
            buffer.zero_()
    return model.eval()


def experts(**settings: Any) -> MoEConfig:
    return MoEConfig(**{"num_experts": 5, "top_k": 2, "expert_hidden_dim": 24, **settings})


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights whose model has something to say: neither uniform answers nor one token for ever."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith(("expert_bias", "e_score_correction_bias")):
            tensor.uniform_(-0.1, 0.1, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(20, 40, generator=generator)  # about what these weights make of the residual stream
        elif tensor.dim() > 1:
            tensor.normal_(0.0, 0.25, generator=generator)
        else:
            offset = 1.0 if "norm" in name and not name.endswith(("bias", "running_mean")) else 0.0
            tensor.uniform_(-0.3, 0.3, generator=generator).add_(offset)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def small_tokenizer(size: int = VOCAB, **settings: Any) -> Tokenizer:
    """A tokenizer of `size` words, the first three of them special tokens; no token begins or pads a text."""
    vocab = {word: i for i, word in enumerate(["<eos>", "<end>", "<bos>", *(f"w{i}" for i in range(size - 3))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    return Tokenizer(backend, **{"bos_token": None, "eos_token": "<eos>", "pad_token": None, **settings})


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def load_theirs(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The directory as transformers loads it, every tensor accounted for by transformers' own count."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def error(actual: Tensor, reference: Tensor) -> float:
    """max |Δ| / max |reference|."""
    return float((actual.float() - reference.float()).abs().max() / reference.float().abs().max())
