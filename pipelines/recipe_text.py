"""A recipe as text: YAML in which no key comes twice, and the overrides of a command line. Errors are RecipeErrors."""

from __future__ import annotations

import re
from typing import Any

import yaml

_MAX_VALUES = 100_000


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one line."""


OTHER_KINDS = {
    "recipe": "a sweep; caravan sweep runs it",
    "pairs": "a recipe of an encoder–decoder, which caravan run trains and caravan predict asks",
}
"""By the key that they have and no other: what a file may be besides a recipe of a decoder."""


def check_decoders(run_id: str, text: str) -> None:
    """Raises RecipeError unless a run is of a decoder's recipe, of which there is one model that continues text."""
    values = parse_yaml(text, f"the recipe of run {run_id!r}")
    for key, what in OTHER_KINDS.items():
        if isinstance(values, dict) and key in values:
            raise RecipeError(f"run {run_id!r} is of {what.partition(',')[0].partition(';')[0]}; name one of a recipe")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader, but a key that comes twice is an error and not the last one's victory."""

    def get_single_node(self) -> yaml.Node | None:
        """Raises ConstructorError for aliases that stand for more than anybody writes: ten lines can hold 10^10."""
        node = super().get_single_node()
        if node is not None:
            self._size(node, {})
        return node

    def _size(self, node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
        """The number of values with every alias written out."""
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if node in sizes:
            return sizes[node]
        sizes[node] = _MAX_VALUES  # an alias within itself has no end
        parts = [part for each in node.value for part in (each if isinstance(each, tuple) else (each,))]
        size = 1 + sum(self._size(part, sizes) for part in parts)
        if size > _MAX_VALUES:
            problem = f"it has more than {_MAX_VALUES:,} values, aliases written out; write less"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        sizes[node] = size
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key is a list or a mapping; write a plain word"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, what: str) -> Any:
    try:
        loader = _UniqueKeyLoader(text)  # a SafeLoader: builds plain values only
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = '; within {} quote a URI that has a ?: {uri: "s3://..."}' if "got '?'" in (error.problem or "") else ""
        raise RecipeError(f"{what} is not valid YAML{line}: {error.problem}{hint}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is not valid YAML: {first_line(error)}") from error


def sets_preset(override: str) -> bool:
    return override.partition("=")[0].strip() == "model.preset"


def set_override(values: dict[str, Any], override: str) -> None:
    """Set `a.b[0].c=value` in place; mappings on the way are made where they are absent."""
    path, equals, text = override.partition("=")
    override = masked(override)
    keys = [part for part in re.split(r"\.|\[(\d+)\]", path.strip()) if part]
    if not equals or not keys:
        raise RecipeError(f"override {override!r} is not of the form key.path=value")
    value = parse_yaml(text, f"the value of override {override!r}")
    place: Any = values
    for depth, key in enumerate(keys):
        where, last = ".".join(keys[:depth]), depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise RecipeError(f"override {override!r}: {where} has the items 0 to {len(place) - 1}, not {key!r}")
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
        else:
            raise RecipeError(f"override {override!r}: {where}={shown(place)} has no keys below it")
        if last:
            place[index] = value
        else:
            if isinstance(place, dict) and place.get(index) is None:
                place[index] = {}
            place = place[index]


def shown(value: object) -> str:
    text = masked(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def masked(text: str) -> str:
    """A password in a URI is not for the log."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
