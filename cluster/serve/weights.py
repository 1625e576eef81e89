"""Where a replica's model comes from: a Hugging Face directory or an export artifact, named by a URI."""

from collections.abc import Iterator
from pathlib import Path

import xxhash

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.hf_values import CONFIG_FILE, weight_files

_READ_BYTES = 8 << 20


class ModelNotFound(ValueError):
    """A model URI that leads to neither a Hugging Face directory nor a committed export."""


def check_model(uri: str) -> None:
    """Raises ModelNotFound unless there is a model at `uri`; reads a file or two."""
    store = Store(uri)
    if not store.exists(CONFIG_FILE) and not Artifact(store).committed:
        raise ModelNotFound(
            f"serve.model={store} is neither a Hugging Face directory (no config.json) nor a committed export; "
            "give the directory or the artifact's URI"
        )


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
    for path in filter(Path.is_file, (directory / CONFIG_FILE, directory / "tokenizer.json", *weights)):
        checksum.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        for block in _blocks(path):
            checksum.update(block)
    return checksum.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            yield block
