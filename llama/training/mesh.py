"""How ranks are arranged: a dense mesh for most parameters, a sparse one for the experts, over the same ranks.

    dense   (dp_replicate, dp_shard)
    sparse  (dp_replicate, efsdp, ep)        efsdp · ep = dp_shard

`ep` is innermost, so an expert-parallel group is a run of consecutive ranks, and Ray keeps a node's ranks
consecutive: groups stay inside a node when the node's worker count is a multiple of `ep`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from llama.config import ModelConfig
from llama.training.config import ParallelConfig, TrainConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class MeshPlan:
    """Sizes of the mesh axes; `world_size = dp_replicate * dp_shard`, `dp_shard = efsdp * ep`."""

    dp_replicate: int
    dp_shard: int
    ep: int

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def efsdp(self) -> int:
        """Ranks over which one slice of the experts is sharded further."""
        return self.dp_shard // self.ep


def check_experts_split(model: ModelConfig, ep: int) -> None:
    """Whether `ep` ranks can share the model's experts.

    Raises:
        ValueError: they cannot; names field, value and remedy.
    """
    if ep == 1:
        return
    if model.moe is None:
        raise ValueError(
            f"train.parallel.ep={ep} splits experts, but the model is dense; set train.parallel.ep=1 or model.moe"
        )
    if model.moe.num_experts % ep:
        raise ValueError(
            f"train.parallel.ep={ep} does not divide model.moe.num_experts={model.moe.num_experts}; "
            f"choose a divisor of {model.moe.num_experts}"
        )
    if model.activation == "swish_learned":
        raise ValueError(
            f"train.parallel.ep={ep} splits experts, but model.activation=swish_learned has one β for all of them; "
            "set train.parallel.ep=1 or model.activation=swish"
        )


def check_experts_shard(model: ModelConfig, plan: MeshPlan) -> None:
    """Whether the mesh can cut the model's experts: FSDP cuts rows of an expert in equal parts only.

    Raises:
        ValueError: it cannot; names field, value and remedy.
    """
    check_experts_split(model, plan.ep)
    moe = model.moe
    if moe is None or moe.expert_hidden_dim is None:
        return
    shards = plan.efsdp if plan.ep > 1 else plan.dp_shard
    if plan.ep == 1 and moe.num_experts % shards == 0:
        return
    for field, value in (("model.dim", model.dim), ("model.moe.expert_hidden_dim", moe.expert_hidden_dim)):
        if value % shards:
            raise ValueError(
                f"{field}={value} is not divisible by the {shards} ranks that share one expert "
                f"(train.parallel.dp_shard={plan.dp_shard}, train.parallel.ep={plan.ep}); choose a multiple of {shards}"
            )


def plan_mesh(parallel: ParallelConfig, world_size: int) -> MeshPlan:
    """Fits `parallel` to `world_size` ranks.

    Raises:
        ValueError: the axes do not multiply to the world size, or `ep` does not divide `dp_shard`.
    """
    if world_size % parallel.dp_replicate:
        raise ValueError(
            f"train.parallel.dp_replicate={parallel.dp_replicate} does not divide the {world_size} workers; "
            f"choose a divisor of {world_size}"
        )
    left = world_size // parallel.dp_replicate
    dp_shard = left if parallel.dp_shard == -1 else parallel.dp_shard
    if dp_shard != left:
        raise ValueError(
            f"train.parallel.dp_shard={dp_shard} times train.parallel.dp_replicate={parallel.dp_replicate} is not the "
            f"{world_size} workers; set train.parallel.dp_shard={left}, or -1 for all that are left"
        )
    if dp_shard % parallel.ep:
        raise ValueError(
            f"train.parallel.ep={parallel.ep} does not divide dp_shard={dp_shard} ({world_size} workers / "
            f"train.parallel.dp_replicate={parallel.dp_replicate}); choose a divisor of {dp_shard} or change the "
            "number of workers"
        )
    return MeshPlan(parallel.dp_replicate, dp_shard, parallel.ep)


def check_world_size(train: TrainConfig, model: ModelConfig, world_size: int) -> None:
    """Whether so many ranks can train this: the batch splits evenly, the mesh can be laid out, and cuts the experts.

    Raises:
        ValueError: they cannot; names field, value and remedy.
    """
    train.accumulation_steps(world_size)
    check_experts_shard(model, plan_mesh(train.parallel, world_size))


def fits_world_size(train: TrainConfig, model: ModelConfig, world_size: int) -> bool:
    """Whether `check_world_size` is content."""
    try:
        check_world_size(train, model, world_size)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Meshes:
    """The plan and its process groups."""

    plan: MeshPlan
    dense: DeviceMesh
    """(dp_replicate, dp_shard)"""
    sparse: DeviceMesh | None
    """(dp_replicate, efsdp, ep); None without expert parallelism: then experts are sharded like everything else."""


def build_mesh(parallel: ParallelConfig, world_size: int, device_type: str) -> Meshes:
    """Creates the meshes' process groups; every rank of an initialised default group must call it.

    Raises:
        ValueError: as `plan_mesh`.
    """
    from torch.distributed.device_mesh import init_device_mesh  # whoever only plans does without

    plan = plan_mesh(parallel, world_size)
    dense = init_device_mesh(
        device_type, (plan.dp_replicate, plan.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    if plan.ep == 1:
        return Meshes(plan, dense, None)
    sparse = init_device_mesh(
        device_type, (plan.dp_replicate, plan.efsdp, plan.ep), mesh_dim_names=("dp_replicate", "efsdp", "ep")
    )
    return Meshes(plan, dense, sparse)


@contextmanager
def process_group() -> Iterator[None]:
    """The default process group; for the time of the block one of a single rank where there is none."""
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of `tensor`, a DTensor or a plain one, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
