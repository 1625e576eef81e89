"""What the service answers, as types, of which `/api/openapi.json` is made. Times are seconds since the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, WithJsonSchema

from pipelines.runs import StageStatus
from pipelines.service.door import HEALTH
from pipelines.service.known import RunRow
from pipelines.service.queue import QueuePolicy
from pipelines.service.submission import Submission

_REASONS = {
    400: "The request is wrong; `field` says what of it.",
    401: "The token is missing or wrong.",
    403: "The service was called by a name that is not of this machine's loopback.",
    404: "There is no such run, log or file.",
    408: "The body came too slowly.",
    409: "The run is in a state in which that cannot be done.",
    413: "The body is too long.",
    415: "The body does not say that it is `application/json`.",
    500: "A defect of the service; its log says where.",
    503: "The store or the cluster does not answer.",
}
_ANYWHERE = (400, 401, 403, 408, 413, 500)
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"headers": {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}}},
    503: {"headers": {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}}},
}


class ErrorObject(BaseModel):
    message: str
    field: str | None = None
    """What of the request is to blame; left out where nothing is."""


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorObject


@dataclass(frozen=True)
class RunList:
    """`total` counts all pages."""

    runs: list[RunRow]
    total: int


@dataclass(kw_only=True)
class StageRow(StageStatus):
    stage: str


@dataclass(frozen=True, kw_only=True)
class RunDetails(RunRow):
    """A run at length: the list's row, its stages, and what was asked of the service, null if nothing was.
    `heartbeat` is when its driver last said that it lives."""

    heartbeat: float | None
    stages: list[StageRow]
    submission: Submission | None


@dataclass(frozen=True)
class ArtifactRow:
    """What a stage leaves; once it is committed `size` (bytes) and `created` (ISO 8601), `error` if it is damaged."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(json_schema_serialization_defaults_required=True)

    stage: str
    key: str
    uri: str
    committed: bool = False
    size: int | None = None
    created: str | None = None
    error: str = ""


@dataclass(frozen=True)
class ArtifactList:
    artifacts: list[ArtifactRow]


_STEP = {"step": {"type": "integer"}, "time": {"type": "number"}, "loss": {"type": ["number", "null"]}}
Report = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": _STEP,
            "required": list(_STEP),
            "description": "The fields of llama/training/metrics.py's StepMetrics, and when they were written.",
        }
    ),
]


@dataclass(frozen=True)
class Metrics:
    """The training's reports; `next` is the step to ask for then, null at the end."""

    rows: list[Report]
    next: int | None


@dataclass(frozen=True)
class FileRow:
    name: str
    size: int


@dataclass(frozen=True)
class FileList:
    files: list[FileRow]


class WaitingRun(BaseModel):
    needs: Mapping[str, float]
    waits_for: str


class ClusterNow(BaseModel):
    """Amounts by resource; `running` and `waiting` by run, `others` is what no run of the service takes."""

    capacity: Mapping[str, float]
    others: Mapping[str, float]
    running: Mapping[str, Mapping[str, float]]
    waiting: Mapping[str, WaitingRun]
    policy: QueuePolicy


class Health(BaseModel):
    """Without the token only `service` and `ok`."""

    service: Literal["caravan"]
    ok: bool
    store: str = ""
    problems: Mapping[str, str] = {}
    active: int = 0


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an operation may be answered with when it is not done: with these statuses, and with those that any may."""
    return {
        status: {"model": ErrorBody, "description": _REASONS[status], **_HEADERS.get(status, {})}
        for status in sorted({*_ANYWHERE, *statuses})
    }


def publish(api: FastAPI, *, token_needed: bool) -> None:
    """Makes `/api/openapi.json` say what FastAPI cannot know: who needs a token, and that 422 is 400 here."""

    def description() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = get_openapi(title=api.title, version=api.version, routes=api.routes)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            parts = schema["components"]
            for name in ("HTTPValidationError", "ValidationError"):
                parts["schemas"].pop(name, None)
            if token_needed:
                parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"token": []}]
                schema["paths"][HEALTH]["get"]["security"] = [{}, {"token": []}]
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = description  # type: ignore[method-assign]
