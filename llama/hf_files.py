"""Directories of safetensors files: written tensor by tensor, read through memory maps.

The format is 8 bytes of header length, a JSON header and the tensors' bytes one after the other, so a writer that
knows the shapes beforehand never needs more than one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.counts import Shape
from llama.hf_values import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, UnsupportedModel, weight_files
from llama.tokenizer import GENERATION_CONFIG_FILE

_MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors", ".*.partial")
"""What belongs to a model and goes with it, `config.json` first."""
_TOKENIZER_FILES = (
    GENERATION_CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Slot:
    """A tensor that a file is going to hold.

    Raises:
        ValueError: a type that is not written.
    """

    name: str
    shape: Shape
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPE_NAMES:
            known = ", ".join(map(str, _DTYPE_NAMES))
            raise ValueError(f"dtype={self.dtype} cannot be written; give one of {known}")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class DirectoryWriter:
    """Replaces a model in a directory, and its tokenizer if told to; `config.json` goes first and comes back last.

    Between the two the directory holds no `config.json`, so nobody takes it for a model. Files appear under their names
    only when complete, and those of an earlier model are gone.
    """

    def __init__(self, directory: Path, *, with_tokenizer: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        for pattern in _MODEL_FILES + (_TOKENIZER_FILES if with_tokenizer else ()):
            for path in directory.glob(pattern):
                path.unlink()

    def write_weights(self, slots: list[Slot], tensors: Iterable[Tensor], max_shard_size: int) -> None:
        """Writes `tensors`, which come in the order of `slots`, into files of at most `max_shard_size` bytes.

        A tensor that is larger has a file to itself.
        """
        shards = _split(slots, max_shard_size)
        names = [WEIGHTS_FILE]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        stream = iter(tensors)
        for name, shard in zip(names, shards, strict=True):
            self._write_shard(name, shard, stream)
        if len(shards) > 1:
            weight_map = {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard}
            size = sum(slot.num_bytes for slot in slots)
            self.write_json(INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def _write_shard(self, name: str, slots: list[Slot], tensors: Iterator[Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for slot in slots:
            end = begin + slot.num_bytes
            header[slot.name] = {
                "dtype": _DTYPE_NAMES[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        partial = self._directory / f".{name}.partial"
        with partial.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for slot in slots:
                data = next(tensors).detach().to("cpu", slot.dtype).contiguous()
                if tuple(data.shape) != slot.shape:
                    raise ValueError(f"tensor {slot.name} has shape {list(data.shape)}, not {list(slot.shape)}")
                file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        os.replace(partial, self._directory / name)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        partial = self._directory / f".{name}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        os.replace(partial, self._directory / name)


def _split(slots: list[Slot], max_shard_size: int) -> list[list[Slot]]:
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if shards[-1] and size + slot.num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += slot.num_bytes
    return shards


class StoredTensors:
    """The tensors of a directory, memory-mapped. A context manager.

    Raises:
        UnsupportedModel: no safetensors file, a damaged one, a bad index, a file or tensor that the index names is
            missing or elsewhere, or a tensor is stored twice.
    """

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        self._readers: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        paths, weight_map = weight_files(directory)
        try:
            for path in paths:
                self._open(path)
            for name, file in weight_map.items():
                found = self._files.get(name, "none of its files")
                if found != file:
                    raise UnsupportedModel(f"{directory}: tensor {name} of {INDEX_FILE} is in {found}, not in {file}")
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise UnsupportedModel(
                f"{path.parent} holds no {path.name}; export the model again or download its weights as safetensors"
            )
        try:
            reader = self._stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise UnsupportedModel(f"{path} is damaged: {error}; export or download it again") from error
        for name in reader.keys():  # noqa: SIM118 (not a dict)
            if name in self._readers:
                raise UnsupportedModel(f"{path}: tensor {name} is in another file, too; remove the one that is stale")
            self._readers[name], self._files[name] = reader, path.name

    def names(self) -> set[str]:
        return set(self._readers)

    def __contains__(self, name: str) -> bool:
        return name in self._readers

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, its bytes read from the disk as they are touched."""
        try:
            return self._readers[name].get_tensor(name)
        except SafetensorError as error:
            raise UnsupportedModel(f"{self._files[name]}: tensor {name} cannot be read: {error}") from error

    def shape(self, name: str) -> Shape:
        """As the file's header has it, which `safe_open` has compared with the file's length."""
        return tuple(self._readers[name].get_slice(name).get_shape())

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
