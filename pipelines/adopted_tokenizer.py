"""A tokenizer from outside: `tokenizer.json`, alone or in a folder as transformers writes it.

Of the folder these files are read and no others, and nothing in them is run:

    tokenizer.json            the tokenizer
    tokenizer_config.json     the special tokens' names, perhaps a chat template
    chat_template.jinja       the chat template
    generation_config.json    the tokens that end a generation
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import xxhash

from cluster.storage import LocationError, NotFound, StorageError, Store
from llama.tokenizer import GENERATION_CONFIG_FILE, Tokenizer
from pipelines.data_config import SourceConfig
from pipelines.sources import DataError

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_FILES = (_TOKENIZER, _CONFIG, "chat_template.jinja", GENERATION_CONFIG_FILE)


_PROBES = {
    "mixed case": "Hello World",
    "accents": "naïve café",
    "Chinese": "模型训练",
    "emoji": "fine 🙂",
    "indentation": "if x:\n    return  y",
}


@dataclass(frozen=True)
class AdoptedTokenizer:
    """`fingerprint` is that of the files it was read from."""

    tokenizer: Tokenizer
    fingerprint: str


def adopt_tokenizer(path: str, eos_token: str | None = None) -> AdoptedTokenizer:
    """Read the tokenizer at `path`, a local one or a store's URI.

    Args:
        eos_token: the end-of-text token, where `tokenizer_config.json` names none.

    Raises:
        DataError: there is none, it cannot be read, or its end-of-text token is not known.
    """
    files = _files(path, "tokenizer.path")
    fingerprint = xxhash.xxh3_128()
    for name in sorted(files):
        fingerprint.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    try:
        return AdoptedTokenizer(_load(files, eos_token), fingerprint.hexdigest())
    except Exception as error:  # `tokenizers` raises plain ones
        raise DataError(f"tokenizer.path={path}: {error}") from error


def what_is_lost(tokenizer: Tokenizer) -> list[str]:
    """Kinds of text that do not come back from their ids as they were, found by an example of each."""
    return [kind for kind, text in _PROBES.items() if tokenizer.decode(tokenizer.encode(text)) != text]


def check_takes_chats(path: str, eos_token: str | None, sources: Sequence[SourceConfig]) -> None:
    """Raises DataError if some of `data.sources` hold conversations and the tokenizer at `path` has no template for
    them, as well as what `adopt_tokenizer` raises then."""
    chats = [f"data.sources[{index}].uri={each.uri!r}" for index, each in enumerate(sources) if each.format == "chat"]
    if chats and adopt_tokenizer(path, eos_token).tokenizer.chat_template is None:
        raise DataError(
            f"{chats[0]} holds conversations, and tokenizer.path={path} has no chat template; put chat_template.jinja "
            f"beside its {_TOKENIZER}"
        )


def adopt_for_text(path: str, field: str) -> Tokenizer:
    """The tokenizer at `path`, to encode plain text and nothing else: where no file names the end of a text, one of its
    special tokens stands for it. Raises DataError, which names `field`."""
    files = _files(path, field)
    try:
        return _load(files, None if _named_end(files) else _special_token(files[_TOKENIZER]))
    except Exception as error:  # `tokenizers` raises plain ones
        raise DataError(f"{field}={path}: {error}") from error


def _files(path: str, field: str) -> dict[str, bytes]:
    try:
        files = _read(path)
    except (StorageError, LocationError) as error:
        raise DataError(f"{field}={path}: {error}") from error
    if _TOKENIZER not in files:
        raise DataError(f"{field}={path}: there is no {_TOKENIZER}; give that file, or a folder that has it")
    return files


def _read(path: str) -> dict[str, bytes]:
    place, separator, options = path.partition("?") if "://" in path else (path, "", "")
    name = _TOKENIZER
    if place.endswith(".json"):
        place, _, name = place.rpartition("/")
    store = Store((place or "/") + separator + options)
    files: dict[str, bytes] = {}
    for file in _FILES:
        try:
            files[file] = store.read_bytes(name if file == _TOKENIZER else file)
        except NotFound:
            continue
    return files


def _load(files: dict[str, bytes], eos_token: str | None) -> Tokenizer:
    if eos_token is not None:
        files = {**files, _CONFIG: _with_eos_token(files, eos_token)}
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        try:
            return Tokenizer.load(folder)
        except ValueError as error:
            reason = str(error).replace(f"{folder}/", "")
            if "names no eos_token" in reason:
                reason = "it names no end-of-text token; set tokenizer.eos_token to the one that it has"
            raise ValueError(reason) from error


def _with_eos_token(files: dict[str, bytes], eos_token: str) -> bytes:
    named = _named_end(files)
    if named not in (None, eos_token):
        raise ValueError(
            f"{_CONFIG} names the end-of-text token {named!r}, and tokenizer.eos_token={eos_token!r} another; leave "
            "that out"
        )
    return json.dumps({**_settings(files), "eos_token": eos_token}).encode()


def _named_end(files: dict[str, bytes]) -> object:
    named = _settings(files).get("eos_token")
    return named.get("content") if isinstance(named, dict) else named


def _settings(files: dict[str, bytes]) -> dict[str, Any]:
    try:
        settings = json.loads(files.get(_CONFIG, b"{}"))
    except ValueError as error:
        raise ValueError(f"{_CONFIG} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{_CONFIG} is not a JSON object")
    return settings


def _special_token(tokenizer: bytes) -> str:
    added = tokenizers.Tokenizer.from_str(tokenizer.decode()).get_added_tokens_decoder().values()
    if special := [token.content for token in added if token.special]:
        return special[-1]
    raise ValueError(f"it has no special token; name any token as eos_token in a {_CONFIG} beside it")
