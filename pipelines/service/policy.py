"""What a recipe that came over the network may read and run. A recipe's author is not the operator.

Everything in a recipe that names a place is looked at before anything is read, in the form in which it will be opened:

    data.sources[*].uri, data.decontaminate.sources[*].uri    `stdlib`, a path, a URI or a glob
    tokenizer.path                                            a path or a URI
    train.start_from                                          a run of the store by its id, a path or a URI
    stages.{name}.uses                                        a Python module and a function in it

and once more when the recipe is resolved, for what it then names. A place must lie in the store or below one of the
operator's prefixes: the same scheme, bucket and options (an `endpoint_override` of its own would be another server),
and the path below the prefix's, after `~`, `..` and percent signs are resolved, and on disk symbolic links too. Of a
glob all folders before the first sign count. Links that are made afterwards, and links to files inside an allowed
folder, are the operator's business; so is what an allowed module does with its `config`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.location import Location, has_credentials
from pipelines.data_config import STDLIB
from pipelines.recipe_text import masked


class PolicyError(ValueError):
    """A recipe that may not run here; `field` is what names the place."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Place:
    """`what` is source, path or start; `value` is as it stands in the recipe."""

    field: str
    what: str
    value: Any


@dataclass(frozen=True)
class RecipePolicy:
    """`prefixes`: where sources, tokenizers and starts may lie besides `store`, as paths or URIs of folders. `modules`:
    whose functions may be stages, submodules included. Raises LocationError for a bad prefix."""

    store: str
    prefixes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for prefix in (self.store, *self.prefixes):
            Location.parse(prefix)

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises PolicyError. `values` are a recipe's, checked for nothing else yet."""
        for place in places(values):
            if not isinstance(place.value, str) or not place.value:
                continue  # refused by the recipe itself
            if place.what == "source" and place.value == STDLIB:
                continue
            if place.what == "start" and "/" not in place.value:
                continue  # the id of a run of the store
            self._check_place(place)
        for field, uses in modules(values):
            module = uses.partition(":")[0]
            if not any(module == allowed or module.startswith(f"{allowed}.") for allowed in self.modules):
                allowed = f"allowed are {', '.join(self.modules)}" if self.modules else "none are"
                raise PolicyError(field, f"module {module!r} is not one that the service's operator allows; {allowed}")

    def _check_place(self, place: Place) -> None:
        if has_credentials(place.value):
            raise PolicyError(place.field, "carries credentials; put them in the environment of the cluster's nodes")
        try:
            wanted = Location.parse(place.value)
        except ValueError as error:
            raise PolicyError(place.field, str(error)) from error
        if not any(_within(wanted, Location.parse(prefix)) for prefix in (self.store, *self.prefixes)):
            shown = masked(place.value)
            raise PolicyError(
                place.field, f"{shown[:200]!r} is not in the store and not below a place that the operator allows"
            )


def places(values: Mapping[str, Any]) -> Iterator[Place]:
    """Everything in a recipe's values that names a place."""
    data = _section(values, "data")
    for where, section in (("data", data), ("data.decontaminate", _section(data, "decontaminate"))):
        sources = section.get("sources")
        for index, source in enumerate(sources if isinstance(sources, list | tuple) else ()):
            if isinstance(source, Mapping):
                yield Place(f"{where}.sources[{index}].uri", "source", source.get("uri"))
    yield Place("tokenizer.path", "path", _section(values, "tokenizer").get("path"))
    yield Place("train.start_from", "start", _section(values, "train").get("start_from"))


def modules(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields that name code, and what they name."""
    for name, options in _section(values, "stages").items():
        if isinstance(options, Mapping) and isinstance(options.get("uses"), str):
            yield f"stages.{name}.uses", options["uses"]


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _within(wanted: Location, allowed: Location) -> bool:
    if (wanted.kind, wanted.bucket, sorted(wanted.options)) != (allowed.kind, allowed.bucket, sorted(allowed.options)):
        return False
    if wanted.kind != "file":
        return _is_below(_before_glob(wanted.path), allowed.path)
    root = os.path.realpath(allowed.path or "/")
    # what would be opened if it is a glob, and what if a file has such a name
    return all(_is_below(os.path.realpath(path or "/"), root) for path in (_before_glob(wanted.path), wanted.path))


def _before_glob(path: str) -> str:
    """The folders before the first part with a sign of a glob in it."""
    found = re.search(r"/[^/]*[*?\[]", path)
    return path[: found.start()] if found else path


def _is_below(path: str, root: str) -> bool:
    root = root.rstrip("/")
    return path == root or path.startswith(f"{root}/") or not root
