"""The components that can be explained: their names, what is drawn of each, and the options that each obeys.

Needs neither torch nor matplotlib; a component's module is imported when it is explained.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llama.model import Transformer
    from llama.tokenizer import Tokenizer

_DIGITS = 6  # of a number in JSON


class ExplainError(ValueError):
    """What was asked for cannot be explained; the message is one line."""


@dataclass(frozen=True)
class Loaded:
    """Trained weights and their tokenizer, by the name that they were asked for."""

    name: str
    model: Transformer
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Options:
    """What a component is explained on; None is the component's own choice. A component obeys those that
    `Component.options` names and is never given others."""

    text: str | None = None
    preset: str | None = None
    model: Loaded | None = None


@dataclass(frozen=True)
class Explanation:
    """Numbers, what they show, and how to draw them."""

    data: Any
    """A dataclass of all that is drawn: numbers, strings, numpy arrays, mappings and sequences of them."""
    lines: tuple[str, ...]
    """What the pictures show, a sentence or two each."""
    drawings: Mapping[str, Callable[[], Figure]]
    """By file name without `.png`; to be called inside `own_style`."""

    def pictures(self) -> dict[str, bytes]:
        """PNGs by file name."""
        from pipelines.figures import own_style, png

        with own_style():
            return {f"{name}.png": png(draw()) for name, draw in self.drawings.items()}


@dataclass(frozen=True)
class Component:
    """`options`: those of `Options` that it obeys."""

    description: str
    options: tuple[str, ...] = ()


COMPONENTS: dict[str, Component] = {
    "norms": Component("what each norm makes of the same tokens: heat maps, and mean and deviation by token and dim"),
    "activations": Component("curves and gradients of every activation, swish by beta, and the gated product"),
    "positions": Component("the sinusoidal table and rotary cosines and sines, and their wavelengths"),
    "rope": Component("a vector before and after its turn, and the frequencies under each scaling", ("preset",)),
    "distance": Component("attention score and weight against distance, for every kind of position"),
    "cache": Component("the KV cache's bytes by number of KV heads; FLOPs with the cache and without", ("preset",)),
    "routing": Component("which experts each token of a text goes to, layer by layer", ("text", "preset", "model")),
    "bpe": Component("byte-pair merges of a text, step by step", ("text", "model")),
}


def explain(name: str, options: Options) -> Explanation:
    """Raises ExplainError: no such component, or an option has a value that it can do nothing with."""
    find(name)
    explanation: Explanation = import_module(f"pipelines.explain.{name}").explain(options)
    return explanation


def find(name: str) -> Component:
    """Raises ExplainError, with the nearest name, if there is no such component."""
    if name not in COMPONENTS:
        near = difflib.get_close_matches(name, COMPONENTS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMPONENTS)}"
        raise ExplainError(f"there is no component {name!r}; {hint}")
    return COMPONENTS[name]


def as_json(value: Any) -> Any:
    """Dataclasses as objects, arrays as lists, floats with six digits."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
