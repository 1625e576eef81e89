"""A trained checkpoint as a Hugging Face directory, tokenizer and chat template included: the export stage of the last
one, and any other that a run still has.

A model that was trained by adapters is exported with them merged, and the adapters lie beside it in PEFT's format:
`adapter/`.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from cluster.artifact import Artifact
from cluster.location import has_credentials
from cluster.placement import WorkerNeeds, run_on_cluster
from cluster.storage import JSON, FileEntry, Store
from llama.config import ModelConfig
from llama.lora import merge_lora
from pipelines.finetune import Trained, fitting_start
from pipelines.recipe import ExportConfig, Recipe
from pipelines.recipe_text import check_decoders
from pipelines.runs import Run, RunError
from pipelines.stage import Stage, StageContext
from pipelines.training_folder import CHECKPOINTS, INCARNATIONS, START, checkpoints_of, training_folder
from pipelines.vocabulary import load_tokenizer

ADAPTER = "adapter"
"""The folder of the adapters in an export."""


def export_stage(model: ModelConfig, config: ExportConfig) -> Stage:
    """The stage `export`, downstream of `tokenizer` and `pretrain`."""
    return Stage(
        "export", 1, {"model": model, "export": config}, partial(_export, model, config), ("tokenizer", "pretrain")
    )


def _export(model: ModelConfig, config: ExportConfig, context: StageContext) -> dict[str, JSON]:
    from llama.hf import export_architecture  # seconds, which whoever only asks what a recipe means would wait for

    context.emit("writing the Hugging Face directory")
    entries = run_on_cluster(
        WorkerNeeds(cpus=1),
        write_export,
        Trained.of(model, context.inputs["pretrain"]),
        context.inputs["tokenizer"],
        config.dtype,
        context.attempt.store,
    )
    context.record(*entries)
    return {"architecture": export_architecture(model), "dtype": config.dtype}


def write_export(trained: Trained, tokenizer: Artifact, dtype: str, output: Store) -> list[FileEntry]:
    """Writes the directory's files into `output` and returns them."""
    from llama.hf import save_pretrained
    from llama.hf_adapter import save_adapter

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = trained.load_adapted()
        if trained.start is not None:
            base = None if trained.start.is_checkpoint else trained.start.uri
            save_adapter(model, folder / ADAPTER, base)
        save_pretrained(merge_lora(model), folder, load_tokenizer(tokenizer), dtype=getattr(torch, dtype))
        paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
        return [output.upload(folder / path, path) for path in paths]


# --- out of a run's checkpoints -------------------------------------------------------------------------------------


def export_checkpoint(run: Run, step: str, to: str) -> int:
    """Writes the model of one of the run's checkpoints to the folder or URI `to`, here and now; returns its step.

    Args:
        step: a number, `last`, or `best`: that of the lowest validation loss.

    Raises RunError, one line: there is no such checkpoint, or `to` is not empty; StartError: the weights below the
    adapters have gone or changed.
    """
    check_decoders(run.id, run.recipe_yaml)
    checkpoints, folder = checkpoints_of(run), training_folder(run)
    if not checkpoints or folder is None:
        raise RunError(f"run {run.id!r} has no checkpoint yet; go on with it: caravan resume {run.id}")
    chosen = _choose(run, step, {at: saved.get("val_loss") for at, saved in checkpoints.items()})
    if has_credentials(to):
        raise RunError("--to carries credentials; put them in the environment")
    output = Store(to if "://" in to else Path(to).resolve())
    if output.list():
        raise RunError(f"--to {to} is not empty; give a folder that is")
    recipe = Recipe.from_yaml(run.recipe_yaml)
    tokenizer = Artifact(run.store.child("artifacts", "tokenizer", run.status.stages["tokenizer"].key))
    checkpoint = Artifact(folder.child(CHECKPOINTS, f"step-{chosen:08d}"))
    adapters = recipe.train.lora
    start = fitting_start(recipe.train.start_from, recipe.model) if adapters is not None else None
    if start is not None:
        for record in map(folder.read_json, folder.list(INCARNATIONS)):
            start.require(record.get(START, start.fingerprint))
    try:
        write_export(Trained(recipe.model, checkpoint, start, adapters), tokenizer, recipe.export.dtype, output)
    except FileNotFoundError:
        if checkpoint.committed:
            raise
        raise RunError(
            f"the checkpoint of step {chosen} has just been removed: run {run.id!r} goes on, and keeps the latest "
            f"{recipe.train.keep_last}; take a later one, or raise train.keep_last or train.keep_every"
        ) from None
    return chosen


def _choose(run: Run, step: str, losses: dict[int, float | None]) -> int:
    there = f"run {run.id!r} has those of steps {', '.join(map(str, losses))}"
    if step == "last":
        return max(losses)
    if step == "best":
        measured = {at: loss for at, loss in losses.items() if loss is not None}
        if not measured:
            raise RunError(
                f"no checkpoint of run {run.id!r} has a validation loss, so none is the best; give --step last, or "
                "train with train.validate_every"
            )
        return min(measured, key=lambda at: (measured[at], -at))
    if not step.isdecimal():
        raise RunError(f"--step={step} is neither a number nor last or best; {there}")
    if int(step) not in losses:
        raise RunError(f"--step={step}: there is no such checkpoint; {there}")
    return int(step)
