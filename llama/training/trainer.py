"""The training loop: set up, resume, step after step (llama/training/step.py), checkpoints, reports."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from llama.config import ModelConfig
from llama.lora import apply_lora, base_state, trained_state
from llama.model import LanguageModel, Transformer
from llama.retry import retried
from llama.seq2seq import Seq2Seq
from llama.seq2seq_config import Seq2SeqConfig
from llama.training.batch import Batch
from llama.training.checkpoint import Checkpointer, CorruptCheckpoint, StoreFailed, training_tensors
from llama.training.config import TrainConfig, check_compilable, check_trainable
from llama.training.control import Request
from llama.training.memory import reuse_freed_memory
from llama.training.mesh import build_mesh, process_group
from llama.training.meter import Meter
from llama.training.metrics import StepMetrics, TrainSummary
from llama.training.optim import build_optimizer
from llama.training.parallel import allocate_sharded, apply_parallel, draw_weights
from llama.training.precision import fast_cpu_matmul
from llama.training.saver import HURRIED_PAUSES, Saver
from llama.training.step import StepResult, TrainStep
from llama.training.validation import check_equally_many, validation_loss
from llama.training.watchdog import Watchdog

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class Loader(Protocol):
    """This rank's micro-batches, without end: `[micro_batch, seq_len]`, with sources for an encoder–decoder."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON, the same on every rank: how much of the data the batches handed out so far have used up."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    @property
    def epoch(self) -> float | None:
        """Passes over the data that the batches handed out so far make, over all ranks; None where it has no end."""
        ...


@dataclass
class _Progress:
    """Where the run is; everything in a checkpoint that is not a tensor, but for the loader's state."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    loss: float | None = None
    """Of the last step; None before the first, or when it was not finite, which JSON cannot say."""
    failed_checkpoints: int = 0
    val_loss: float | None = None
    """Measured after the last step; None if it was not, or when it was not finite."""


def build_model(config: ModelConfig) -> LanguageModel:
    """The model that the config is of; its weights are uninitialised."""
    return Seq2Seq(config) if isinstance(config, Seq2SeqConfig) else Transformer(config)


class Trainer:
    """Trains a model from its config, a decoder or an encoder–decoder, on this rank, as one of the ranks of the default
    process group.

    Without a process group it makes one of a single rank for the time of `fit`. With a checkpointer, training goes on
    from its latest committed checkpoint, and saves every `checkpoint_every` steps and at the end. A checkpoint whose
    bytes are wrong is discarded, and the one before it taken. A checkpoint that cannot be written is logged and
    counted, and training goes on; only for the last one it tries for some minutes, and then fails.

    With `config.lora` the adapters are trained, and checkpoints hold nothing else: the weights below them are those of
    the start, in a resumed run too.

    Args:
        loader: this rank's data.
        checkpointer: None trains without.
        start: fills the weights that training starts from, adapters aside; called on every rank with the sharded model,
            whose buffers are at their start. None draws them by the seed.
        validation: this rank's rows to validate on, in batches of which every rank has equally many
            (llama/training/validation.py); for `validate_every`.
        on_metrics: called on every rank with the same values, every `log_every` steps, after the first and the last,
            and after those that are validated.
        on_resume: called on every rank before the first step, with the step that training goes on from (0: none).
        control: asked before every step, on every rank; the ranks do what the most urgent answer says.
        watchdog: is told of everything that moves; the caller enters it.

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
        start: Callable[[LanguageModel], None] | None = None,
        validation: Sequence[Batch] = (),
        on_metrics: Callable[[StepMetrics], None] = lambda metrics: None,
        on_resume: Callable[[int], None] = lambda step: None,
        control: Callable[[], Request] = lambda: Request.GO_ON,
        watchdog: Watchdog | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if config.seq_len > model_config.max_seq_len:
            raise ValueError(
                f"train.seq_len={config.seq_len} is longer than model.max_seq_len={model_config.max_seq_len}; "
                "shorten the one or raise the other"
            )
        check_trainable(model_config)
        check_compilable(model_config, config)
        self.model_config = model_config
        self.config = config
        self.loader = loader
        self.checkpointer = checkpointer
        self.start = start
        self.validation = validation
        self.on_metrics = on_metrics
        self.on_resume = on_resume
        self.control = control
        self.watchdog = watchdog or Watchdog(0)
        self.device = torch.device(device)

    def fit(self) -> TrainSummary:
        """Trains to `config.steps`, or until told to stop, and returns when the last checkpoint is committed.

        Raises:
            CheckpointError: the last checkpoint could not be written, or the one to go on from not be read.
        """
        with process_group(), fast_cpu_matmul(), reuse_freed_memory():
            self._set_up()
            self.watchdog.beat()
            resumed_step = self._resume()
            self.on_resume(resumed_step)
            self.watchdog.beat()
            return self._train(resumed_step)

    def _set_up(self) -> None:
        meshes = build_mesh(self.config.parallel, dist.get_world_size(), self.device.type)
        with torch.device("meta"):
            model = build_model(self.model_config)
            if self.config.lora is not None:
                apply_lora(model, self.config.lora)
        self.model = apply_parallel(
            model,
            meshes,
            self.config.precision,
            activation_checkpointing=self.config.activation_checkpointing,
            compile=self.config.compile,
        )
        self._allocate()
        self._progress = _Progress()
        if self.config.validate_every:
            check_equally_many(self.validation, self.device)

    def _allocate(self) -> None:
        """Weights that are anything, and the optimizer of step 0."""
        allocate_sharded(self.model, self.device)
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        self._step = TrainStep(self.model, self.optimizer, self.config, self.device)

    def _resume(self) -> int:
        """Goes back to the latest checkpoint that can be read, else to the start; returns its step, 0 for the start."""
        checkpointer, discarded = self.checkpointer, False
        while checkpointer is not None and (step := self._retried(checkpointer.latest, "looking")) is not None:
            tensors = training_tensors(self.model, self.optimizer)
            try:
                saved = self._retried(partial(checkpointer.load, step, tensors), f"loading step {step}")
            except CorruptCheckpoint as error:
                checkpointer.discard(step, error)
                self._allocate()  # part of it may have been read
                discarded = True
                continue
            self._fill(self.model.state_dict().keys() - trained_state(self.model).keys())
            self._progress = _Progress(
                saved["step"],
                saved["tokens"],
                saved["skipped_steps"],
                saved.get("loss"),
                saved.get("failed_checkpoints", 0),
                saved.get("val_loss"),
            )
            self._step.guard.restore(**saved["guard"])
            self.loader.load_state_dict(saved["loader"])
            if dist.get_rank() == 0:
                log.info("training goes on from the checkpoint of step %d", step)
            return step
        if discarded and dist.get_rank() == 0:
            log.warning("no checkpoint is left; training starts from step 0")
        self._fill(self.model.state_dict().keys())
        return 0

    def _retried(self, action: Callable[[], ResultT], what: str) -> ResultT:
        """On all ranks, which see the same failures."""
        return retried(
            action, f"{what} for the checkpoint to go on from", on=(OSError, StoreFailed), sleep=self.watchdog.sleep
        )

    def _fill(self, names: AbstractSet[str]) -> None:
        """Sets these weights to what they are at step 0."""
        if self.start is not None and names & base_state(self.model).keys():
            self.start(self.model)
            names = names - base_state(self.model).keys()
        draw_weights(self.model, self.config.seed, names)

    def _train(self, resumed_step: int) -> TrainSummary:
        progress, config, bytes_moved = self._progress, self.config, 0
        meter = Meter(self.model_config, config, self.device, progress.tokens)
        saver = Saver(self.checkpointer, self.watchdog) if self.checkpointer else None
        failed_before, request, stopped = progress.failed_checkpoints, Request.GO_ON, False
        batches = iter(self.loader)
        while progress.step < config.steps and not stopped:
            request = max(request, self.control())
            batch = [self._checked(next(batches)) for _ in range(self._step.accumulation)]
            result = self._step(batch, progress.step, request)
            self._account(result)
            self.watchdog.beat()
            bytes_moved += result.all_to_all_bytes
            validated = result.request is not Request.STOP_NOW and self._maybe_validate(meter)
            if validated or progress.step in (resumed_step + 1, config.steps) or progress.step % config.log_every == 0:
                self.on_metrics(self._metrics(result, meter))
            if saver is not None:
                with meter.saving():
                    stopped = self._save(saver, result.request)
                progress.failed_checkpoints = failed_before + saver.failed
            stopped = stopped or result.request is Request.STOP_NOW
        return TrainSummary(
            step=progress.step,
            finished=progress.step >= config.steps,
            resumed_step=resumed_step,
            loss=progress.loss,
            tokens=progress.tokens,
            tokens_per_second=meter.tokens_per_second(progress.tokens),
            val_loss=progress.val_loss,
            seconds=meter.seconds,
            validation_seconds=meter.validation_seconds,
            checkpoint_seconds=meter.checkpoint_seconds,
            all_to_all_bytes=bytes_moved,
            skipped_steps=progress.skipped_steps,
            failed_checkpoints=progress.failed_checkpoints,
        )

    def _account(self, result: StepResult) -> None:
        """Counts a step that was taken."""
        progress = self._progress
        progress.step += 1
        progress.tokens += result.tokens
        progress.skipped_steps += not result.updated
        progress.loss = _finite(result.loss)
        progress.val_loss = None

    def _maybe_validate(self, meter: Meter) -> bool:
        step, every = self._progress.step, self.config.validate_every
        if not every or (step % every and step != self.config.steps):
            return False
        with meter.validating():
            loss = validation_loss(
                self.model, self.validation, self._step.attend, self.device, on_batch=self.watchdog.beat
            )
        self._progress.val_loss = _finite(loss)
        return True

    def _metrics(self, result: StepResult, meter: Meter) -> StepMetrics:
        """The report on a step that is counted; a collective."""
        progress = self._progress
        rates = meter.measure(progress.tokens)
        return StepMetrics(
            step=progress.step,
            steps=self.config.steps,
            loss=result.loss,
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            tokens=progress.tokens,
            tokens_per_second=rates.tokens_per_second,
            mfu=rates.mfu,
            memory_bytes=rates.memory_bytes,
            samples=progress.step * self.config.global_batch,
            epoch=self.loader.epoch,
            checkpoint_seconds=rates.checkpoint_seconds,
            val_loss=progress.val_loss,
            balance_loss=result.balance_loss,
            z_loss=result.z_loss,
            expert_load=result.expert_load,
            router_entropy=result.router_entropy,
            all_to_all_bytes=result.all_to_all_bytes,
            skipped_steps=progress.skipped_steps,
            failed_checkpoints=progress.failed_checkpoints,
        )

    def _save(self, saver: Saver, request: Request) -> bool:
        """The checkpoint of this step, if one is due or asked for; returns whether the request to stop is met."""
        step, every = self._progress.step, self.config.checkpoint_every
        last, due = step == self.config.steps, bool(every) and step % every == 0
        if not (last or due or request is Request.STOP_NOW):
            return False
        states = {"loader": self.loader.state_dict(), "guard": self._step.guard.state()}
        settings = {"train": asdict(self.config), "model": asdict(self.model_config)}
        progress = asdict(self._progress) | states | settings
        tensors = training_tensors(self.model, self.optimizer)
        if last:
            saver.save_or_fail(step, tensors, progress)
        elif request is Request.GO_ON:
            saver.save(step, tensors, progress)
        else:
            pauses = HURRIED_PAUSES if request is Request.STOP_NOW else ()
            return saver.save_now(step, tensors, progress, pauses)
        return False

    def _checked(self, batch: Batch) -> Batch:
        expected = (self.config.micro_batch, self.config.seq_len)
        for name, tensor in (("inputs", batch.inputs), ("labels", batch.labels), ("documents", batch.documents)):
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(f"the loader gave a batch whose {name} are {tuple(tensor.shape)}, expected {expected}")
        if (batch.source is not None) != isinstance(self.model_config, Seq2SeqConfig):
            raise ValueError("the loader's batches have sources where the model is no encoder–decoder, or none for one")
        return batch.to(self.device)


def _finite(loss: float) -> float | None:
    """What JSON can say."""
    return loss if math.isfinite(loss) else None
