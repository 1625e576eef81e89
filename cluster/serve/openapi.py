"""The published description of the API, `/openapi.json`: made of the types that requests and answers are checked with.

Bodies are read by hand, for OpenAI's error shape, so FastAPI cannot know them by itself: `add_route` tells it.
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.serve.api_error import ErrorBody

_REF = "#/components/schemas/{model}"
_EVENTS = {"text/event-stream": {"schema": {"type": "string", "description": "With stream: server-sent events."}}}
_TEXT = {"text/plain": {"schema": {"type": "string"}}}

Bodies = dict[type[BaseModel], dict[str, tuple[Any, ...]]]
"""The types of request bodies, and beyond their members those that are accepted only at one of these values."""


def add_route(
    api: FastAPI,
    method: str,
    path: str,
    endpoint: Callable[..., Any],
    *,
    body: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    statuses: tuple[int, ...] = (200,),
    events: bool = False,
    text: bool = False,
) -> None:
    """Adds an endpoint together with what it takes and gives.

    Args:
        answer: the JSON it answers; None when that is no fixed type.
        statuses: with which it does so; every other one carries OpenAI's error object.
        events: it may answer with a stream of events instead.
        text: it answers plain text.
    """
    good: dict[str, Any] = {"description": "Done."} if answer is None else {"description": "Done.", "model": answer}
    good |= {"content": _EVENTS} if events else {"content": _TEXT} if text else {}
    bad = {"description": "Refused or failed.", "model": ErrorBody}
    content = {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}} if body else {}
    api.add_api_route(
        path,
        endpoint,
        methods=[method],
        response_class=Response if text else JSONResponse,
        responses={**{status: good for status in statuses}, "4XX": bad, "5XX": bad},
        openapi_extra={"requestBody": {"required": True, "content": content}} if body else None,
    )


def publish(api: FastAPI, served_name: str, bodies: Bodies) -> None:
    """Makes `/openapi.json` complete."""

    def description() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = get_openapi(title=api.title, version=api.version, routes=api.routes)
            _, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
            parts = schema.setdefault("components", {}).setdefault("schemas", {})
            parts.update(definitions["$defs"])
            for body, unsupported in bodies.items():
                _complete(parts[body.__name__], unsupported, served_name)
            if "ChatMessage" in parts:
                parts["ChatMessage"]["additionalProperties"] = {"type": "null"}
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = description  # type: ignore[method-assign]


def _complete(schema: dict[str, Any], unsupported: dict[str, tuple[Any, ...]], served_name: str) -> None:
    """Says of a request body what its pydantic type does not: null is nothing, and there is one model."""
    properties = schema["properties"]
    properties["model"] = {"enum": [served_name], "title": "Model"}
    for name, part in properties.items():
        if name not in schema.get("required", ()):
            properties[name] = {"anyOf": [part, {"type": "null"}]}
    for name in unsupported.keys() - properties.keys():
        values = [*unsupported[name], None]
        properties[name] = {"enum": values, "description": "Not supported: only what asks for nothing."}
