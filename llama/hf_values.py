"""Values of a `config.json`, which anybody may have written: checked before anything is built of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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


def checked(key: str, value: Any, kind: str) -> Any:
    """`value`, which must be of `kind`, an annotation: int, float or bool, with or without `| None`. Others pass.

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
