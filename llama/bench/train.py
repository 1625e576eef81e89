"""A training step beside Hugging Face transformers': same weights, data, shapes and optimizer, interleaved in one run.

Contestants, each in a process of its own: ours, which is the trainer's own step on one rank; the peer as shipped (sdpa,
no cache, its fastest experts backend); and on a CPU the peer with our process settings (fp32 GEMM library, allocator)
given to it too, which shows how much of a lead is those alone. The weights are fp32 for all, bf16 is the arithmetic:
the peer's autocast, our mixed precision. A step is `accumulate` micro-batches, clipping by the global norm and fused
AdamW. The peer's weights are our export, so both must start at the same loss, and the run fails if they do not.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from llama.bench.harness import (
    MIN_ROUNDS,
    BenchError,
    Contestant,
    Ratio,
    interleave,
    peak_memory_mib,
    ratio,
    resident_mib,
    serve,
)
from llama.hf import load_pretrained, save_pretrained
from llama.model import Transformer
from llama.presets import PRESETS
from llama.training.batch import Batch, loss_sum
from llama.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from llama.training.memory import reuse_freed_memory
from llama.training.mesh import build_mesh, process_group
from llama.training.optim import build_optimizer
from llama.training.parallel import apply_parallel
from llama.training.peak import gemm_flops, peak_flops
from llama.training.precision import fast_cpu_matmul
from llama.training.step import TrainStep, attention

OURS, PEER, PEER_WITH_SETTINGS = "caravan", "transformers", "transformers+settings"
PEER_COMPILED = "transformers+compile"
ALL = (OURS, PEER, PEER_WITH_SETTINGS, PEER_COMPILED)
_EXPERT_BACKENDS = ("eager", "grouped_mm")
"""The third, batched_mm, copies every chosen expert's weights for each token: a decoder's, out of memory here."""


_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class TrainBench:
    """What is measured.

    Raises:
        BenchError: a setting is out of range; names field, value and remedy.
    """

    model: str = "small"
    precision: Literal["bf16", "fp32"] = "bf16"
    batch: int = 4
    """Sequences of a micro-batch."""
    accumulate: int = 1
    """Micro-batches of a step."""
    seq_len: int = 512
    rounds: int = 7
    steps: int = 2
    """Optimizer steps of a contestant in each round."""
    threads: int = 1
    device: str = "cpu"
    compile: bool = False
    """Ours with `train.compile`; on a GPU a dense peer too, as one contestant more. Of a mixture of experts a GPU's
    memory does not hold three."""
    expert_backend: str = ""
    """The peer's `experts_implementation`; left out, the fastest by trial."""

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise BenchError(f"precision={self.precision!r} is not one of bf16, fp32")
        for name in ("batch", "accumulate", "seq_len", "rounds", "steps", "threads"):
            if getattr(self, name) < (least := MIN_ROUNDS if name == "rounds" else 1):
                raise BenchError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.model not in PRESETS:
            raise BenchError(f"model={self.model!r} is not one of {', '.join(PRESETS)}")
        if self.device != "cpu" and not (self.device == "cuda" and torch.cuda.is_available()):
            raise BenchError(f"device={self.device!r} is not there; use cpu" + _or_cuda())
        needed, there = self._needed_gib(), _memory_gib()
        if self.device == "cpu" and needed > there:
            raise BenchError(
                f"model={self.model!r} takes about {needed:.0f} GiB of memory for the contestants' weights, gradients "
                f"and optimizers, and there are {there:.0f}; take a smaller one"
            )
        longest = PRESETS[self.model].max_seq_len
        if self.seq_len > longest:
            raise BenchError(f"seq_len={self.seq_len} is longer than {self.model}'s max_seq_len={longest}")

    @property
    def contestants(self) -> tuple[str, ...]:
        if self.device == "cpu":
            return OURS, PEER, PEER_WITH_SETTINGS
        return (OURS, PEER, PEER_COMPILED) if self.compile and PRESETS[self.model].moe is None else (OURS, PEER)

    def _needed_gib(self) -> float:
        """fp32 weights, gradients and two moments, three times, activations not counted."""
        return PRESETS[self.model].num_parameters() * 16 * len(self.contestants) / 2**30


def _or_cuda() -> str:
    return " or cuda" if torch.cuda.is_available() else ""


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@dataclass(frozen=True)
class Row:
    """One contestant's result."""

    name: str
    tokens_per_second: float
    """Median over the rounds."""
    mfu: float | None
    """Of what the device's data sheet says of bf16; None on a CPU, and of a device that is not known."""
    ceiling_share: float
    """Of the GEMM ceiling measured in the same run, by the FLOPs of `ModelConfig.flops_per_token`."""
    peak_mib: float
    """Largest memory above that of the process before it built the model; in a process of its own on a CPU."""
    versus_peer: Ratio | None
    """Speed over the peer's as shipped."""


@dataclass(frozen=True)
class TrainReport:
    bench: TrainBench
    rows: list[Row]
    ceiling_gflops: float
    expert_backend: str | None
    """The peer's, chosen by trial; None for a dense model."""
    losses: dict[str, float] = field(default_factory=dict)
    """Of the start weights, in fp32, by contestant."""


class _Step(Protocol):
    """Forward, backward and update on one batch of `accumulate` micro-batches."""

    start_loss: float
    """Mean of the first micro-batch, in fp32, before any step."""

    def __call__(self, tokens: Tensor) -> None: ...


class _OurStep:
    """The trainer's."""

    def __init__(self, bench: TrainBench, directory: Path) -> None:
        device = torch.device(bench.device)
        model = load_pretrained(directory).to(device).train()
        first = _as_batch(next(_batches(bench))[: bench.batch])
        with torch.no_grad():
            self.start_loss = loss_sum(model, first, attention(device)).item() / first.labels.numel()
        config = TrainConfig(
            steps=sys.maxsize,
            global_batch=bench.batch * bench.accumulate,
            micro_batch=bench.batch,
            seq_len=bench.seq_len,
            optimizer=OptimizerConfig(lr=_LEARNING_RATE),
            schedule=ScheduleConfig(kind="constant", warmup_steps=0),
            precision=bench.precision,
            compile=bench.compile,
        )
        meshes = build_mesh(config.parallel, 1, bench.device)
        apply_parallel(model, meshes, config.precision, compile=config.compile)
        self._step = TrainStep(model, build_optimizer(model, config.optimizer), config, device)
        self._taken = 0

    def __call__(self, tokens: Tensor) -> None:
        self._step([_as_batch(part) for part in tokens.split(len(tokens) // self._step.accumulation)], self._taken)
        self._taken += 1


class _PeerStep:
    """As one writes it around a transformers model."""

    def __init__(self, bench: TrainBench, directory: Path, compiled: bool) -> None:
        transformers = _import_transformers()
        backend = bench.expert_backend
        settings: dict[str, Any] = {"experts_implementation": backend} if backend else {}
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", **settings
        )
        self._model.to(bench.device).train()
        self._bench = bench
        with torch.no_grad():
            self.start_loss = self._loss(next(_batches(bench))[: bench.batch]).item()
        if compiled:
            self._model.compile()
        ours = OptimizerConfig(lr=_LEARNING_RATE)
        self._max_norm = ours.grad_clip
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), ours.lr, (ours.beta1, ours.beta2), ours.eps, ours.weight_decay, fused=True
        )

    def _loss(self, tokens: Tensor) -> Tensor:
        batch = _as_batch(tokens)
        return self._model(input_ids=batch.inputs, labels=batch.labels, shift_labels=batch.labels, use_cache=False).loss

    def __call__(self, tokens: Tensor) -> None:
        bench = self._bench
        total = torch.zeros((), device=bench.device)
        for part in tokens.split(bench.batch):
            with torch.autocast(bench.device, torch.bfloat16, enabled=bench.precision == "bf16"):
                loss = self._loss(part) / bench.accumulate
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        total.item()


def _as_batch(tokens: Tensor) -> Batch:
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BenchError("the peer needs transformers; install it with: pip install transformers") from error
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _batches(bench: TrainBench) -> Iterator[Tensor]:
    """The same random tokens for everybody."""
    generator = torch.Generator().manual_seed(1)
    while True:
        shape = (bench.batch * bench.accumulate, bench.seq_len + 1)
        yield torch.randint(PRESETS[bench.model].vocab_size, shape, generator=generator).to(bench.device)


@contextmanager
def _exported(bench: TrainBench) -> Iterator[Path]:
    """A directory with the start weights, as both sides load them."""
    with torch.device(bench.device):
        model = Transformer(PRESETS[bench.model])
    if bench.device == "cpu":
        model.init_weights(seed=0)
    else:
        _draw_weights(model)
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(model, directory, dtype=torch.float32 if bench.device == "cpu" else torch.bfloat16)
        del model
        _give_back_memory(bench)
        yield Path(directory)


def _give_back_memory(bench: TrainBench) -> None:
    """For the contestant whose turn is next: a GPU's memory does not hold two at work."""
    if bench.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@torch.no_grad()
def _draw_weights(model: Transformer) -> None:
    """Start values of the usual sizes, drawn where the weights lie: billions take a CPU a minute."""
    for parameter in model.parameters():
        _ = parameter.fill_(1.0) if parameter.ndim < 2 else parameter.normal_(0.0, 0.02)
    model.reset_buffers()


def _arguments(bench: TrainBench, name: str, directory: Path, backend: str | None) -> list[str]:
    chosen = asdict(replace(bench, expert_backend=backend or ""))
    settings = [
        f"--{'no-' if value is False else ''}{key.replace('_', '-')}" + (f"={value}" if type(value) is not bool else "")
        for key, value in chosen.items()
    ]
    return ["train", *settings, f"--only={name}", f"--directory={directory}"]


def _backend(bench: TrainBench, directory: Path) -> str | None:
    """The peer's fastest experts backend here, by the median of interleaved rounds."""
    if PRESETS[bench.model].moe is None or bench.expert_backend:
        return bench.expert_backend or None
    failures: list[str] = []
    with ExitStack() as stack:
        able: dict[str, Contestant] = {}
        for backend in _EXPERT_BACKENDS:
            try:
                contestant = stack.enter_context(Contestant(backend, _arguments(bench, PEER, directory, backend)))
                contestant.turn()
            except BenchError as error:  # a backend that cannot run here
                failures.append(str(error))
            else:
                able[backend] = contestant
        if not able:
            raise BenchError(f"none of the peer's experts backends runs here: {failures[-1]}")
        seconds = interleave({backend: contestant.turn for backend, contestant in able.items()}, rounds=3)
    return min(seconds, key=lambda backend: median(seconds[backend]))


@contextmanager
def _process_settings(name: str, device: str) -> Iterator[None]:
    with ExitStack() as stack:
        if name != PEER and device == "cpu":
            stack.enter_context(fast_cpu_matmul())
            stack.enter_context(reuse_freed_memory())
        yield


def compete(bench: TrainBench, name: str, directory: Path) -> None:
    """One contestant's process: says its start loss; a turn is `bench.steps` steps, answered with the peak memory."""
    torch.set_num_threads(bench.threads)
    with _process_settings(name, bench.device), process_group():
        _warm_up(bench, name)
        before = resident_mib()
        step, batches = _step(bench, name, directory), _batches(bench)

        def turn() -> dict[str, float]:
            for _ in range(bench.steps):
                step(next(batches))
            if bench.device != "cpu":
                _give_back_memory(bench)
                return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20}
            return {"peak_mib": peak_memory_mib() - before}

        _give_back_memory(bench)
        serve({"loss": step.start_loss}, turn)


def _step(bench: TrainBench, name: str, directory: Path) -> _Step:
    return _OurStep(bench, directory) if name == OURS else _PeerStep(bench, directory, compiled=name == PEER_COMPILED)


def _warm_up(bench: TrainBench, name: str) -> None:
    """Takes a step of a tiny model, so that the modules loaded on the way are not counted as the model's memory."""
    tiny = replace(bench, model="tiny-moe" if PRESETS[bench.model].moe else "tiny", batch=1, accumulate=1, seq_len=8)
    with _exported(tiny) as directory:
        _step(tiny, name, directory)(next(_batches(tiny)))


def _gemm_ceiling(bench: TrainBench) -> float:
    """GFLOP/s of square products in the bench's type, the best of several."""
    torch.set_num_threads(bench.threads)
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    with fast_cpu_matmul() if bench.device == "cpu" else nullcontext():
        return gemm_flops(2048 if bench.device == "cpu" else 8192, dtype, bench.device) / 1e9


def measure(bench: TrainBench) -> TrainReport:
    """Runs the comparison.

    Raises:
        BenchError: transformers is missing, or the contestants do not compute the same loss.
    """
    answers: dict[str, dict[str, float]] = {}
    with _exported(bench) as directory, ExitStack() as stack:
        backend = _backend(bench, directory)
        contestants = {
            name: stack.enter_context(Contestant(name, _arguments(bench, name, directory, backend)))
            for name in bench.contestants
        }

        losses = {name: contestant.ready["loss"] for name, contestant in contestants.items()}
        _check_same(losses)

        def turn(name: str) -> None:
            answers[name] = contestants[name].turn()

        seconds = interleave({name: partial(turn, name) for name in bench.contestants}, bench.rounds)
    ceiling = _gemm_ceiling(bench)
    peak = peak_flops(torch.device(bench.device), torch.bfloat16) if bench.device != "cpu" else None
    tokens = bench.batch * bench.accumulate * bench.seq_len * bench.steps
    gflops = PRESETS[bench.model].flops_per_token(bench.seq_len) / 1e9
    rows = []
    for name in bench.contestants:
        rate = tokens / median(seconds[name])
        versus = None if name == PEER else ratio(seconds[name], seconds[PEER])
        mfu = rate * gflops * 1e9 / peak if peak else None
        rows.append(Row(name, rate, mfu, rate * gflops / ceiling, answers[name]["peak_mib"], versus))
    return TrainReport(bench, rows, ceiling, backend, losses)


def _check_same(losses: dict[str, float]) -> None:
    """All start near ln V, whatever they compute; in fp32 only the same function agrees to five digits."""
    for name, loss in losses.items():
        if abs(loss - losses[PEER]) > 1e-5 * losses[PEER]:
            raise BenchError(f"{name} starts at loss {loss}, transformers at {losses[PEER]}: not the same model")


def as_text(report: TrainReport) -> str:
    """The table for a terminal."""
    bench = report.bench
    lines = [
        f"{bench.model}, {bench.precision}, {bench.accumulate} × batch {bench.batch} × {bench.seq_len} tokens, "
        f"{bench.threads} thread(s), {bench.device}; {bench.rounds} rounds of {bench.steps} steps; "
        f"GEMM ceiling {report.ceiling_gflops:.0f} GFLOP/s"
        + (f"; peer's experts: {report.expert_backend}" if report.expert_backend else ""),
        f"{'':22}{'tokens/s':>10}{'MFU':>7}{'of ceiling':>12}{'peak MiB':>10}   speed over transformers as shipped",
    ]
    for row in report.rows:
        versus = "1" if row.versus_peer is None else str(row.versus_peer)
        mfu = "" if row.mfu is None else f"{row.mfu:.1%}"
        speed = f"{row.tokens_per_second:10.0f}{mfu:>7}{row.ceiling_share:12.0%}"
        lines.append(f"{row.name:22}{speed}{row.peak_mib:10.0f}   {versus}")
    return "\n".join(lines)


def as_json(report: TrainReport) -> dict[str, Any]:
    """Plain data, verdicts included."""
    data = asdict(report)
    for row, plain in zip(report.rows, data["rows"], strict=True):
        if row.versus_peer is not None:
            plain["versus_peer"]["verdict"] = row.versus_peer.verdict
    return data
