"""A trained encoder–decoder at work: the evaluate stage over the held-out pairs, and answers to anybody's sources.

    evaluation.json       exact_match, token_accuracy, pairs
    predictions.jsonl     {"source": "3 1 2", "target": "2 1 3", "predicted": "2 1 3"}, one a held-out pair

exact_match is the share of answers that are the target, end included; token_accuracy that of the targets' tokens, the
end among them, which stand at their place in the answer. Answers are greedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cluster.artifact import Artifact
from cluster.placement import WorkerNeeds, run_on_cluster
from cluster.storage import JSON
from llama.seq2seq_config import Seq2SeqConfig
from pipelines.pair_set import BOS, EOS, PairSet, Vocabulary
from pipelines.stage import Stage, StageContext

if TYPE_CHECKING:
    from llama.seq2seq import Seq2Seq

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class TranslateTask:
    """What the evaluating process is sent."""

    model: Seq2SeqConfig
    checkpoint: Artifact
    pairs: Artifact
    batch_size: int
    max_tokens: int
    device: str
    threads: int


def evaluate_stage(
    model: Seq2SeqConfig, batch_size: int, max_tokens: int, needs: WorkerNeeds, wait_for_nodes: float
) -> Stage:
    """The stage `evaluate`, downstream of `pairs` and `pretrain`; one process of these needs."""
    run = partial(_evaluate, model, batch_size, max_tokens, needs, wait_for_nodes)
    return Stage("evaluate", 1, {"model": model, "max_tokens": max_tokens}, run, ("pairs", "pretrain"))


def _evaluate(
    model: Seq2SeqConfig,
    batch_size: int,
    max_tokens: int,
    needs: WorkerNeeds,
    wait_for_nodes: float,
    context: StageContext,
) -> dict[str, JSON]:
    pretrain = context.inputs["pretrain"]
    manifest = pretrain.manifest()
    assert manifest is not None  # the graph hands over committed artifacts only
    task = TranslateTask(
        model,
        Artifact(pretrain.store.child(str(manifest.metadata["checkpoint"]))),
        context.inputs["pairs"],
        batch_size,
        max_tokens,
        device="cuda" if needs.gpus else "cpu",
        threads=max(1, int(needs.cpus)),
    )
    context.emit("answering the held-out sources")
    result, predictions = run_on_cluster(needs, answer_held_out, task, wait_seconds=wait_for_nodes)
    lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    store = context.attempt.store
    context.record(store.write_json("evaluation.json", result), store.write_bytes(PREDICTIONS, lines.encode()))
    return result


def answer_held_out(task: TranslateTask) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The figures, and what was answered."""
    torch.set_num_threads(task.threads)
    model = load_seq2seq(task.model, task.checkpoint).to(task.device)
    vocabulary, pairs = Vocabulary.load(task.pairs), list(PairSet(task.pairs, "held_out"))
    answers = list(answer(model, [source for source, _ in pairs], task.batch_size, task.max_tokens))
    exact = right = tokens = 0
    predictions = []
    for (source, target), predicted in zip(pairs, answers, strict=True):
        wanted = [*target, EOS]
        exact += predicted == wanted
        right += sum(token == other for token, other in zip(wanted, predicted, strict=False))
        tokens += len(wanted)
        shown = {"source": source, "target": target, "predicted": predicted}
        predictions.append({name: " ".join(vocabulary.decode(ids)) for name, ids in shown.items()})
    figures = {"exact_match": exact / len(pairs), "token_accuracy": right / tokens, "pairs": len(pairs)}
    return figures, predictions


def load_seq2seq(config: Seq2SeqConfig, checkpoint: Artifact) -> Seq2Seq:
    """The model of a committed checkpoint, for inference on the CPU. Raises StorageError."""
    from llama.seq2seq import Seq2Seq
    from llama.training.checkpoint import load_model_weights

    with torch.device("meta"):
        model = Seq2Seq(config)
    model.to_empty(device="cpu")
    load_model_weights(checkpoint, model)
    return model.eval()


def answer(model: Seq2Seq, sources: Sequence[Sequence[int]], batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """For each source, in order, the tokens of its target, `EOS` last if it ended before `max_tokens`."""
    from llama.seq2seq import pad

    for begin in range(0, len(sources), batch_size):
        source, lengths = pad(sources[begin : begin + batch_size])
        yield from model.generate(source, lengths, max_tokens=max_tokens, bos=BOS, eos=EOS)
