"""A stage's key: the hash of all that its output depends on."""

import dataclasses
import enum
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

from cluster.storage import JSON
from pipelines.stage import GraphError, Stage


def stage_key(stage: Stage, upstream_keys: Mapping[str, str], generation: int = 0) -> str:
    """20 hexadecimal digits of BLAKE2b over all that the stage's output depends on. Raises GraphError.

    `upstream_keys`: by the stage's kind. `generation`: how often the stage was made to run again though nothing had
    changed.
    """
    content = {
        "stage": stage.kind,
        "version": stage.version,
        "config": canonical(stage.config, stage.name),
        "upstream": dict(upstream_keys),
    }
    if generation:
        content["generation"] = generation
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def canonical(value: object, where: str = "config") -> JSON:
    """A configuration as JSON that is equal for equal configurations. Raises GraphError naming what does not fit."""
    if value is None or isinstance(value, bool | int | str) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise GraphError(f"{where}={value} is not a finite number")
        return value
    if isinstance(value, enum.Enum):
        return canonical(value.value, where)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, BaseModel):
        return {name: canonical(getattr(value, name), f"{where}.{name}") for name in type(value).model_fields}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        return {name: canonical(getattr(value, name), f"{where}.{name}") for name in names}
    if isinstance(value, Mapping):
        pairs: list[tuple[Any, Any]] = list(value.items())
        for key, _ in pairs:
            if not isinstance(key, str):
                raise GraphError(f"{where} has the key {key!r}; only strings are keys of a configuration")
        return {key: canonical(item, f"{where}.{key}") for key, item in pairs}
    if isinstance(value, list | tuple):
        return [canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise GraphError(
        f"{where} is a {type(value).__name__}, which has no canonical form; use plain values or dataclasses"
    )
