"""The optimizer and its decay groups, its state by parameter name, and clipping by the true global norm.

Optimizer state is created at once, not at the first step, and addressed by parameter name: a checkpoint then has the
same keys at any moment and under any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama.training.config import OptimizerConfig
from llama.training.mesh import local
from llama.training.muon import Muon, block_matrices


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of `config.kind` over the parameters that are trained, its state allocated.

    Raises:
        ValueError: Muon, and no matrix of the blocks is trained.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.kind == "adamw":
        return _adamw(model, trained, config)
    inside = block_matrices(model)
    matrices = [parameter for parameter in trained if parameter in inside]
    others = [parameter for parameter in trained if parameter not in inside]
    if not matrices:
        raise ValueError(
            "train.optimizer.kind=muon is for matrices of the blocks, and none is trained here; "
            "set train.optimizer.kind=adamw"
        )
    return Muon(matrices, config, _adamw(model, others, config) if others else None)


def _adamw(model: nn.Module, parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW, fused.

    Matrices decay; norms, biases and embeddings do not. Parameters of different meshes sit in different groups, because
    a fused step takes DTensors of one mesh only.
    """
    plain = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    plain |= {parameter for name, parameter in model.named_parameters() if name.endswith("relative_bias")}
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.ndim >= 2 and parameter not in plain, mesh), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "weight_decay": config.weight_decay if decays else 0.0}
            for (decays, _), members in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's own state tensors, to save or to load into, as `{parameter name}.{key}`.

    The keys are exp_avg, exp_avg_sq and step for AdamW, momentum_buffer for Muon.
    """
    return {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key, tensor in optimizer.state[parameter].items()
    }


def _copies(tensor: Tensor, world_size: int) -> int:
    """Ranks that hold the same shard of `tensor`."""
    if not isinstance(tensor, DTensor):
        return world_size
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def local_square_sum(gradients: Iterable[Tensor], world_size: int) -> Tensor:
    """This rank's share of the squared global gradient norm, float64; the shares of all ranks add up to it.

    A shard that several ranks hold counts once in the sum. That is what makes one norm out of gradients that live on
    different meshes: summing shares over all ranks needs no mesh at all.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(_copies(gradient, world_size), []).append(local(gradient))
    squares = [
        nn.utils.get_total_norm(shards, foreach=True).double().square() / copies for copies, shards in by_copies.items()
    ]
    return torch.stack(squares).sum()


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Factor that brings a gradient of `norm` down to `max_norm`; 1 when it is no larger, or `max_norm` is 0 (off).

    Pascanu et al., arXiv:1211.5063, algorithm 1.
    """
    return max_norm / norm if 0 < max_norm < norm else 1.0


@torch.no_grad()
def scale_gradients(gradients: Iterable[Tensor], coefficient: float) -> None:
    """Multiplies the gradients in place."""
    shards = [local(gradient) for gradient in gradients]
    if coefficient != 1.0 and shards:
        torch._foreach_mul_(shards, coefficient)
