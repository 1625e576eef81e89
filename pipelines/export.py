"""The export stage: a trained checkpoint as a Hugging Face directory, tokenizer and chat template included."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from cluster.placement import WorkerNeeds, run_on_cluster
from cluster.storage import JSON, Artifact, FileEntry, Store
from llama.config import ModelConfig
from llama.hf import export_architecture, save_pretrained
from pipelines.evaluate import final_checkpoint, load_checkpoint
from pipelines.graph import Stage, StageContext
from pipelines.recipe import ExportConfig
from pipelines.vocabulary import load_tokenizer


def export_stage(model: ModelConfig, config: ExportConfig) -> Stage:
    """The stage `export`, downstream of `tokenizer` and `pretrain`."""
    return Stage(
        "export", 1, {"model": model, "export": config}, partial(_export, model, config), ("tokenizer", "pretrain")
    )


def _export(model: ModelConfig, config: ExportConfig, context: StageContext) -> dict[str, JSON]:
    context.emit("writing the Hugging Face directory")
    entries = run_on_cluster(
        WorkerNeeds(cpus=1),
        write_export,
        model,
        final_checkpoint(context.inputs["pretrain"]),
        context.inputs["tokenizer"],
        config.dtype,
        context.attempt.store,
    )
    context.record(*entries)
    return {"architecture": export_architecture(model), "dtype": config.dtype}


def write_export(
    model: ModelConfig, checkpoint: Artifact, tokenizer: Artifact, dtype: str, output: Store
) -> list[FileEntry]:
    """Writes the directory's files into `output` and returns them."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(
            load_checkpoint(model, checkpoint), folder, load_tokenizer(tokenizer), dtype=getattr(torch, dtype)
        )
        return [output.upload(path, path.name) for path in sorted(Path(folder).iterdir())]
