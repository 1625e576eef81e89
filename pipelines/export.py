"""The export stage: a trained checkpoint as a Hugging Face directory, tokenizer and chat template included.

A model that was trained by adapters is exported with them merged, and the adapters lie beside it in PEFT's format:
`adapter/`.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from cluster.placement import WorkerNeeds, run_on_cluster
from cluster.storage import JSON, Artifact, FileEntry, Store
from llama.config import ModelConfig
from llama.hf import export_architecture, save_pretrained
from llama.hf_adapter import save_adapter
from llama.lora import merge_lora
from pipelines.finetune import Trained
from pipelines.graph import Stage, StageContext
from pipelines.recipe import ExportConfig
from pipelines.vocabulary import load_tokenizer

ADAPTER = "adapter"
"""The folder of the adapters in an export."""


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
        Trained.of(model, context.inputs["pretrain"]),
        context.inputs["tokenizer"],
        config.dtype,
        context.attempt.store,
    )
    context.record(*entries)
    return {"architecture": export_architecture(model), "dtype": config.dtype}


def write_export(trained: Trained, tokenizer: Artifact, dtype: str, output: Store) -> list[FileEntry]:
    """Writes the directory's files into `output` and returns them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = trained.load_adapted()
        if trained.start is not None:
            base = None if trained.start.is_checkpoint else trained.start.uri
            save_adapter(model, folder / ADAPTER, base)
        save_pretrained(merge_lora(model), folder, load_tokenizer(tokenizer), dtype=getattr(torch, dtype))
        paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
        return [output.upload(folder / path, path) for path in paths]
