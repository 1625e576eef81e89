"""What the JSON files of a Hugging Face directory say, which anybody may have written: checked before it is believed.

Needs no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
T = TypeVar("T")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a finite number"),
    "bool": ((bool,), "true or false"),
}


class UnsupportedModel(ValueError):
    """A model that has no counterpart here, or an incomplete or inconsistent directory."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UnsupportedModel: it holds anything else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} is not a JSON object")
    return content


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold a model's weights, and the one of each tensor by the index, empty if there is none to read.

    All are names in `directory`, since an index must not lead elsewhere; whether they exist is not looked at.

    Raises:
        UnsupportedModel: the index is damaged.
    """
    # transformers prefers the single file, too.
    if (directory / WEIGHTS_FILE).is_file() or not (directory / INDEX_FILE).is_file():
        return [directory / WEIGHTS_FILE], {}
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UnsupportedModel(f"{directory / INDEX_FILE}: weight_map must say for each tensor which file it is in")
    files = {name: Path(file).name for name, file in weight_map.items()}
    return [directory / file for file in sorted(set(files.values()))], files


def checked(key: str, value: Any, kind: str) -> Any:
    """`value`, which must be of `kind`: int, float or bool, with or without `| None`. Of other kinds anything passes.

    A bool is no number, and a number is finite.

    Raises:
        UnsupportedModel: it is not; names key and value.
    """
    plain = kind.removesuffix(" | None")
    if plain not in _KINDS or (value is None and plain != kind):
        return value
    types, words = _KINDS[plain]
    # Infinity and NaN fail the comparison, too.
    if type(value) not in types or not abs(value) <= sys.float_info.max:
        raise UnsupportedModel(f"config.json: {key}={value!r} must be {words}")
    return value


def named(build: Callable[[], T]) -> T:
    """The value of `build()`; an error of the model's own checks becomes one about `config.json`."""
    try:
        return build()
    except UnsupportedModel:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UnsupportedModel(f"config.json describes no valid model: {error}") from error
