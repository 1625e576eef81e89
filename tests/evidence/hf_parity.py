"""Evidence that training here is training: the same model on the same batches as by a plain loop over transformers.

    python tests/evidence/hf_parity.py

Both start from one export. The plain loop has transformers' own loss, torch's AdamW, a schedule written out and
`clip_grad_norm_`; ours is the `Trainer`. The text is Python's standard library as bytes. After 300 steps both models
are scored on held-out text by transformers. Then an adapter that is trained here for 50 steps is given to PEFT.

Needs the environment of `make setup` and about three minutes of one core. Exits non-zero when a bar is missed.
"""

from __future__ import annotations

import math
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama.config import ModelConfig, MoEConfig
from llama.hf import load_weights, save_pretrained
from llama.hf_adapter import save_adapter
from llama.lora import LoraConfig, apply_lora, lora_layers
from llama.model import Transformer
from llama.training.batch import Batch
from llama.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from llama.training.mesh import process_group
from llama.training.trainer import Trainer

LARGEST_LOSS_DIFFERENCE = 0.005
LARGEST_EARLY_DIFFERENCE = 1e-5
LARGEST_LOGIT_DIFFERENCE = 1e-5
DENSE = ModelConfig(vocab_size=256, dim=64, num_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=192, max_seq_len=128)
MOE = replace(DENSE, moe=MoEConfig(num_experts=4, top_k=2, expert_hidden_dim=96, balance_loss_weight=0.0))
CONFIG = TrainConfig(
    steps=300,
    global_batch=8,
    micro_batch=4,
    seq_len=96,
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, grad_clip=1.0),
    schedule=ScheduleConfig(kind="cosine", warmup_steps=20, min_lr_ratio=0.1),
    log_every=1,
    checkpoint_every=0,
)


class Rows:
    """Rows of `seq_len + 1` bytes of the standard library, in an order of their own; a loader for the trainer."""

    def __init__(self, config: TrainConfig, seed: int) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:120])
        length = config.seq_len + 1
        rows = np.frombuffer(text, np.uint8)[: len(text) // length * length].reshape(-1, length)
        order = np.random.default_rng(seed).permutation(len(rows))
        self.rows = torch.from_numpy(rows[order].astype(np.int64))
        self.held_out = self.rows[-64:]
        self.config = config

    def step(self, number: int) -> Tensor:
        """The rows of a step: `[global_batch, seq_len + 1]`."""
        size = self.config.global_batch
        return self.rows[number * size : (number + 1) * size]

    def __iter__(self) -> Iterator[Batch]:
        for rows in self.rows.split(self.config.micro_batch):
            yield Batch(rows[:, :-1], rows[:, 1:])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    epoch = None


def train_here(model: ModelConfig, config: TrainConfig, data: Rows, start: Path) -> tuple[Transformer, list[float]]:
    """A plain model after training, and the loss of each step."""
    losses: list[float] = []
    with process_group():
        trainer = Trainer(
            model,
            config,
            data,
            start=lambda sharded: load_weights(start, sharded),
            on_metrics=lambda metrics: losses.append(metrics.loss),
        )
        trainer.fit()
        state = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in trainer.model.state_dict().items()
        }
    trained = Transformer(model)
    if config.lora is not None:
        apply_lora(trained, config.lora)
    trained.load_state_dict(state)
    return trained.eval(), losses


def train_there(data: Rows, start: Path) -> tuple[Any, list[float]]:
    """The same by a plain loop over transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    embeddings = model.get_input_embeddings().weight
    decayed = [each for each in model.parameters() if each.ndim >= 2 and each is not embeddings]
    others = [each for each in model.parameters() if each.ndim < 2 or each is embeddings]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(300):
        progress = max(0, step + 1 - 20) / 280
        rate = (step + 1) / 20 if step < 20 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        rows = data.step(step)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


@torch.no_grad()
def held_out_loss(model: Any, data: Rows) -> float:
    """Of a transformers model, nats per byte."""
    return model(input_ids=data.held_out, labels=data.held_out).loss.item()


def load_theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = 0

    def check(claim: str, figure: str, holds: bool) -> None:
        nonlocal failed
        failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'}  {claim:<66} {figure}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, config in (("dense", DENSE), ("MoE", MOE)):
            data = Rows(CONFIG, seed=0)
            model = Transformer(config)
            model.init_weights(seed=0)
            architecture = save_pretrained(model, folder / f"{kind}-start")
            began = time.perf_counter()
            ours, our_losses = train_here(config, CONFIG, data, folder / f"{kind}-start")
            middle = time.perf_counter()
            theirs, their_losses = train_there(data, folder / f"{kind}-start")
            seconds = f"{middle - began:.0f} and {time.perf_counter() - middle:.0f} s"
            save_pretrained(ours, folder / kind)
            # The mean of the last steps, which differ by their batches more than by the trainer.
            last = [sum(losses[-20:]) / 20 for losses in (our_losses, their_losses)]
            held_out = [held_out_loss(each, data) for each in (load_theirs(folder / kind), theirs)]
            for what, (mine, peer) in (("training", last), ("held-out", held_out)):
                off = abs(mine / peer - 1)
                figure = f"{mine:.5f} and {peer:.5f}, {off:.4%} apart ({seconds})"
                check(
                    f"{architecture}: {what} loss within {LARGEST_LOSS_DIFFERENCE:.1%}",
                    figure,
                    off <= LARGEST_LOSS_DIFFERENCE,
                )
            off = max(abs(a / b - 1) for a, b in zip(our_losses[:20], their_losses[:20], strict=True))
            claim = f"{architecture}: the first 20 losses within {LARGEST_EARLY_DIFFERENCE:.0e}"
            check(claim, f"{off:.1e} apart", off <= LARGEST_EARLY_DIFFERENCE)
            learned = f"from {our_losses[0]:.3f} to {last[0]:.3f}"
            check(f"{architecture}: it has learned", learned, last[0] < our_losses[0] / 1.5)
            adapt(folder, kind, config, check)
    sys.exit(1 if failed else 0)


def adapt(folder: Path, kind: str, config: ModelConfig, check: Any) -> None:
    """50 steps of adapters on other rows: the logits here and in PEFT."""
    targets = ("wq", "wk", "wv", "wo") if config.moe else ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    settings = replace(CONFIG, steps=50, lora=LoraConfig(rank=4, alpha=8, targets=targets))
    data = Rows(settings, seed=1)
    adapted, losses = train_here(config, settings, data, folder / kind)
    adapter = folder / f"{kind}-adapter"
    save_adapter(adapted, adapter, base=str(folder / kind))
    base = load_theirs(folder / kind)
    tokens = data.held_out[:8]
    with torch.no_grad():
        ours, before = adapted(tokens), base(tokens).logits
        theirs = peft.PeftModel.from_pretrained(base, adapter).eval()(tokens).logits
    scale = float(ours.abs().max())
    off, moved = (float((each - ours).abs().max()) / scale for each in (theirs, before))
    figure = f"{off:.1e}; without the adapter {moved:.1e}; {len(lora_layers(adapted))} layers, loss {losses[-1]:.3f}"
    claim = f"{kind}: an adapter of 50 steps gives PEFT's logits to {LARGEST_LOGIT_DIFFERENCE:.0e}"
    check(claim, figure, off <= LARGEST_LOGIT_DIFFERENCE < moved / 100)


if __name__ == "__main__":
    main()
