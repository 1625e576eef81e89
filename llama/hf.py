"""Hugging Face directories, both ways.

Read and written are Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and Ernie-4.5-MoE
(llama/hf_architectures.py). A model that none of them expresses is written as `CaravanForCausalLM`, which transformers
loads once `llama.hf_model` has been imported. Nothing here needs transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.config import ModelConfig
from llama.hf_architectures import Architecture, UnsupportedModel
from llama.hf_config import CARAVAN_NAME, find_architecture, read_config, write_caravan_config, write_config
from llama.hf_files import CONFIG_FILE, DirectoryWriter, Slot, StoredTensors
from llama.hf_names import EMBEDDINGS, LM_HEAD, StoredTensor, stored_tensors, turn_rows
from llama.model import Transformer
from llama.tokenizer import Tokenizer

__all__ = ["MAX_SHARD_SIZE", "UnsupportedModel", "export_architecture", "load_pretrained", "save_pretrained"]


MAX_SHARD_SIZE = 5 * 1000**3
"""Bytes of one weights file, as transformers has it."""
_BUFFERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Tensors that follow from the config and that older versions of transformers stored."""


def export_architecture(config: ModelConfig) -> str:
    """The class of transformers that `save_pretrained` writes a model of this config as.

    A model whose routing biases are set although its config does not train them is written as one that has them.
    """
    architecture = find_architecture(config, _trains_expert_bias(config))
    return architecture.name if architecture is not None else CARAVAN_NAME


def _trains_expert_bias(config: ModelConfig) -> bool:
    return config.moe is not None and config.moe.bias_update_rate > 0


# --- saving ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_pretrained(
    model: Transformer,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> str:
    """Writes a directory that `transformers.AutoModelForCausalLM` loads.

    One tensor at a time is converted and written; what the directory held of an earlier model is removed first, and
    `config.json` comes last: a directory without it is unfinished.

    Args:
        model: a plain (unsharded) model.
        tokenizer: written beside the weights when given, chat template included.
        dtype: floating type of the stored weights; None keeps the model's. Routing biases are always fp32.
        max_shard_size: bytes of one weights file; more make several and an index.

    Returns:
        the class that loads it: one of transformers' that computes the same function, or `CaravanForCausalLM`.
    """
    directory = Path(directory)
    config, state = model.config, model.state_dict()
    dtype = dtype or model.tok_embeddings.weight.dtype
    biased = any(bool(tensor.any()) for name, tensor in state.items() if name.endswith("router.expert_bias"))
    architecture = find_architecture(config, biased or _trains_expert_bias(config))
    entries = list(stored_tensors(config, architecture))
    slots = [Slot(entry.stored, entry.shape, torch.float32 if entry.expert_bias else dtype) for entry in entries]
    token_ids = {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": tokenizer.eos_id if tokenizer else None,
        "pad_token_id": tokenizer.pad_id if tokenizer else None,
    }
    writer = DirectoryWriter(directory)
    writer.write_weights(slots, _outgoing(config, state, entries, architecture), max_shard_size)
    if tokenizer is not None:
        tokenizer.save(directory)
    writer.write_json("generation_config.json", token_ids)
    hf_config = write_caravan_config(config) if architecture is None else write_config(config, architecture)
    name = str(dtype).removeprefix("torch.")
    # transformers 5 reads dtype, 4 torch_dtype.
    writer.write_json(CONFIG_FILE, {**hf_config, **token_ids, "dtype": name, "torch_dtype": name})
    return architecture.name if architecture is not None else CARAVAN_NAME


def _outgoing(
    config: ModelConfig, state: dict[str, Tensor], entries: list[StoredTensor], architecture: Architecture | None
) -> Iterator[Tensor]:
    for entry in entries:
        tensor = state[entry.name] if entry.expert is None else state[entry.name][entry.expert]
        if entry.turned and architecture is not None:
            tensor = turn_rows(tensor, config.resolved_head_dim, config.rope_layout, architecture.rope_layout)
        yield tensor.view(entry.shape)


# --- loading --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_pretrained(directory: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Reads a Hugging Face directory of a supported architecture, one tensor at a time.

    Returns:
        a model in evaluation mode with its `config`; routing biases stay fp32, Ernie's are zero where absent.

    Raises:
        UnsupportedModel: another architecture or an unsupported setting; a tensor that is missing, misshapen or
            belongs nowhere.
        FileNotFoundError: no `config.json`.
    """
    directory = Path(directory)
    config_path = directory / CONFIG_FILE
    if not config_path.is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG_FILE}; give a directory of a Hugging Face model")
    config, architecture = read_config(_read_json(config_path))
    with StoredTensors(directory) as tensors:
        entries = list(stored_tensors(config, architecture))
        _check_names(directory, config, architecture, entries, tensors)
        model = _empty_model(config, dtype)
        state = model.state_dict()
        for entry in entries:
            if entry.stored in tensors:
                _load(directory, config, architecture, entry, tensors[entry.stored], state)
    return model.eval()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} is not a JSON object")
    return content


def _empty_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A model of uninitialised `dtype` parameters and zero fp32 routing biases."""
    with torch.device("meta"):
        model = Transformer(config)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, dtype=dtype)))
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    return model


def _check_names(
    directory: Path,
    config: ModelConfig,
    architecture: Architecture | None,
    entries: list[StoredTensor],
    tensors: StoredTensors,
) -> None:
    """Every tensor of the model is in the files, and every tensor of the files is in the model."""
    for entry in entries:
        optional = entry.expert_bias and architecture is not None
        if entry.stored not in tensors and not optional:
            raise UnsupportedModel(f"{directory}: tensor {entry.stored} is missing; the model is incomplete")
    left = sorted(tensors.names() - {entry.stored for entry in entries})
    if architecture is not None:
        if config.tie_embeddings and LM_HEAD in left:
            left.remove(LM_HEAD)
            if not torch.equal(tensors[LM_HEAD], tensors[EMBEDDINGS]):
                raise UnsupportedModel(
                    f"{directory}: {LM_HEAD} differs from {EMBEDDINGS} although config.json says "
                    "tie_word_embeddings=True; set it to False"
                )
        ignored = (_BUFFERS, *map(re.compile, architecture.ignored_tensors))
        left = [name for name in left if not any(pattern.search(name) for pattern in ignored)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UnsupportedModel(
            f"{directory}: tensor {left[0]}{more} belongs to nothing that config.json describes; the settings and the "
            "weights are of different models"
        )


def _load(
    directory: Path,
    config: ModelConfig,
    architecture: Architecture | None,
    entry: StoredTensor,
    tensor: Tensor,
    state: dict[str, Tensor],
) -> None:
    target = state[entry.name] if entry.expert is None else state[entry.name][entry.expert]
    if tuple(tensor.shape) != entry.shape:
        raise UnsupportedModel(
            f"{directory}: tensor {entry.stored} has shape {list(tensor.shape)}, config.json calls for "
            f"{list(entry.shape)}"
        )
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise UnsupportedModel(
            f"{directory}: tensor {entry.stored} is {tensor.dtype}; quantised weights are not supported"
        )
    if entry.turned and architecture is not None:
        tensor = turn_rows(tensor, config.resolved_head_dim, architecture.rope_layout, config.rope_layout)
    target.copy_(tensor.view(target.shape))
