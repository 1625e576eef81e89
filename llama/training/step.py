"""One optimizer step.

Every rank runs its micro-batches forward and backward, FSDP adds the gradients up, the norm over both meshes clips
them, the optimizer moves the shards. Every loss is a sum divided by a count over all ranks, so the gradient is that of
the global batch, whatever the layout and the accumulation:

    loss = Σ cross-entropy / valid tokens of the step
         + Σ over micro-steps and MoE layers of (tokens of the micro-step / tokens of the step)
           · (balance_loss_weight · balance + z_loss_weight · z)

A balance loss that is per sequence weighs a micro-step by its sequences instead. Padding is no token. A micro-step is
one forward pass of all ranks. Its balance and z losses are functions of sums over the micro-step's
tokens (llama/balance.py), which all ranks add up in one all-reduce; every rank keeps the graph of its own share of the
sums, so the gradients, added up over the ranks, are those of the loss of all tokens together.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llama.all_to_all import AllToAllDispatch
from llama.attention import Attend, CausalAttend
from llama.balance import RoutingStatistics, balance_loss, balanced_bias, routing_sums, with_total
from llama.model import LanguageModel
from llama.moe import RoutingRecord
from llama.norm import batch_norms, batch_statistics, update_running
from llama.training.attention import BlockCausalAttend
from llama.training.batch import Batch, loss_sum
from llama.training.config import TrainConfig
from llama.training.control import Request
from llama.training.mesh import plan_mesh
from llama.training.optim import clip_coefficient, local_square_sum, scale_gradients
from llama.training.parallel import moe_layers
from llama.training.schedule import learning_rate
from llama.training.skip import StepGuard


@dataclass
class _StepSums:
    """What a step adds up: the cross-entropy and batch norms' statistics on this rank, the routing over all ranks."""

    cross_entropy: Tensor
    balance: Tensor
    z: Tensor
    routing_LS: Tensor | None = None
    """`RoutingStatistics.sums` by MoE layer."""
    norms: Tensor | None = None
    """`batch_statistics` of this rank's micro-batches."""

    @property
    def routing(self) -> RoutingStatistics | None:
        return None if self.routing_LS is None else RoutingStatistics(self.routing_LS)


@dataclass(frozen=True)
class StepResult:
    """A step over all ranks; every rank has the same. The fields are those of `StepMetrics`."""

    loss: float
    tokens: int
    """Of this step, without padding."""
    learning_rate: float
    grad_norm: float
    updated: bool
    """False: the gradient was not fit to be applied, and nothing has changed."""
    balance_loss: float | None
    z_loss: float | None
    expert_load: dict[int, list[float]]
    router_entropy: dict[int, float]
    all_to_all_bytes: int
    request: Request
    """The most urgent that any rank came with."""


def attention(device: torch.device, *, compiled: bool = False) -> Callable[[Tensor | None], Attend]:
    """Makes the fastest causal attention there for a batch's documents."""
    # The one by blocks cuts them by data, which a compiler cannot follow.
    return BlockCausalAttend if device.type == "cpu" and not compiled else CausalAttend


class TrainStep:
    """Takes optimizer steps with a model that is sharded already (llama/training/parallel.py).

    Args:
        model: its parameters on `device`; every rank of the default process group has one, and steps together.
    """

    def __init__(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, config: TrainConfig, device: torch.device
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.device = device
        self._world_size = dist.get_world_size()
        self.accumulation = config.accumulation_steps(self._world_size)
        self.attend = attention(device, compiled=config.compile)
        one_shard = plan_mesh(config.parallel, self._world_size).dp_shard == 1
        self.whole_gradients = device.type == "cpu" or one_shard
        """Whether a rank keeps the gradients of all it computes with until the last micro-step, and not its shard of
        them: on the CPU, where memory is cheaper than gloo, and where the shard is all there is."""
        self.guard = StepGuard(config.optimizer.skip_sigma, config.optimizer.skip_window)
        """Its state is part of the run's: a resumed run must judge as the first would have."""
        self._parameters = list(model.parameters())
        self._moes = moe_layers(model)
        self._norms = batch_norms(model)
        dispatches = (moe.dispatch for moe in self._moes.values())
        self._dispatches = [dispatch for dispatch in dispatches if isinstance(dispatch, AllToAllDispatch)]

    def __call__(self, batches: list[Batch], step: int, request: Request = Request.GO_ON) -> StepResult:
        """Optimizer step number `step`, counted from 0, over this rank's micro-batches.

        `request` is what this rank wants done after the step; the ranks agree in the step's own all-reduce.
        """
        counts = torch.stack([torch.stack((batch.num_targets(), batch.num_tokens())) for batch in batches]).sum(dim=0)
        counting = dist.all_reduce(counts, async_op=True)
        bytes_before = sum(dispatch.bytes_sent for dispatch in self._dispatches)
        # What dropout draws depends on nothing but the step and the rank: a resumed run draws the same.
        lora = self.config.lora
        if self.model.config.attention_dropout or self.model.config.residual_dropout or (lora and lora.dropout):
            torch.manual_seed(zlib.crc32(f"{self.config.seed}/{step}/{dist.get_rank()}".encode()))
        sums = _StepSums(*torch.zeros(3, dtype=torch.float64, device=self.device))
        for index, batch in enumerate(batches):
            self._last_micro_step(index == len(batches) - 1)
            self._micro_step(batch, sums, counting, counts).backward()
        bytes_sent = sum(dispatch.bytes_sent for dispatch in self._dispatches) - bytes_before

        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        totals = torch.stack(
            (
                local_square_sum(gradients, self._world_size),
                sums.cross_entropy,
                torch.full_like(sums.cross_entropy, bytes_sent),
                torch.full_like(sums.cross_entropy, request),
            )
        )
        dist.all_reduce(totals)
        # All numbers of the step in one copy to the host: an accelerator is waited for once.
        numbers = [totals, counts.double(), torch.stack((sums.balance, sums.z))]
        if sums.routing is not None:
            numbers.append(torch.cat((sums.routing.load, sums.routing.entropy[:, None]), dim=1).flatten())
        square, cross_entropy, all_bytes, requests, targets, tokens, balance, z, *routing = torch.cat(numbers).tolist()
        norm = math.sqrt(square) if square >= 0 else math.nan
        lr = learning_rate(step, self.config.steps, self.config.optimizer.lr, self.config.schedule)
        updated = self._update(gradients, norm, lr, sums)
        return StepResult(
            loss=cross_entropy / max(1, targets),
            tokens=int(tokens),
            learning_rate=lr,
            grad_norm=norm,
            updated=updated,
            balance_loss=balance / len(self._moes) if self._moes else None,
            z_loss=z / len(self._moes) if self._moes else None,
            expert_load={layer: load for layer, (*load, _) in self._by_layer(routing).items()},
            router_entropy={layer: entropy for layer, (*_, entropy) in self._by_layer(routing).items()},
            all_to_all_bytes=int(all_bytes),
            request=Request.of_sum(requests),
        )

    def _micro_step(self, batch: Batch, sums: _StepSums, counting: dist.Work, counts: Tensor) -> Tensor:
        """Forward pass of one micro-batch: its share of the step's loss, with the graph.

        Args:
            counts: targets and tokens of the step, over all ranks once `counting` is done.
        """
        routing = RoutingRecord(batch.counted()) if self._moes else None
        cross_entropy = loss_sum(self.model, batch, self.attend, routing)
        if self._norms:
            statistics = batch_statistics(self._norms)
            sums.norms = statistics if sums.norms is None else sums.norms + statistics
        counting.wait()
        sums.cross_entropy += cross_entropy.detach()
        targets, tokens = counts
        loss = cross_entropy / targets.clamp(min=1)
        return loss if routing is None else loss + self._routing_loss(routing, sums, tokens)

    def _routing_loss(self, routing: RoutingRecord, sums: _StepSums, step_tokens: Tensor) -> Tensor:
        """The micro-step's weighted balance and z losses over all ranks, with the graph of this rank's tokens."""
        moe = self.model.config.moe
        assert moe is not None
        with torch.set_grad_enabled(moe.balance_loss_weight > 0 or moe.z_loss_weight > 0):
            sums_LS = routing_sums((routing.layers[layer] for layer in self._moes), moe.balance_loss)
        total_LS = sums_LS.detach().clone()
        dist.all_reduce(total_LS)
        statistics = RoutingStatistics(with_total(sums_LS, total_LS))
        sums.routing_LS = total_LS if sums.routing_LS is None else sums.routing_LS + total_LS
        # How many micro-steps of this one's size make the step; every layer has the same tokens.
        micro_steps = step_tokens.clamp(min=1) / statistics.tokens[0]
        sequences = self.accumulation if moe.balance_loss == "switch_sequence" else micro_steps
        balance = balance_loss(moe.balance_loss, statistics).sum() / sequences
        z = statistics.z_loss.sum() / micro_steps
        sums.balance += balance.detach()
        sums.z += z.detach()
        loss = torch.zeros_like(balance)
        for weight, part in ((moe.balance_loss_weight, balance), (moe.z_loss_weight, z)):
            if weight > 0:
                loss = loss + weight * part
        return loss

    def _last_micro_step(self, last: bool) -> None:
        """What can wait for the last micro-step: all of the reduction where gradients are kept whole, else what goes
        over the replicas."""
        assert isinstance(self.model, FSDPModule)
        if self.whole_gradients:
            self.model.set_requires_gradient_sync(last)
            self.model.set_reshard_after_backward(last)
        else:
            self.model.set_requires_all_reduce(last)
        self.model.set_is_last_backward(last)

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], norm: float, lr: float, sums: _StepSums) -> bool:
        """Clips and applies the gradients if the guard accepts them, clears them; returns whether they were applied."""
        accepted = self.guard.accepts(norm)
        if accepted:
            scale_gradients(gradients, clip_coefficient(norm, self.config.optimizer.grad_clip))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._balance_bias(sums.routing)
            self._update_running(sums.norms)
        self.optimizer.zero_grad(set_to_none=True)
        return accepted

    def _balance_bias(self, routing: RoutingStatistics | None) -> None:
        """Moves the routing bias by the load of the whole step; beside adapters it is frozen like all else."""
        moe = self.model.config.moe
        if routing is None or moe is None or moe.bias_update_rate == 0 or self.config.lora is not None:
            return
        for layer, counts_E in zip(self._moes.values(), routing.counts, strict=True):
            bias_E = layer.router.expert_bias
            bias_E.copy_(balanced_bias(bias_E, counts_E, moe.bias_update_rate))

    def _update_running(self, statistics: Tensor | None) -> None:
        """Moves batch norms' running statistics towards the average over all micro-batches of all ranks."""
        if statistics is not None:
            dist.all_reduce(statistics)
            update_running(self._norms, statistics / (self.accumulation * self._world_size))

    def _by_layer(self, numbers: list[float]) -> dict[int, list[float]]:
        each = len(numbers) // max(1, len(self._moes))
        return {layer: numbers[place * each : (place + 1) * each] for place, layer in enumerate(self._moes)}
