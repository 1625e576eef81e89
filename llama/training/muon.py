"""Muon: momentum whose matrices are made orthogonal (Keller Jordan, 2024), for a sharded model.

Legend: N matrices of one shape, O rows, I columns, P ranks that share the rows of each.

    m ← μ·m + (1 − μ)·g                    momentum, elementwise, on each rank's shard
    u ← (1 − μ)·g + μ·m                    Nesterov
    W ← W − lr·(0.2·√max(O, I)·orthogonal(u) + λ·W)

The factor gives an update the root mean square of AdamW's, so that its learning rate and decay carry over ("Muon is
Scalable", arXiv:2502.16982, §2.2, eq. 4). Embeddings, the output head, norms and biases are left to AdamW (ibid.), and
so are routers: a row is the direction of one expert, and an orthogonal update would move an idle expert's as far as a
busy one's, whatever the balance losses weigh.

Only the orthogonalisation needs whole matrices. All matrices of one shape, the experts of a bank among them, travel
in one all-to-all over the P ranks that share their rows, each to the one rank that works on it, and back in another:

    [N, O/P, I] ──all-to-all──▶ [N/P, O, I] ── orthogonalise ──▶ [N/P, O, I] ──all-to-all──▶ [N, O/P, I]

Cost per rank: (P − 1)/P of its shard sent each way, N/P matrices of work, and memory for its shard thrice. A bank that
is cut between experts has nothing to send. Replicas repeat the work: sharing it would cost a broadcast between nodes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from llama.moe import Experts
from llama.training.config import OptimizerConfig
from llama.training.mesh import local

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(x_NOI: Tensor, dtype: torch.dtype) -> Tensor:
    """About U·Vᵀ of each matrix U·S·Vᵀ, its singular values anywhere near 1: between 0.7 and 1.2, most of them.

    Five steps of the quintic Newton–Schulz iteration X ← a·X + b·(XXᵀ)X + c·(XXᵀ)²X from X / ‖X‖, whose coefficients
    are steep at 0 rather than convergent (Jordan et al., kellerjordan.github.io/posts/muon).

    Args:
        dtype: of the products; the result has the input's.
    """
    tall = x_NOI.shape[-2] > x_NOI.shape[-1]
    x = x_NOI.mT if tall else x_NOI
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).to(dtype)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(x_NOI.dtype)


def block_matrices(model: nn.Module) -> set[Tensor]:
    """The matrices inside the model's blocks, banks of experts included; neither routers nor gates of one row."""
    found: set[Tensor] = set()
    blocks = [child for name, child in model.named_children() if name in ("layers", "encoder_layers")]
    for module in (module for block in blocks for module in block.modules()):
        if isinstance(module, nn.Linear) and module.out_features > 1:
            found.add(module.weight)
        elif isinstance(module, Experts):
            found |= {bank for bank in (module.w1, module.w2, module.w3) if bank is not None}
    return found


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, and the optimizer `others` for its own parameters, as one.

    Matrices are `[O, I]` or banks `[experts, O, I]`, plain or as FSDP shards them. Every rank steps together. Products
    are bf16 on an accelerator, where that is many times faster and accurate enough, and fp32 on the CPU.
    """

    def __init__(
        self, matrices: list[nn.Parameter], config: OptimizerConfig, others: torch.optim.Optimizer | None
    ) -> None:
        super().__init__(matrices, {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum})
        self._matrices = self.param_groups[0]
        self._others = others
        for matrix in matrices:
            self.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix, requires_grad=False)}
        if others is not None:
            self.param_groups += others.param_groups
            self.state.update(others.state)
            others.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, by gradients that are there: a closure that computes them is not taken."""
        if closure is not None:
            raise ValueError("Muon takes no closure; compute the gradients before the step")
        group = self._matrices
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        weights, updates = [local(matrix) for matrix in matrices], self._momentum(matrices, group["momentum"])
        self._orthogonalise(matrices, updates)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        factors = [-0.2 * group["lr"] * math.sqrt(max(matrix.shape[-2:])) for matrix in matrices]
        torch._foreach_mul_(updates, factors)
        torch._foreach_add_(weights, updates)
        if self._others is not None:
            self._others.step()

    def _momentum(self, matrices: list[nn.Parameter], momentum: float) -> list[Tensor]:
        gradients = [local(matrix.grad) for matrix in matrices if matrix.grad is not None]
        buffers = [local(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, buffers, momentum))

    def _orthogonalise(self, matrices: list[nn.Parameter], updates: list[Tensor]) -> None:
        """Replaces this rank's shards of the updates by those of the orthogonal matrices."""
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for matrix, update in zip(matrices, updates, strict=True):
            key = (matrix.shape[-2:], _row_group(matrix))
            alike.setdefault(key, []).append(update if update.ndim == 3 else update[None])
        turn = 0
        for ((rows, _), group), shards in alike.items():
            stacked = torch.cat(shards)
            dtype = torch.float32 if stacked.device.type == "cpu" else torch.bfloat16
            if group is None:
                stacked = orthogonalise(stacked, dtype)
            else:
                exchange = _RowExchange(group, len(stacked), rows, turn)
                stacked = exchange.scatter(orthogonalise(exchange.gather(stacked), dtype))
            turn += len(stacked)
            torch._foreach_copy_(shards, list(stacked.split([len(shard) for shard in shards])))


class _RowExchange:
    """Matrices that P ranks hold by rows, to whole matrices on one rank each, and back.

    Args:
        matrices: N, the same on every rank.
        rows: O; a rank has as many of them as `torch.chunk` would give it, as FSDP cuts them.
        turn: matrices that were given out before, so that no rank is always the first to get one.
    """

    def __init__(self, group: dist.ProcessGroup, matrices: int, rows: int, turn: int) -> None:
        ranks, most = group.size(), -(-rows // group.size())
        self._group = group
        self._rows = [min(most, max(0, rows - rank * most)) for rank in range(ranks)]
        self._owned = [len(range((rank - turn) % ranks, matrices, ranks)) for rank in range(ranks)]
        self._rank = group.rank()

    def gather(self, shards_NQI: Tensor) -> Tensor:
        """Q of this rank's rows of all matrices → all rows of this rank's matrices."""
        columns, mine = shards_NQI.shape[2], self._owned[self._rank]
        here = self._rows[self._rank]
        arrived = self._send(shards_NQI, [owned * here for owned in self._owned], [mine * rows for rows in self._rows])
        parts = arrived.split([mine * rows for rows in self._rows])
        shapes = ((mine, rows, columns) for rows in self._rows)
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim=1)

    def scatter(self, whole_NOI: Tensor) -> Tensor:
        """The way back of `gather`."""
        columns, mine = whole_NOI.shape[2], self._owned[self._rank]
        here = self._rows[self._rank]
        leaving = torch.cat([part.reshape(-1, columns) for part in whole_NOI.split(self._rows, dim=1)])
        arrived = self._send(leaving, [mine * rows for rows in self._rows], [owned * here for owned in self._owned])
        return arrived.view(sum(self._owned), here, columns)

    def _send(self, x: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        """`leaving[p]` consecutive rows go to rank p, `arriving[p]` come from it."""
        flat = x.reshape(-1, x.shape[-1])
        received = flat.new_empty((sum(arriving), flat.shape[1]))
        dist.all_to_all_single(received, flat, arriving, leaving, group=self._group)
        return received


def _row_group(matrix: Tensor) -> dist.ProcessGroup | None:
    """The ranks that share this matrix's rows; None when this one has them all."""
    if not isinstance(matrix, DTensor):
        return None
    for axis, placement in enumerate(matrix.placements):
        if isinstance(placement, Shard) and placement.dim == matrix.ndim - 2 and matrix.device_mesh.size(axis) > 1:
            return matrix.device_mesh.get_group(axis)
    return None
