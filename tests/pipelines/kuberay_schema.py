"""A closed JSON schema of KubeRay's kinds: Kubernetes drops unknown fields without a word, this refuses them."""

from pathlib import Path
from typing import Any

import yaml

_FIELDS = Path(__file__).with_name("kuberay_fields.yaml")
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
_PLAIN: dict[str, dict[str, Any]] = {
    **{name: {"type": name} for name in ("string", "integer", "boolean", "number", "object")},
    "quantity": {"type": "string", "pattern": _QUANTITY},
}


def schema_of(kind: str) -> dict[str, Any]:
    types = yaml.safe_load(_FIELDS.read_text())
    return {"$ref": f"#/$defs/{kind}", "$defs": {name: _closed(fields, types) for name, fields in types.items()}}


def _closed(fields: dict[str, str], types: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: _type(told.removesuffix("!"), types) for name, told in fields.items()},
        "required": [name for name, told in fields.items() if told.endswith("!")],
        "additionalProperties": False,
    }


def _type(told: str, types: dict[str, Any]) -> dict[str, Any]:
    if told.startswith("["):
        return {"type": "array", "items": _type(told[1:-1], types)}
    if told.startswith("{"):
        return {"type": "object", "additionalProperties": _type(told[1:-1], types)}
    if told in _PLAIN:
        return _PLAIN[told]
    if told in types and "kind" not in types[told]:  # a manifest's kind is also a word
        return {"$ref": f"#/$defs/{told}"}
    return {"enum": told.split("|")}
