"""The files of a checkpoint, and torch's distributed checkpoint (DCP) reading and writing them.

    rank-00000.bin, ...   raw tensor bytes, shard after shard: one file a rank
    index.json            dtype, shape and shards of every tensor; each shard's place, bytes and checksum

No pickle: a checkpoint is data, and reading one can run nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import Metadata, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llama.training.artifact import Artifact, Attempt, Entry, Files, Manifest

INDEX = "index.json"


class CorruptCheckpoint(RuntimeError):
    """A checkpoint's bytes are not those that were written."""


@dataclass(frozen=True)
class Shard:
    """A rectangular piece of a tensor and where its bytes lie."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    checksum: str


@dataclass(frozen=True)
class StoredTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class _Written:
    """A shard on its way from the rank that wrote it to the coordinator."""

    shard: Shard
    entry: Entry


class ArtifactWriter(StorageWriter):
    """DCP's writer into an artifact: every rank its file, then the coordinator the index, then the manifest.

    DCP calls `finish` only when every rank's `write_data` has returned, that is when all parts are durable, and raises
    on all ranks when one failed; so a manifest exists only for a whole checkpoint.

    Args:
        artifact: where to; used on the coordinator only, which begins the attempt and tells the others its folder.
        metadata: JSON for the manifest.
    """

    def __init__(self, artifact: Artifact, metadata: dict[str, Any]) -> None:
        self._artifact = artifact
        self._metadata = metadata
        self._attempt: Attempt | None = None

    def reset(self, checkpoint_id: object = None) -> None:
        self._attempt = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._attempt = self._artifact.begin()
        folder = self._attempt.store
        return [SavePlan(plan.items, (folder, f"rank-{rank:05d}.bin")) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder, path = plan.storage_data
        shards: list[tuple[MetadataIndex, Shard, int]] = []
        end = 0
        with folder.open_output(path) as output:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                if item.tensor_data is None or not isinstance(tensor, Tensor):
                    raise TypeError(f"{item.index.fqn} is not a tensor; a checkpoint holds tensors and JSON only")
                data = _bytes_of(tensor)
                output.write(data)
                chunk = item.tensor_data.chunk
                checksum = xxhash.xxh3_64_hexdigest(data)
                shards.append(
                    (item.index, Shard(tuple(chunk.offsets), tuple(chunk.sizes), path, end, checksum), len(data))
                )
                end += len(data)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, size, _Written(shard, output.entry)) for index, shard, size in shards])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._attempt is not None
        shards: dict[str, list[Shard]] = {}
        entries: dict[str, Entry] = {}
        for result in (result for rank in results for result in rank):
            written: _Written = result.storage_data
            shards.setdefault(result.index.fqn, []).append(written.shard)
            entries[written.entry.path] = written.entry
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            tensors[name] = StoredTensor(stored.properties.dtype, tuple(stored.size), tuple(shards[name]))
        with self._attempt.store.open_output(INDEX) as output:
            output.write(_index_to_json(tensors))
        self._attempt.commit(self._metadata, [*entries.values(), output.entry])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return False


class ArtifactReader(StorageReader):
    """DCP's reader of a committed artifact; a shard is read whole and checked, then cut to what the rank needs."""

    def __init__(self, files: Files, tensors: Mapping[str, StoredTensor]) -> None:
        self._files = files
        self._tensors = tensors

    def reset(self, checkpoint_id: object = None) -> None:
        pass

    def read_metadata(self, *args: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(at.offsets), torch.Size(at.shape)) for at in tensor.shards],
                )
                for name, tensor in self._tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[tuple[str, Shard], list[Any]] = {}
        for item in plan.items:
            name, offsets = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            shard = next(shard for shard in self._tensors[name].shards if shard.offsets == offsets)
            wanted.setdefault((name, shard), []).append(item)
        with _ShardFiles(self._files) as files:
            for (name, shard), items in sorted(wanted.items(), key=lambda pair: (pair[0][1].file, pair[0][1].begin)):
                stored = files.read(name, self._tensors[name].dtype, shard)
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(stored[_box(item.storage_offsets, item.lengths)])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return False


def read_index(files: Files, manifest: Manifest) -> dict[str, StoredTensor]:
    """The tensors of a committed checkpoint.

    Raises:
        CorruptCheckpoint: the index is not the one that was committed.
    """
    with files.open_input(INDEX) as source:
        data = source.read()
    checksum = f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"
    if checksum not in (entry.checksum for entry in manifest.files if entry.path == INDEX):
        raise CorruptCheckpoint(
            f"{INDEX} is not what was written; delete the checkpoint and resume from an earlier one"
        )
    try:
        return {
            name: StoredTensor(
                _dtype(stored["dtype"]),
                tuple(stored["shape"]),
                tuple(
                    Shard(tuple(at["offsets"]), tuple(at["shape"]), at["file"], at["begin"], at["xxh3_64"])
                    for at in stored["shards"]
                ),
            )
            for name, stored in json.loads(data)["tensors"].items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{INDEX} is no checkpoint index ({error!r}); delete the checkpoint") from error


def check_stored(tensors: Mapping[str, StoredTensor], into: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a name that is not stored, or in another shape."""
    for name, target in into.items():
        if name not in tensors:
            raise ValueError(f"the checkpoint has no tensor {name}; it was written by another model")
        if tensors[name].shape != tuple(target.shape):
            raise ValueError(f"{name} has shape {tuple(target.shape)}, the checkpoint's has {tensors[name].shape}")


def read_tensors(files: Files, tensors: Mapping[str, StoredTensor], into: Mapping[str, Tensor]) -> None:
    """Fills plain tensors with the stored ones of the same name, in one process, whatever layout wrote them.

    Raises:
        ValueError: a name is absent or a shape differs.
        CorruptCheckpoint: bytes are missing or wrong.
    """
    check_stored(tensors, into)
    shards = [(name, shard) for name in into for shard in tensors[name].shards]
    with _ShardFiles(files) as source:
        for name, shard in sorted(shards, key=lambda pair: (pair[1].file, pair[1].begin)):
            stored = source.read(name, tensors[name].dtype, shard)
            into[name].detach()[_box(shard.offsets, shard.shape)].copy_(stored)


class _ShardFiles:
    """Open files of one checkpoint; closed at the end of the block."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._stack = ExitStack()
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> _ShardFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str, dtype: torch.dtype, shard: Shard) -> Tensor:
        """The shard of tensor `name`. Raises CorruptCheckpoint if its bytes are missing or wrong."""
        if shard.file not in self._open:
            self._open[shard.file] = self._stack.enter_context(self._files.open_input(shard.file))
        source = self._open[shard.file]
        source.seek(shard.begin)
        size = torch.Size(shard.shape).numel() * dtype.itemsize
        data = bytearray(source.read(size))
        if len(data) != size or xxhash.xxh3_64_hexdigest(data) != shard.checksum:
            raise CorruptCheckpoint(
                f"{shard.file}: the {size} bytes of {name} at {shard.begin} are not those that were written; "
                "delete this checkpoint and resume from an earlier one"
            )
        flat = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return flat.reshape(shard.shape)


def _index_to_json(tensors: Mapping[str, StoredTensor]) -> bytes:
    value = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": tensor.shape,
            "shards": [
                {"offsets": at.offsets, "shape": at.shape, "file": at.file, "begin": at.begin, "xxh3_64": at.checksum}
                for at in tensor.shards
            ],
        }
        for name, tensor in tensors.items()
    }
    return json.dumps({"tensors": value}).encode()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _bytes_of(tensor: Tensor) -> memoryview:
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _box(offsets: Iterable[int], shape: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, shape, strict=True))
