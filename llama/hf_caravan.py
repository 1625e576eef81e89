"""`config.json` of `CaravanForCausalLM` (llama/hf_model.py): a `ModelConfig` as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from llama.config import ModelConfig, MoEConfig, RopeScaling
from llama.hf_values import UnsupportedModel, named

CARAVAN_MODEL_TYPE = "caravan"
CARAVAN_NAME = "CaravanForCausalLM"


def write_caravan_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of `CaravanForCausalLM`."""
    return {
        "architectures": [CARAVAN_NAME],
        "model_type": CARAVAN_MODEL_TYPE,
        "model": asdict(config),
    }


def model_config_from_json(settings: Any) -> ModelConfig:
    """The `ModelConfig` that `dataclasses.asdict` and JSON have made `settings` of.

    Raises:
        UnsupportedModel: not a mapping, an unknown setting, or values that contradict each other; names it.
    """
    return _from_json(ModelConfig, "model", settings)


def _from_json(kind: Any, path: str, settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        raise UnsupportedModel(f"config.json: {path}={settings!r} must hold the settings of a {kind.__name__}")
    known = {field.name for field in fields(kind)}
    values = {}
    for name, value in settings.items():
        if name not in known:
            raise UnsupportedModel(f"config.json: {path}.{name} is not a setting of this version")
        nested = {"moe": MoEConfig, "rope_scaling": RopeScaling}.get(name)
        if nested is not None and value is not None:
            value = _from_json(nested, f"{path}.{name}", value)
        values[name] = value
    return named(lambda: kind(**values))
