"""Parallelism applied to a plain model: FSDP2 on the dense mesh, experts on the sparse one.

    model = Transformer(config), or Seq2Seq(config), on the meta device
    apply_parallel(model, meshes, precision)           # each block: recomputation → compilation → FSDP
    init_sharded_weights(model, seed, device)          # or load a checkpoint

Gradients are sums: FSDP's averaging is off, because the trainer divides its loss by the global number of tokens, and
an average over a mesh would make expert gradients `ep` times too large. Weights, gradients and reductions are fp32;
`bf16` casts the gathered parameters, so that forward and backward compute in bf16 and gathers move half the bytes.

Plain replication is a mesh of one shard: FSDP's gather is then a copy inside the process, and its all-reduce over the
replicas the only communication.

Not built, and where it would go: tensor parallelism is one more mesh axis, innermost, whose plan cuts a block's
projections before recomputation is applied; pipeline parallelism the outermost one, which cuts `model.layers` into
stages, each of which goes through `apply_parallel` as the whole does here, under a schedule in place of the loop over
micro-batches in llama/training/step.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Container
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llama.all_to_all import AllToAllDispatch
from llama.lora import lora_layers
from llama.model import LanguageModel
from llama.moe import Experts, MoE
from llama.training.mesh import Meshes, check_experts_shard
from llama.training.recompute import ActivationCheckpointing, recompute_activations

ModelT = TypeVar("ModelT", bound=LanguageModel)


def apply_parallel(
    model: ModelT,
    meshes: Meshes,
    precision: Literal["fp32", "bf16"],
    *,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile: bool = False,
) -> ModelT:
    """Shards a plain model in place: every block a unit of FSDP, the rest one more, experts split over `ep`.

    On an accelerator a block's gathered parameters are dropped after its forward pass and gathered again in backward
    (ZeRO-3); on the CPU, and where one rank holds all of a copy, they stay until backward is done, which saves the
    second gather at the price of memory.

    Args:
        model: on the meta device, or with its weights on the meshes' device.

    Raises:
        ValueError: the experts cannot be split evenly; names field, value and remedy.
    """
    check_experts_shard(model.config, meshes.plan)
    if compile:
        _check_compiler()
    reshard = meshes.dense.device_type != "cpu" and meshes.plan.dp_shard > 1
    policy = mixed_precision(precision)
    dense = _data_mesh(meshes.dense, "dp_replicate", "dp_shard")
    random = model.config.attention_dropout > 0 or model.config.residual_dropout > 0
    random = random or any(layer.config.dropout > 0 for layer in lora_layers(model).values())
    for block in model.blocks():
        moe = block.feed_forward if isinstance(block.feed_forward, MoE) else None
        # In this order: a compiler must see the repetition, and FSDP's hooks lie outside of both.
        recompute_activations(block, activation_checkpointing, random=random)
        if compile:
            if moe is not None:
                # How many rows an expert gets is data, and a compiler would make a variant of each layer's entry in
                # the routing record: the experts stay as they are, with kernels of their own (llama/kernels/rows.py).
                moe.forward = torch.compiler.disable(moe.forward)  # type: ignore[method-assign]
            block.compile()
        experts = moe.experts if moe is not None else None
        if moe is not None and meshes.sparse is not None:
            _split_experts(moe, meshes.sparse, policy, reshard)
        fully_shard(
            block,
            mesh=dense,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=_placement(experts, meshes.plan.dp_shard),
        )
    fully_shard(model, mesh=dense, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The order matters: without the plain sum, the factor makes FSDP ask gloo for an operation it lacks.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model


def mixed_precision(precision: Literal["fp32", "bf16"]) -> MixedPrecisionPolicy:
    """Inputs are not cast: the embedding already gives the compute type, and rotary tables must stay fp32."""
    if precision == "fp32":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def moe_layers(model: LanguageModel) -> dict[int, MoE]:
    """The mixture-of-experts feed-forwards by layer, in order; empty for a dense model."""
    return {module.layer: module for module in model.modules() if isinstance(module, MoE)}


def init_sharded_weights(model: LanguageModel, seed: int, device: torch.device) -> None:
    """Materialises a sharded model on `device` with the weights that `model.init_weights(seed)` gives a plain one."""
    allocate_sharded(model, device)
    draw_weights(model, seed, model.state_dict())


def allocate_sharded(model: LanguageModel, device: torch.device) -> None:
    """Materialises a sharded model on `device`: parameters are anything, buffers at their start."""
    model.to_empty(device=device)
    model.reset_buffers()


@torch.no_grad()
def draw_weights(model: LanguageModel, seed: int, names: Container[str]) -> None:
    """Sets the parameters among `names` to their start values, as `model.init_weights(seed)` does.

    Every rank draws each full parameter and keeps its shard, one parameter at a time: no communication, and the same
    start whatever the layout.
    """
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        full = model.initial_weight(name, parameter.shape, seed).to(parameter.device)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)


def _data_mesh(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    """The axes FSDP works on; without replicas one axis, which spares an all-reduce over a group of one."""
    return mesh[replicate, shard] if mesh[replicate].size() > 1 else mesh[shard]


def _placement(experts: Experts | None, shards: int) -> Callable[[nn.Parameter], Shard | None] | None:
    """Cuts expert banks through the experts where their number does not divide: rows of one expert always do."""
    if experts is None or experts.w1.shape[0] % shards == 0:
        return None
    banks = {id(parameter) for parameter in (experts.w1, experts.w2, experts.w3) if parameter is not None}
    return lambda parameter: Shard(1) if id(parameter) in banks else None


def _split_experts(moe: MoE, sparse: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool) -> None:
    """Whole experts over `ep`, then each expert's rows over `efsdp`."""
    num_experts = moe.experts.w1.shape[0]
    for name, parameter in list(moe.experts.named_parameters()):
        shard = distribute_tensor(parameter.data, sparse["ep"], [Shard(0)], src_data_rank=None)
        moe.experts.register_parameter(name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
    fully_shard(
        moe.experts,
        mesh=_data_mesh(sparse, "dp_replicate", "efsdp"),
        mp_policy=policy,
        reshard_after_forward=reshard,
        shard_placement_fn=lambda parameter: Shard(1),
    )
    moe.dispatch = AllToAllDispatch(sparse["ep"].get_group(), num_experts)


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")  # as torch's own compiler looks for it
    if shutil.which(compiler) is None:
        raise ValueError(
            f"train.compile=True needs a C++ compiler, and {compiler} is not there; get it or set train.compile=False"
        )
