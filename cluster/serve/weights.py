"""Where a replica's model comes from: a Hugging Face directory or an export artifact, named by a URI."""

import json
from collections.abc import Iterator
from pathlib import Path

import xxhash

from cluster.artifact import Artifact
from cluster.storage import NotFound, Store
from llama.config import ModelConfig
from llama.hf_config import read_config
from llama.hf_values import CONFIG_FILE, UnsupportedModel, weight_files

_TOKENIZER_FILE = "tokenizer.json"
_READ_BYTES = 8 << 20


class ModelNotFound(ValueError):
    """A model URI that leads to neither a Hugging Face directory nor a committed export."""


class AnotherModel(ValueError):
    """A model whose weights cannot take the place of the present ones."""


def check_model(uri: str) -> None:
    """Raises ModelNotFound unless there is a model at `uri`; reads a file or two."""
    store = Store(uri)
    if not store.exists(CONFIG_FILE) and not Artifact(store).committed:
        raise ModelNotFound(
            f"serve.model={store} is neither a Hugging Face directory (no config.json) nor a committed export; "
            "give the directory or the artifact's URI"
        )


def shape_id(uri: str) -> str:
    """Names all of a model but its weights: its architecture and its tokenizer. Raises ModelNotFound."""
    check_model(uri)
    files = _files(uri)
    try:
        architecture = repr(_config(files)).encode()
    except UnsupportedModel:
        architecture = _read(files, CONFIG_FILE)  # whoever loads it says what is wrong with it
    return xxhash.xxh3_128_hexdigest(architecture + b"\0" + _read(files, _TOKENIZER_FILE))


def family(uri: str, served_name: str) -> str:
    """Names what stays the same when weights are swapped: an ingress uses replicas of its own family only.

    Two deployments differ in it when their models, tokenizers or served names do, so that while one takes the other's
    place neither answers for the other. Raises ModelNotFound.
    """
    return xxhash.xxh3_128_hexdigest(f"{uri}\0{served_name}\0{shape_id(uri)}".encode())


def check_replaceable(present: str, successor: str) -> None:
    """Whether the weights at `successor` can take the place of those at `present` in a running replica. Both are URIs;
    the small files of both are read.

    Raises:
        ModelNotFound: there is no model at `successor`.
        AnotherModel: it has another architecture or another tokenizer.
        UnsupportedModel: it has one that we do not have.
    """
    check_model(successor)
    old, new = _files(present), _files(successor)
    if _config(old) != _config(new):
        raise AnotherModel(
            f"{Store(successor)} has another architecture than {Store(present)}; deploy it without --update, which "
            "restarts the replicas"
        )
    if _read(old, _TOKENIZER_FILE) != _read(new, _TOKENIZER_FILE):
        raise AnotherModel(
            f"{Store(successor)} has another tokenizer than {Store(present)}; deploy it without --update, which "
            "restarts the replicas"
        )


def _files(uri: str) -> Store:
    store = Store(uri)
    artifact = Artifact(store)
    return artifact.files if artifact.committed else store


def _read(files: Store, name: str) -> bytes:
    try:
        return files.read_bytes(name)
    except NotFound:
        return b""


def _config(files: Store) -> tuple[ModelConfig, str | None]:
    try:
        config, architecture = read_config(json.loads(_read(files, CONFIG_FILE)))
    except ValueError as error:
        raise UnsupportedModel(f"{files.uri}/{CONFIG_FILE}: {error}") from error
    return config, None if architecture is None else architecture.name


def fetch_model(uri: str, cache_dir: Path) -> Path:
    """The model's directory on this machine; remote files are copied below `cache_dir`, once a machine.

    Raises:
        ModelNotFound: there is no model at `uri`.
        StorageError: the store does not answer, or the files are not what their manifest says.
    """
    check_model(uri)
    store = Store(uri)
    artifact = Artifact(store)
    if artifact.committed:
        return artifact.fetch(cache_dir / xxhash.xxh3_64_hexdigest(store.uri.encode()))
    local = store.local_path()
    if local is None:
        raise ModelNotFound(f"serve.model={store} is remote and has no manifest; give the URI of an export artifact")
    return local


def weights_id(directory: Path) -> str:
    """Names the model by content: its weights, what is computed with them, and the tokenizer that gives input meaning.

    It is xxh3_128 over the names, sizes and bytes of config.json, of tokenizer.json and of the safetensors files that
    are read.
    """
    checksum = xxhash.xxh3_128()
    weights, _ = weight_files(directory)
    for path in filter(Path.is_file, (directory / CONFIG_FILE, directory / _TOKENIZER_FILE, *weights)):
        checksum.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        for block in _blocks(path):
            checksum.update(block)
    return checksum.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            yield block
