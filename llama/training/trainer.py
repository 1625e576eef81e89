"""The training loop.

A step: every rank runs its micro-batches forward and backward, FSDP adds the gradients up, the norm over both meshes
clips them, AdamW moves the shards. Every loss is a sum divided by a count over all ranks, so the gradient is that of
the global batch, whatever the layout and the accumulation:

    loss = Σ cross-entropy / valid tokens of the step
         + Σ over micro-steps and MoE layers of (tokens of the micro-step / tokens of the step)
           · (balance_loss_weight · balance + z_loss_weight · z)

A micro-step is one forward pass of all ranks. Its balance and z losses are functions of sums over the micro-step's
tokens (llama/balance.py), which all ranks add up in one all-reduce; every rank keeps the graph of its own share of the
sums, so the gradients, added up over the ranks, are those of the loss of all tokens together.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llama.all_to_all import AllToAllDispatch
from llama.attention import Attend, CausalAttend
from llama.balance import RoutingStatistics, balance_loss, balanced_bias, routing_sums, with_total
from llama.config import ModelConfig
from llama.model import Transformer
from llama.moe import RoutingRecord
from llama.training.attention import BlockCausalAttend
from llama.training.batch import Batch, loss_sum
from llama.training.checkpoint import Checkpointer, CorruptCheckpoint, training_tensors
from llama.training.config import TrainConfig, check_trainable
from llama.training.memory import reuse_freed_memory
from llama.training.mesh import build_mesh
from llama.training.metrics import StepMetrics, TrainSummary
from llama.training.optim import build_optimizer, clip_coefficient, local_square_sum, scale_gradients
from llama.training.parallel import apply_parallel, init_sharded_weights, moe_layers
from llama.training.precision import fast_cpu_matmul
from llama.training.schedule import learning_rate

log = logging.getLogger(__name__)


class Loader(Protocol):
    """This rank's micro-batches, without end: `[micro_batch, seq_len]`."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON, the same on every rank: how much of the data the batches handed out so far have used up."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class _StepSums:
    """What a step adds up: the cross-entropy on this rank, the routing over all ranks."""

    cross_entropy: Tensor
    balance: Tensor
    z: Tensor
    counts_LE: Tensor | None = None
    """(token, choice) pairs by MoE layer and expert, float64."""


@dataclass
class _Progress:
    """Where the run is; everything in a checkpoint that is not a tensor, but for the loader's state."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    loss: float | None = None
    """Of the last step; None before the first, or when it was not finite, which JSON cannot say."""


@dataclass
class _Clock:
    """Seconds, for the rates; never for a decision."""

    started: float = field(default_factory=time.perf_counter)
    reported: float = field(default_factory=time.perf_counter)
    checkpoint: float = 0.0


class Trainer:
    """Trains a model from its config on this rank, as one of the ranks of the default process group.

    Without a process group it makes one of a single rank for the time of `fit`. With a checkpointer, training goes on
    from its latest committed checkpoint, and saves every `checkpoint_every` steps and at the end. A checkpoint whose
    bytes are wrong is discarded, and the one before it taken.

    Args:
        loader: this rank's data.
        checkpointer: None trains without.
        on_metrics: called on every rank with the same values, every `log_every` steps and after the first and last.
        on_resume: called on every rank before the first step, with the step that training goes on from (0: none).

    Raises:
        ValueError: the config does not fit the model or the number of ranks.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        loader: Loader,
        checkpointer: Checkpointer | None = None,
        *,
        on_metrics: Callable[[StepMetrics], None] = lambda metrics: None,
        on_resume: Callable[[int], None] = lambda step: None,
        device: torch.device | str = "cpu",
    ) -> None:
        if config.seq_len > model_config.max_seq_len:
            raise ValueError(
                f"train.seq_len={config.seq_len} is longer than model.max_seq_len={model_config.max_seq_len}; "
                "shorten the one or raise the other"
            )
        check_trainable(model_config)
        self.model_config = model_config
        self.config = config
        self.loader = loader
        self.checkpointer = checkpointer
        self.on_metrics = on_metrics
        self.on_resume = on_resume
        self.device = torch.device(device)

    def fit(self) -> TrainSummary:
        """Trains to `config.steps` and returns when the last checkpoint is committed."""
        with _process_group(), fast_cpu_matmul(), reuse_freed_memory():
            self._set_up()
            resumed_step = self._resume()
            self.on_resume(resumed_step)
            return self._train(resumed_step)

    def _set_up(self) -> None:
        self._world_size = dist.get_world_size()
        self._accumulation = self.config.accumulation_steps(self._world_size)
        meshes = build_mesh(self.config.parallel, self._world_size, self.device.type)
        with torch.device("meta"):
            model = Transformer(self.model_config)
        self.model = apply_parallel(model, meshes, self.config.precision)
        self._initialise()
        self._attend: Callable[[Tensor | None], Attend] = (
            BlockCausalAttend if self.device.type == "cpu" else CausalAttend
        )
        self._moes = moe_layers(self.model)
        dispatches = (moe.dispatch for moe in self._moes.values())
        self._dispatches = [dispatch for dispatch in dispatches if isinstance(dispatch, AllToAllDispatch)]
        self._progress = _Progress()

    def _initialise(self) -> None:
        """The state of step 0."""
        init_sharded_weights(self.model, self.config.seed, self.device)
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        self._parameters = list(self.model.parameters())

    def _resume(self) -> int:
        """Goes back to the latest checkpoint that can be read; returns its step, 0 without one."""
        checkpointer, discarded = self.checkpointer, False
        while checkpointer is not None and (step := checkpointer.latest()) is not None:
            try:
                saved = checkpointer.load(step, training_tensors(self.model, self.optimizer))
            except CorruptCheckpoint as error:
                checkpointer.discard(step, error)
                self._initialise()  # part of it may have been read
                discarded = True
                continue
            self._progress = _Progress(saved["step"], saved["tokens"], saved["skipped_steps"], saved.get("loss"))
            self.loader.load_state_dict(saved["loader"])
            return step
        if discarded and dist.get_rank() == 0:
            log.warning("no checkpoint is left; training starts from step 0")
        return 0

    def _train(self, resumed_step: int) -> TrainSummary:
        clock, first_tokens, bytes_moved = _Clock(), self._progress.tokens, 0
        reported_tokens = first_tokens
        batches = iter(self.loader)
        while self._progress.step < self.config.steps:
            metrics = self._step([self._checked(next(batches)) for _ in range(self._accumulation)])
            bytes_moved += metrics.all_to_all_bytes
            if metrics.step in (resumed_step + 1, self.config.steps) or metrics.step % self.config.log_every == 0:
                now = time.perf_counter()
                rate = (metrics.tokens - reported_tokens) / (now - clock.reported)
                clock.reported, reported_tokens = now, metrics.tokens
                self.on_metrics(replace(metrics, tokens_per_second=rate))
            self._maybe_save(clock)
        seconds = time.perf_counter() - clock.started
        trained = self._progress.tokens - first_tokens
        if self.checkpointer:
            self.checkpointer.wait()
        return TrainSummary(
            step=self._progress.step,
            resumed_step=resumed_step,
            loss=self._progress.loss,
            tokens=self._progress.tokens,
            tokens_per_second=trained / seconds if trained else None,
            seconds=seconds,
            checkpoint_seconds=clock.checkpoint,
            all_to_all_bytes=bytes_moved,
            skipped_steps=self._progress.skipped_steps,
        )

    def _maybe_save(self, clock: _Clock) -> None:
        step, every = self._progress.step, self.config.checkpoint_every
        if self.checkpointer is None or not (step == self.config.steps or (every and step % every == 0)):
            return
        began = time.perf_counter()
        progress = asdict(self._progress) | {"loader": self.loader.state_dict(), "train": asdict(self.config)}
        self.checkpointer.save(step, training_tensors(self.model, self.optimizer), progress)
        clock.checkpoint += time.perf_counter() - began

    def _checked(self, batch: Batch) -> Batch:
        expected = (self.config.micro_batch, self.config.seq_len)
        for name, tensor in (("inputs", batch.inputs), ("labels", batch.labels), ("documents", batch.documents)):
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(f"the loader gave a batch whose {name} are {tuple(tensor.shape)}, expected {expected}")
        return batch.to(self.device)

    def _step(self, batches: list[Batch]) -> StepMetrics:
        """One optimizer step over this rank's micro-batches."""
        valid = torch.stack([batch.num_targets() for batch in batches]).sum()
        counting = dist.all_reduce(valid, async_op=True)
        bytes_before = sum(dispatch.bytes_sent for dispatch in self._dispatches)
        # What dropout draws depends on nothing but the step and the rank: a resumed run draws the same.
        if self.model_config.attention_dropout or self.model_config.residual_dropout:
            torch.manual_seed(zlib.crc32(f"{self.config.seed}/{self._progress.step}/{dist.get_rank()}".encode()))
        sums = _StepSums(*torch.zeros(3, dtype=torch.float64, device=self.device))
        for index, batch in enumerate(batches):
            self._last_micro_step(index == len(batches) - 1)
            self._micro_step(batch, sums, counting, valid).backward()
        bytes_sent = sum(dispatch.bytes_sent for dispatch in self._dispatches) - bytes_before

        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        totals = torch.zeros(5, dtype=torch.float64, device=self.device)
        totals[0] = local_square_sum(gradients, self._world_size)
        totals[1] = sums.cross_entropy
        totals[2] = bytes_sent
        dist.all_reduce(totals[:3])
        totals[3:] = torch.stack((sums.balance, sums.z))
        square, cross_entropy, all_bytes, balance, z = totals.tolist()
        norm = math.sqrt(square) if square >= 0 else math.nan
        lr = self._update(gradients, norm, sums)
        self._progress.step += 1
        self._progress.tokens += self.config.global_batch * self.config.seq_len
        loss = cross_entropy / max(1, int(valid))
        self._progress.loss = loss if math.isfinite(loss) else None
        return StepMetrics(
            step=self._progress.step,
            steps=self.config.steps,
            loss=loss,
            learning_rate=lr,
            grad_norm=norm,
            tokens=self._progress.tokens,
            tokens_per_second=0.0,
            balance_loss=balance / len(self._moes) if self._moes else None,
            z_loss=z / len(self._moes) if self._moes else None,
            expert_load=self._expert_load(sums.counts_LE),
            all_to_all_bytes=int(all_bytes),
            skipped_steps=self._progress.skipped_steps,
        )

    def _micro_step(self, batch: Batch, sums: _StepSums, counting: dist.Work, valid: Tensor) -> Tensor:
        """Forward pass of one micro-batch: its share of the step's loss, with the graph."""
        routing = RoutingRecord() if self._moes else None
        cross_entropy = loss_sum(self.model, batch, self._attend, routing)
        counting.wait()
        sums.cross_entropy += cross_entropy.detach()
        loss = cross_entropy / valid.clamp(min=1)
        return loss if routing is None else loss + self._routing_loss(routing, sums)

    def _routing_loss(self, routing: RoutingRecord, sums: _StepSums) -> Tensor:
        """The micro-step's weighted balance and z losses over all ranks, with the graph of this rank's tokens."""
        moe = self.model_config.moe
        assert moe is not None
        with torch.set_grad_enabled(moe.balance_loss_weight > 0 or moe.z_loss_weight > 0):
            sums_LS = routing_sums((routing.layers[layer] for layer in self._moes), moe.balance_loss)
        total_LS = sums_LS.detach().clone()
        dist.all_reduce(total_LS)
        statistics = RoutingStatistics(with_total(sums_LS, total_LS))
        sums.counts_LE = statistics.counts if sums.counts_LE is None else sums.counts_LE + statistics.counts
        balance = balance_loss(moe.balance_loss, statistics).sum() / self._accumulation
        z = statistics.z_loss.sum() / self._accumulation
        sums.balance += balance.detach()
        sums.z += z.detach()
        loss = torch.zeros_like(balance)
        for weight, part in ((moe.balance_loss_weight, balance), (moe.z_loss_weight, z)):
            if weight > 0:
                loss = loss + weight * part
        return loss

    def _last_micro_step(self, last: bool) -> None:
        """On the CPU gradients are reduced once a step, after its last micro-step; until then they are kept whole."""
        assert isinstance(self.model, FSDPModule)
        if self.device.type == "cpu":
            self.model.set_requires_gradient_sync(last)
            self.model.set_reshard_after_backward(last)
        self.model.set_is_last_backward(last)

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], norm: float, sums: _StepSums) -> float:
        """Clips and applies the gradients unless they are not finite, clears them; returns the learning rate."""
        optimizer = self.config.optimizer
        lr = learning_rate(self._progress.step, self.config.steps, optimizer.lr, self.config.schedule)
        if math.isfinite(norm):
            scale_gradients(gradients, clip_coefficient(norm, optimizer.grad_clip))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._balance_bias(sums.counts_LE)
        else:
            self._progress.skipped_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        return lr

    def _balance_bias(self, counts_LE: Tensor | None) -> None:
        """Moves the routing bias by the load of the whole step."""
        moe = self.model_config.moe
        if counts_LE is None or moe is None or moe.bias_update_rate == 0:
            return
        for layer, counts_E in zip(self._moes.values(), counts_LE, strict=True):
            bias_E = layer.router.expert_bias
            bias_E.copy_(balanced_bias(bias_E, counts_E, moe.bias_update_rate))

    def _expert_load(self, counts_LE: Tensor | None) -> dict[int, list[float]]:
        if counts_LE is None:
            return {}
        shares_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True)
        return dict(zip(self._moes, shares_LE.tolist(), strict=True))


@contextmanager
def _process_group() -> Iterator[None]:
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
