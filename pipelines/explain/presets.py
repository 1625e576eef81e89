"""The preset that a component is explained on."""

from __future__ import annotations

import difflib

from llama.config import ModelConfig
from llama.presets import PRESETS
from pipelines.explain.registry import ExplainError


def chosen_preset(name: str | None, default: str) -> tuple[str, ModelConfig]:
    """The preset and its name. Raises ExplainError, with the nearest name, if there is no such preset."""
    name = default if name is None else name
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise ExplainError(f"--preset={name} is no preset; {hint}")
    return name, PRESETS[name]
