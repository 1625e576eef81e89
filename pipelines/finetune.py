"""Fine-tuning: the weights that a training starts from, and its result put together again.

`train.start_from` names them in one of three ways; a recipe keeps the place that it stands for:

    quickstart                                       a run whose training has finished, by its id: its last checkpoint
    {store}/artifacts/pretrain/{key}/checkpoints/step-00000700      a checkpoint, of any layout
    /models/llama, s3://models/llama                 a Hugging Face directory, or a committed export

The training is the stage `pretrain` as ever, from step 0 with a fresh optimizer and the data's beginning; only the
weights are another's. They belong to its key by what they are, whatever they are called. With `train.lora` its
checkpoints hold adapters alone, and who reads them reads the start as well.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from cluster.artifact import Artifact
from cluster.location import has_credentials
from cluster.node_copy import copied_once
from cluster.storage import NotFound, Store
from llama.config import ModelConfig
from llama.counts import parameter_shapes
from llama.hf_caravan import model_config_from_json
from llama.hf_config import read_config
from llama.hf_values import CONFIG_FILE
from llama.lora import LoraConfig, apply_lora, merge_lora
from pipelines.adopted_tokenizer import adopt_tokenizer
from pipelines.recipe_text import check_decoders
from pipelines.runs import Run
from pipelines.section import lasting_uri

if TYPE_CHECKING:
    from llama.model import LanguageModel, Transformer

# What loads weights is imported where it does: it takes seconds, and most who ask about a start load none.

_TOKENIZER_FILE = "tokenizer.json"
_SHAPING = [
    *(f"model.{name}" for name in ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "moe")),
    *(f"model.moe.{name}" for name in ("num_experts", "expert_hidden_dim", "num_shared_experts", "shared_hidden_dim")),
    *(f"model.moe.{name}" for name in ("shared_gate", "first_dense_layers", "every", "dense_layers")),
    *(f"model.{name}" for name in ("hidden_dim", "activation", "tie_embeddings", "attention_bias", "qk_norm")),
    *(f"model.{name}" for name in ("ffn_bias", "norm", "norm_placement", "position", "t5_buckets", "max_seq_len")),
]
"""Settings that the parameters' shapes depend on, those that say most first."""


class StartError(ValueError):
    """`train.start_from` names nothing to start from, or something that does not fit; the message is one line."""


@dataclass(frozen=True)
class Start:
    """Weights to start from.

    `fingerprint` is of the files: of an artifact by their checksums, of a plain directory by names, sizes and times.
    """

    uri: str
    is_checkpoint: bool
    model: ModelConfig
    fingerprint: str
    files: tuple[str, ...]

    def load(self, model: LanguageModel) -> None:
        """Fills a model, sharded or not, what lies below its adapters. Of a sharded one all ranks do so together."""
        if self.is_checkpoint:
            from llama.training.checkpoint import load_model_weights

            load_model_weights(Artifact(Store(self.uri)), model, below_adapters=True)
        else:
            from llama.hf import load_weights

            load_weights(self._fetch(), model)

    def require(self, fingerprint: str) -> None:
        """Raises StartError if these are other weights than those of the fingerprint."""
        if fingerprint != self.fingerprint:
            raise StartError(
                f"train.start_from={self.uri} has changed since the training began; put its files back, or train anew"
            )

    def _fetch(self) -> Path:
        """The directory on this node's disk; remote files are copied once a node."""
        from cluster.session import node_folder

        store = Store(self.uri)
        artifact = Artifact(store)
        if artifact.committed:
            return artifact.fetch(node_folder("start"))
        local = store.local_path()
        if local is not None:
            return local

        def fill(folder: Path) -> None:
            for name in self.files:
                store.download(name, folder / name)
            self.require(find_start(self.uri).fingerprint)  # or the copy may be of several versions

        return copied_once(node_folder("start") / self.fingerprint, lambda copy: True, fill)


def find_start(uri: str) -> Start:
    """The weights at `uri`, of which a few small files are read.

    Raises StartError, and StorageError if the store fails.
    """
    store = Store(uri)
    artifact = Artifact(store)
    manifest = artifact.manifest()
    if manifest is not None and "loader" in manifest.metadata:
        progress: dict[str, Any] = manifest.metadata
        if progress["train"].get("lora") is not None:
            raise StartError(
                f"train.start_from={uri} is a checkpoint of adapters without the model below them; start from the "
                "export of its run, which has both"
            )
        if "model" not in progress:
            raise StartError(f"train.start_from={uri} does not say of what model it is; start from its run's export")
        model = model_config_from_json(progress["model"])
    else:
        model = _read_directory(uri, artifact.files if manifest is not None else store)
    if manifest is not None:
        found = [(entry.path, entry.size, entry.checksum) for entry in manifest.files]
        return Start(uri, "loader" in manifest.metadata, model, _fingerprint(found), ())
    stats = {path: stat for path, stat in store.stats().items() if "/" not in path and _is_model_file(path)}
    return Start(
        uri,
        False,
        model,
        _fingerprint([(path, stat.size, stat.mtime_ns) for path, stat in sorted(stats.items())]),
        tuple(sorted(stats)),
    )


def _read_directory(uri: str, files: Store) -> ModelConfig:
    try:
        settings = files.read_json(CONFIG_FILE)
        if not isinstance(settings, dict):
            raise ValueError(f"{CONFIG_FILE} is not a JSON object")
        return read_config(settings)[0]
    except NotFound:
        raise StartError(
            f"train.start_from={uri} is neither a committed checkpoint nor a Hugging Face directory with a "
            f"{CONFIG_FILE}; give the id of a run, or the place of one of these"
        ) from None
    except ValueError as error:
        raise StartError(f"train.start_from={uri}: {error}") from error


def _is_model_file(name: str) -> bool:
    return name == CONFIG_FILE or name.endswith((".safetensors", ".safetensors.index.json"))


def _fingerprint(files: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files).encode())


# --- in a recipe ----------------------------------------------------------------------------------------------------


def fill_in_start(values: dict[str, Any], store: Store | None) -> dict[str, Any]:
    """A recipe's values with `train.start_from` as a place, and what that tells of `model` and `tokenizer` filled in.

    The keys of `model` that are given stand, and a `model` that has them all, as a stored recipe does, is not touched.

    Args:
        store: where runs are looked for.

    Raises:
        ValueError: there is nothing of that name, or the sections contradict it; one line.
        StorageError: the store fails.
    """
    train, given = values["train"], values.get("model", {})
    try:
        uri, tokenizer_path = _locate(train["start_from"], store)
    except StartError:
        raise
    except ValueError as error:  # which shows the name, unless that is a secret
        raise StartError(f"train.start_from: {error}") from error
    values = {**values, "train": {**train, "start_from": uri}}
    names = {field.name for field in fields(ModelConfig)}
    if not isinstance(given, dict) or (names <= given.keys() and "tokenizer" in values):
        return values
    if "preset" in given:
        raise ValueError(
            f"model.preset={given['preset']} and train.start_from={uri} both give the model; leave one out"
        )
    start = find_start(uri)
    base = asdict(start.model)
    values["model"] = {**base, **{key: _over(base.get(key), value) for key, value in given.items()}}
    values["tokenizer"] = _fitting_tokenizer(values.get("tokenizer"), tokenizer_path, start)
    return values


def _over(base: Any, given: Any) -> Any:
    """A section, `moe`, is changed key by key."""
    return {**base, **given} if isinstance(base, dict) and isinstance(given, dict) else given


def _locate(name: str, store: Store | None) -> tuple[str, str | None]:
    """The place that `train.start_from` names, and that of its tokenizer if there is one."""
    if "/" in name:
        uri = lasting_uri(name)
        place = Artifact(Store(uri))
        folder = place.files if place.committed else place.store
        tokenizer = folder.uri if place.committed else uri
        return uri, tokenizer if folder.exists(_TOKENIZER_FILE) else None
    if store is None:
        raise StartError(f"train.start_from={name} names a run, and there is no store to look for it in; give a place")
    run = Run.open(store, name)
    check_decoders(name, run.recipe_yaml)

    def artifact(stage: str) -> Artifact:
        return Artifact(store.child("artifacts", stage, run.status.stages[stage].key))

    manifest = artifact("pretrain").manifest() if "pretrain" in run.status.stages else None
    if manifest is None:
        raise StartError(
            f"train.start_from={name}: the training of this run has not finished; go on with it (caravan resume "
            f"{name}), or give the place of one of its checkpoints"
        )
    if not manifest.metadata.get("lora"):
        checkpoint = artifact("pretrain").store.child(str(manifest.metadata["checkpoint"]))
        return checkpoint.uri, artifact("tokenizer").files.uri
    if "export" not in run.status.stages or not artifact("export").committed:
        raise StartError(
            f"train.start_from={name}: this run has trained adapters, and is not exported, which merges them; go on "
            f"with it: caravan resume {name} --until export"
        )
    return artifact("export").store.uri, artifact("export").files.uri


def _fitting_tokenizer(given: Any, path: str | None, start: Start) -> Any:
    """The section `tokenizer` for weights that know the ids of one tokenizer and no other."""
    size = start.model.vocab_size
    if given is None and path is None:
        raise ValueError(f"tokenizer: missing, and train.start_from={start.uri} brings none; set tokenizer.path")
    if given is None:
        return {"path": path, "vocab_size": size}
    if not isinstance(given, dict):
        return given
    path = given.get("path")
    if path is None:
        raise ValueError(
            f"tokenizer.path is missing: the weights of train.start_from={start.uri} know the ids of one "
            "tokenizer; leave the section out, or name that one"
        )
    if not isinstance(path, str) or has_credentials(path):
        return given  # the section itself refuses it
    if given.get("vocab_size") not in (None, size):
        raise ValueError(
            f"tokenizer.vocab_size={given['vocab_size']} is not the {size} of train.start_from={start.uri}; "
            "leave it out"
        )
    found = adopt_tokenizer(lasting_uri(path), given.get("eos_token")).tokenizer.vocab_size
    if found > size:
        raise ValueError(
            f"tokenizer.path={path} has {found} tokens, more than the {size} of train.start_from={start.uri}; "
            "name the tokenizer that it was trained with"
        )
    return {**given, "vocab_size": size}


def fitting_start(uri: str | None, model: ModelConfig) -> Start | None:
    """What a recipe starts from; None if from nothing. Raises StartError if the weights have other shapes."""
    if uri is None:
        return None
    start = find_start(uri)
    if parameter_shapes(model) != parameter_shapes(start.model):
        ours, theirs = _flat(model), _flat(start.model)
        field = next(name for name in _SHAPING if ours.get(name) != theirs.get(name))
        raise StartError(
            f"{field}={ours.get(field)} is not the {theirs.get(field)} of train.start_from={uri}; leave the section "
            "model out, or start from a model that has it"
        )
    return start


def _flat(model: ModelConfig) -> dict[str, Any]:
    settings = asdict(model)
    moe = settings.pop("moe")
    flat = {f"model.{name}": value for name, value in settings.items()} | {"model.moe": "there" if moe else "absent"}
    return flat | {f"model.moe.{name}": value for name, value in (moe or {}).items()}


# --- the result -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What a finished training has left: its last checkpoint, and if that is of adapters, what lies below them."""

    model: ModelConfig
    checkpoint: Artifact
    start: Start | None
    lora: LoraConfig | None

    @classmethod
    def of(cls, model: ModelConfig, pretrain: Artifact) -> Trained:
        """The result of a committed `pretrain` artifact. Raises StartError if its start has gone or changed."""
        manifest = pretrain.manifest()
        assert manifest is not None  # the graph hands over committed artifacts only
        metadata: dict[str, Any] = manifest.metadata
        checkpoint = Artifact(pretrain.store.child(metadata["checkpoint"]))
        if metadata.get("lora") is None:
            return cls(model, checkpoint, None, None)
        start = find_start(metadata["start_from"])
        start.require(metadata.get("start_fingerprint", start.fingerprint))
        return cls(model, checkpoint, start, LoraConfig(**metadata["lora"]))

    def load_adapted(self) -> Transformer:
        """A plain model with its adapters, if there are any, for inference."""
        from llama.model import Transformer
        from llama.training.checkpoint import load_model_weights

        with torch.device("meta"):
            model = Transformer(self.model)
            if self.lora is not None:
                apply_lora(model, self.lora)
        model.to_empty(device="cpu")
        model.reset_buffers()
        if self.start is not None:
            self.start.load(model)
        load_model_weights(self.checkpoint, model)
        return model.eval()

    def load(self) -> Transformer:
        """A plain model, adapters merged, for inference."""
        return merge_lora(self.load_adapted())
