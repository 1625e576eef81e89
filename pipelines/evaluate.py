"""The evaluate stage: how well the model predicts text it has not seen, beside two baselines, and samples of it.

Bits per byte make models with different tokenizers comparable: the summed bits of all targets over the bytes of their
text. A special token stands for no byte, but its bits count.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cluster.artifact import Artifact
from cluster.placement import WorkerNeeds, run_on_cluster
from cluster.storage import JSON
from llama.config import ModelConfig
from llama.engine import EngineConfig, SamplingParams
from llama.tokenizer import Tokenizer
from llama.training.batch import loss_sum
from pipelines.baselines import measure_baselines
from pipelines.finetune import Trained
from pipelines.loader import held_out_batches
from pipelines.recipe import EvaluateConfig
from pipelines.shard_set import ShardSet
from pipelines.stage import Stage, StageContext
from pipelines.vocabulary import load_tokenizer

if TYPE_CHECKING:
    from llama.model import Transformer

_CACHE_BYTES = 1 << 30
"""Shards are read one after the other; the validation split twice, so that it had better fit."""


@dataclass(frozen=True)
class EvaluateTask:
    """What the evaluating process is sent."""

    trained: Trained
    config: EvaluateConfig
    shards: Artifact
    tokenizer: Artifact
    device: str
    threads: int


def evaluate_stage(model: ModelConfig, config: EvaluateConfig, needs: WorkerNeeds, wait_for_nodes: float) -> Stage:
    """The stage `evaluate`, downstream of `shards`, `tokenizer` and `pretrain`; one process of these needs."""
    return Stage(
        "evaluate",
        1,
        {"model": model, "evaluate": config},
        partial(_evaluate, model, config, needs, wait_for_nodes),
        ("shards", "tokenizer", "pretrain"),
    )


def _evaluate(
    model: ModelConfig, config: EvaluateConfig, needs: WorkerNeeds, wait_for_nodes: float, context: StageContext
) -> dict[str, JSON]:
    task = EvaluateTask(
        Trained.of(model, context.inputs["pretrain"]),
        config,
        context.inputs["shards"],
        context.inputs["tokenizer"],
        device="cuda" if needs.gpus else "cpu",
        threads=max(1, int(needs.cpus)),
    )
    context.emit("scoring the held-out text")
    result = run_on_cluster(needs, evaluate_checkpoint, task, wait_seconds=wait_for_nodes)
    context.record(context.attempt.store.write_json("evaluation.json", result))
    return result


def evaluate_checkpoint(task: EvaluateTask) -> dict[str, Any]:
    """Loss, perplexity and bits per byte on the validation split, the baselines on the same bytes, and samples."""
    torch.set_num_threads(task.threads)
    model = task.trained.load().to(task.device)
    tokenizer = load_tokenizer(task.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        shards = ShardSet(task.shards, cache, _CACHE_BYTES)
        rows = max(1, task.config.max_tokens // shards.seq_len) if task.config.max_tokens else None
        baselines = measure_baselines(shards, tokenizer, rows)
        nats, tokens = score(model, shards, task.config.batch_size, rows)
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": nats / math.log(2) / baselines.bytes,
        **asdict(baselines),
        "samples": samples(model, tokenizer, task.config),
    }


@torch.inference_mode()
def score(model: Transformer, shards: ShardSet, batch_size: int, max_rows: int | None) -> tuple[float, int]:
    """Summed −log p in nats of the validation split's targets, and their number; packed documents each by itself."""
    device = model.tok_embeddings.weight.device
    nats, tokens = 0.0, 0
    for batch in held_out_batches(shards, batch_size, max_rows=max_rows):
        nats += loss_sum(model, batch.to(device)).item()
        tokens += int(batch.num_targets())
    return nats, tokens


def samples(model: Transformer, tokenizer: Tokenizer, config: EvaluateConfig) -> list[dict[str, str]]:
    """The model's own continuations of the recipe's prompts; of a prompt beyond the context, its end."""
    if not config.prompts:
        return []
    from llama.engine import Engine  # with it all that generates

    blocks = -(-model.config.max_seq_len // EngineConfig().block_size) * len(config.prompts)
    engine = Engine(model, tokenizer, EngineConfig(num_blocks=blocks))
    params = SamplingParams(max_tokens=config.sample_tokens, temperature=config.temperature, seed=0)
    room = model.config.max_seq_len - 1
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)][-room:] for prompt in config.prompts]
    completions = engine.generate(prompts, params)
    engine.close()
    return [
        {"prompt": prompt, "text": completion.text}
        for prompt, completion in zip(config.prompts, completions, strict=True)
    ]
