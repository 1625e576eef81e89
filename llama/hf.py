"""Hugging Face directories, both ways.

Read and written are Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and Ernie-4.5-MoE
(llama/hf_architectures.py). A model that none of them expresses is written as `CaravanForCausalLM`, which transformers
loads once `llama.hf_model` has been imported. Nothing here needs transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from llama.config import ModelConfig
from llama.counts import parameter_shapes
from llama.hf_architectures import Architecture
from llama.hf_caravan import CARAVAN_NAME, write_caravan_config
from llama.hf_config import find_architecture, read_architecture, read_config, write_config
from llama.hf_files import DirectoryWriter, Slot, StoredTensors
from llama.hf_names import EMBEDDINGS, LM_HEAD, StoredTensor, stored_tensors, turn_rows
from llama.hf_values import CONFIG_FILE, UnsupportedModel, read_json
from llama.lora import base_state
from llama.model import LanguageModel, Transformer
from llama.tokenizer import GENERATION_CONFIG_FILE, Tokenizer

__all__ = [
    "MAX_SHARD_SIZE",
    "UnsupportedModel",
    "export_architecture",
    "load_pretrained",
    "load_weights",
    "save_pretrained",
]


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


def architecture_of(model: Transformer) -> Architecture | None:
    """The architecture that `save_pretrained` writes a plain model as; None is Caravan's own."""
    biased = any(bool(buffer.any()) for name, buffer in model.named_buffers() if name.endswith("router.expert_bias"))
    return find_architecture(model.config, biased or _trains_expert_bias(model.config))


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
        tokenizer: written beside the weights when given, chat template included, in place of all that the directory
            held of another. Without one, a tokenizer that is there stays, as with transformers' own `save_pretrained`.
        dtype: floating type of the stored weights; None keeps the model's. Routing biases and running statistics are
            always fp32.
        max_shard_size: bytes of one weights file; more make several and an index.

    Returns:
        the class that loads it: one of transformers' that computes the same function, or `CaravanForCausalLM`.

    Raises:
        ValueError: `dtype` is no floating type of 16 bits or more, or the tokenizer has more tokens than the model; the
            directory is as it was then.
    """
    directory = Path(directory)
    config, state = model.config, model.state_dict()
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={tokenizer.vocab_size} exceeds model.vocab_size={config.vocab_size}; give the "
            "tokenizer that the model was trained with"
        )
    dtype = dtype or model.tok_embeddings.weight.dtype
    architecture = architecture_of(model)
    entries = list(stored_tensors(config, architecture))
    slots = [Slot(entry.stored, entry.shape, torch.float32 if entry.buffer else dtype) for entry in entries]
    token_ids = tokenizer.named_ids if tokenizer else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    writer = DirectoryWriter(directory, with_tokenizer=tokenizer is not None)
    writer.write_weights(slots, _outgoing(config, state, entries, architecture), max_shard_size)
    if tokenizer is not None:
        tokenizer.save(directory)
    if tokenizer is not None or not (directory / GENERATION_CONFIG_FILE).exists():
        writer.write_json(GENERATION_CONFIG_FILE, token_ids)
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


@dataclass(frozen=True)
class _Source:
    """A directory whose names and shapes agree with its `config.json`."""

    directory: Path
    config: ModelConfig
    architecture: Architecture | None
    tensors: StoredTensors
    entries: list[StoredTensor]


@torch.no_grad()
def load_pretrained(directory: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Reads a Hugging Face directory of a supported architecture, one tensor at a time.

    Returns:
        a model in evaluation mode with its `config`; routing biases and running statistics stay fp32, Ernie's biases
        are zero where absent.

    Raises:
        UnsupportedModel: another architecture or an unsupported setting; a damaged file; a tensor that is missing,
            misshapen or belongs nowhere. Nothing is allocated before names and shapes agree.
        FileNotFoundError: no `config.json`.
    """
    with _open(Path(directory)) as source:
        model = _empty_model(source.config, dtype)
        _fill(source, source.config, model.state_dict())
    return model.eval()


@torch.no_grad()
def load_weights(directory: str | Path, model: LanguageModel) -> None:
    """Fills a model, sharded or not, from a Hugging Face directory; routing biases that are absent stay.

    Of a sharded model every rank reads the whole directory through memory maps and keeps its shards, without
    communication: beside them it holds one parameter at a time. Adapters (llama/lora.py) are left alone.

    Raises:
        UnsupportedModel: as `load_pretrained`, and parameters of other shapes or another kind of norm than the model's.
        FileNotFoundError: no `config.json`.
    """
    with _open(Path(directory)) as source:
        if parameter_shapes(source.config) != parameter_shapes(model.config):
            raise UnsupportedModel(f"{directory} holds a model of other shapes; give the config that it has")
        if source.config.norm != model.config.norm:  # whose parameters may have the same shapes
            raise UnsupportedModel(
                f"{directory} holds a model of model.norm={source.config.norm}, not {model.config.norm}; give the "
                "config that it has"
            )
        _fill(source, model.config, base_state(model))


@contextmanager
def _open(directory: Path) -> Iterator[_Source]:
    config_path = directory / CONFIG_FILE
    if not config_path.is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG_FILE}; give a directory of a Hugging Face model")
    hf = read_json(config_path)
    architecture = read_architecture(hf)
    with StoredTensors(directory) as tensors:
        _check_layers(directory, hf, architecture, tensors)
        config, _ = read_config(hf)
        yield _Source(
            directory, config, architecture, tensors, _check_tensors(directory, config, architecture, tensors)
        )


def _fill(source: _Source, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Copies every stored tensor to its place in the state of a model of `config`."""
    for name, entries in groupby(source.entries, key=lambda entry: entry.name):
        target = state[name]
        sharded = isinstance(target, DTensor)
        full = torch.empty(target.shape, dtype=target.dtype) if sharded else target
        for entry in entries:
            _load(source, config, entry, full)
        if isinstance(target, DTensor):
            full = full.to(target.device)
            target.copy_(distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None))


def _check_layers(
    directory: Path, hf: Mapping[str, Any], architecture: Architecture | None, tensors: StoredTensors
) -> None:
    """Refuses more layers than tensors, before anything of that length is built."""
    settings, key = (hf, "num_hidden_layers") if architecture is not None else (hf.get("model"), "num_layers")
    layers, most = settings.get(key) if isinstance(settings, Mapping) else None, len(tensors.names())
    if isinstance(layers, int) and layers > most:
        raise UnsupportedModel(f"{directory}: config.json says {key}={layers}, and the files hold {most} tensors")


def _empty_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A model of uninitialised `dtype` parameters and fp32 buffers at their start."""
    with torch.device("meta"):
        model = Transformer(config)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, dtype=dtype)))
    model.to_empty(device="cpu")
    model.reset_buffers()
    return model


def _check_tensors(
    directory: Path, config: ModelConfig, architecture: Architecture | None, tensors: StoredTensors
) -> list[StoredTensor]:
    """Every tensor of the model is in the files, in its shape, and every tensor of the files is in the model.

    Returns:
        those in the files; the first that is missing ends the search, however many experts `config.json` claims.
    """
    entries = []
    for entry in stored_tensors(config, architecture):
        if entry.stored in tensors:
            entries.append(entry)
            shape = tensors.shape(entry.stored)
            if shape != entry.shape:
                raise UnsupportedModel(
                    f"{directory}: tensor {entry.stored} has shape {list(shape)}, config.json calls for "
                    f"{list(entry.shape)}"
                )
        elif not entry.buffer or architecture is None:
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
    return entries


def _load(source: _Source, config: ModelConfig, entry: StoredTensor, parameter: Tensor) -> None:
    tensor = source.tensors[entry.stored]
    target = parameter if entry.expert is None else parameter[entry.expert]
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise UnsupportedModel(
            f"{source.directory}: tensor {entry.stored} is {tensor.dtype}; quantised weights are not supported"
        )
    if entry.turned and source.architecture is not None:
        have, want = source.architecture.rope_layout, config.rope_layout
        tensor = turn_rows(tensor, config.resolved_head_dim, have, want)
    target.copy_(tensor.view(target.shape))
