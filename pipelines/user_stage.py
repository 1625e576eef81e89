"""Stages of the user's own, from an import path."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cluster.storage import JSON
from pipelines.stage import GraphError, Resources, Stage, StageContext
from pipelines.stage_options import OWN_STAGES, StageOptions

UserFunction = Callable[[StageContext, dict[str, Any]], dict[str, JSON] | None]


def user_stages(stages: Mapping[str, StageOptions]) -> list[Stage]:
    """A recipe's own stages. Raises GraphError for one whose function is not there: this imports its module."""
    made = []
    for name, options in stages.items():
        if name in OWN_STAGES or options.uses is None:
            continue
        find_function(name, options.uses)
        made.append(
            Stage(
                name,
                options.version,
                {"uses": options.uses, "config": options.config},
                partial(_call, name, options.uses, options.config),
                options.after,
                options.always,
                Resources(options.num_cpus, options.num_gpus, options.memory, options.accelerator_type),
            )
        )
    return made


def user_modules(stages: Mapping[str, StageOptions]) -> list[str]:
    """The top-level modules that the cluster's workers must get from here: those that are not installed packages."""
    return not_installed(options.uses.partition(":")[0] for options in stages.values() if options.uses)


def not_installed(modules: Iterable[str]) -> list[str]:
    """Of these the top-level modules that are no installed packages, and so have to be sent to the cluster."""
    _find_in_this_folder()
    return sorted(name for name in {module.partition(".")[0] for module in modules} if not _is_installed(name))


def find_function(stage: str, uses: str) -> UserFunction:
    """What `module:function` names. Raises GraphError."""
    where = f"stages.{stage}.uses={uses!r}"
    module_name, _, path = uses.partition(":")
    _find_in_this_folder()
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise GraphError(f"{where} cannot be imported: {error}; correct it, or install it") from error
    except (Exception, SystemExit) as error:  # a script that runs as soon as it is imported
        raise GraphError(f"{where}: importing it raised {type(error).__name__}: {error}") from error
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise GraphError(f"{where}: module {module_name} has no function {path!r}; correct it")
    function: UserFunction = found
    return function


def _find_in_this_folder() -> None:
    """A command that was installed has its own folder on the path, not the user's."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _call(name: str, uses: str, config: dict[str, Any], context: StageContext) -> dict[str, JSON]:
    metadata = find_function(name, uses)(context, config)
    if metadata is not None and not isinstance(metadata, dict):
        raise GraphError(f"stage {name!r} returned a {type(metadata).__name__}; return a dict, or None")
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise GraphError(f"stage {name!r} returned what is no JSON: {error}; return plain numbers and texts") from error
    return metadata or {}


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return False
    folders: Iterable[str] = (sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib"))
    return any(Path(spec.origin).is_relative_to(folder) for folder in folders)
