"""The service's HTTP face. Every answer that is an error is `{"error": {"message", "field"?}}`.

    400  the request is wrong: `field` says what of it           404  there is no such run, log or file
    409  the run is in a state in which that cannot be done      503  the store or the cluster does not answer

Whatever touches the store or the Jobs API runs in a thread and is waited for only so long (bounded.py); lists, the
cluster and the health come from memory, so that they are answered whatever hangs. Of the runs a service knows nothing
before it has read the store once: until then a list is 503, and not empty.
"""

from __future__ import annotations

import logging
import mimetypes
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from cluster.head import ClusterError
from cluster.serve.api_error import log_defect
from cluster.storage import NotFound, StorageError
from pipelines.runs import RunError
from pipelines.service import views
from pipelines.service.bounded import Bounded
from pipelines.service.door import HEALTH, KNOWN, Door, error_body
from pipelines.service.errors import Busy, RequestRefused, UnknownRun, WrongState
from pipelines.service.index import Selection, Sort
from pipelines.service.intake import RunRequest
from pipelines.service.loop import Orchestrator
from pipelines.service.submission import RunState

MAX_LISTED = 1000

_THREADS = 64
_ANSWER_SECONDS = 30.0
_STATUS: dict[type[Exception], int] = {
    RequestRefused: 400,
    UnknownRun: 404,
    NotFound: 404,
    WrongState: 409,
    RunError: 409,
    Busy: 503,
    StorageError: 503,
    ClusterError: 503,
}

_log = logging.getLogger(__name__)


class RunBody(BaseModel):
    """What `POST /api/runs` takes; `RunRequest` says what it means."""

    model_config = ConfigDict(extra="forbid")

    recipe: str | dict[str, Any]
    overrides: Annotated[list[str], Field(max_length=200)] = []
    run_id: str | None = None
    until: str | None = None
    from_stage: str | None = None
    force: Annotated[list[str], Field(max_length=100)] = []
    keep: bool = False
    priority: int = 0
    tags: dict[str, str] = {}


def build_api(
    orchestrator: Orchestrator,
    token: str | None = None,
    *,
    local_only: bool = False,
    answer_seconds: float = _ANSWER_SECONDS,
) -> FastAPI:
    """`token` is what all but the health check needs; `local_only` as for `Door`."""
    api = FastAPI(
        title="Caravan runs", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json", redirect_slashes=False
    )
    bounded = Bounded(_THREADS, answer_seconds)
    _add_runs(api, orchestrator, bounded)
    _add_parts(api, orchestrator, bounded)
    _add_service(api, orchestrator)
    _add_errors(api)
    api.add_middleware(Door, token=token, local_only=local_only)  # type: ignore[arg-type]
    return api


def _add_runs(api: FastAPI, orchestrator: Orchestrator, bounded: Bounded) -> None:
    @api.post("/api/runs", status_code=201)
    async def submit(body: RunBody) -> dict[str, Any]:
        """Queues a run."""
        return asdict(await bounded.call(orchestrator.submit, RunRequest(**dict(body))))

    @api.get("/api/runs")
    async def runs(
        state: Annotated[list[RunState] | None, Query()] = None,
        tag: Annotated[list[str] | None, Query()] = None,
        name: str = "",
        since: float | None = None,
        sort: Sort = "created",
        ascending: bool = False,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> dict[str, Any]:
        """Runs, newest first; `tag` is `name=value`, `since` seconds since the epoch; `total` counts all pages."""
        tags = parse_tags(tag or [])
        selection = Selection(tuple(state or ()), tags, name, since, sort, ascending, limit, offset)
        found, total = selection.of(orchestrator.rows())
        return {"runs": [asdict(row) for row in found], "total": total}

    @api.get("/api/runs/{run_id}")
    async def run(run_id: str) -> dict[str, Any]:
        """A run as it is now, with its stages."""
        return views.run_json(*await bounded.call(orchestrator.find, run_id))

    @api.post("/api/runs/{run_id}/stop")
    async def stop(run_id: str) -> dict[str, Any]:
        """Takes a run out of the queue, or asks its driver to end; look at it again to see when it has."""
        return asdict(await bounded.call(orchestrator.stop, run_id))

    @api.post("/api/runs/{run_id}/resume")
    async def resume(run_id: str) -> dict[str, Any]:
        """Queues a run again that has stopped, failed or was lost."""
        return asdict(await bounded.call(orchestrator.resume, run_id))

    @api.delete("/api/runs/{run_id}", status_code=204)
    async def delete(run_id: str) -> Response:
        """Removes the folder of a run that is over. Its artifacts stay."""
        await bounded.call(orchestrator.delete, run_id)
        return Response(status_code=204)


def _add_parts(api: FastAPI, orchestrator: Orchestrator, bounded: Bounded) -> None:
    store = orchestrator.store

    @api.get("/api/runs/{run_id}/recipe")
    async def recipe(run_id: str) -> Response:
        """The resolved recipe, as YAML."""
        await bounded.call(orchestrator.find, run_id)
        text = await bounded.call(store.child("runs", run_id).read_bytes, "recipe.yaml")
        return Response(text, media_type="application/yaml")

    @api.get("/api/runs/{run_id}/logs")
    async def logs(run_id: str, follow: bool = False) -> Response:
        """What the run's latest job has printed; with `follow` until it is over."""
        job_id = await bounded.call(orchestrator.latest_job, run_id)
        if not follow:
            return PlainTextResponse("".join(await bounded.call(_all_logs, orchestrator, job_id)))
        pieces = bounded.follow(orchestrator.jobs.logs(job_id, follow=True))
        first = await anext(pieces, "")  # what goes wrong is an answer as long as none has begun
        return StreamingResponse(_chained(first, pieces), media_type="text/plain; charset=utf-8")

    @api.get("/api/runs/{run_id}/artifacts")
    async def artifacts(run_id: str) -> dict[str, Any]:
        """The artifacts of its stages."""
        _, found = await bounded.call(orchestrator.find, run_id)
        return {"artifacts": await bounded.call(views.artifacts, store, found)}

    @api.get("/api/runs/{run_id}/metrics")
    async def metrics(
        run_id: str,
        from_step: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=100_000)] = 10_000,
    ) -> dict[str, Any]:
        """The training's reports, in order of their steps."""
        await bounded.call(orchestrator.find, run_id)
        return await bounded.call(views.metrics, store, run_id, from_step, limit)

    @api.get("/api/runs/{run_id}/files")
    async def files(run_id: str) -> dict[str, Any]:
        """Names and sizes of what lies in the run's folder."""
        await bounded.call(orchestrator.find, run_id)
        found = await bounded.call(views.files, store, run_id)
        return {"files": [{"name": name, "size": size} for name, size in found.items()]}

    @api.get("/api/runs/{run_id}/files/{name:path}")
    async def file(run_id: str, name: str) -> Response:
        """One of those files."""
        await bounded.call(orchestrator.find, run_id)
        size, blocks = await bounded.call(views.open_file, store, run_id, name)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        # what a run wrote is not to run as this service's own page
        headers = {
            "Content-Length": str(size),
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "sandbox",
        }
        return StreamingResponse(bounded.follow(blocks), media_type=kind, headers=headers)


def _add_service(api: FastAPI, orchestrator: Orchestrator) -> None:
    @api.get("/api/cluster")
    async def cluster() -> dict[str, Any]:
        """What the cluster has, who takes it and who waits for it, by resource."""
        return orchestrator.cluster()

    @api.get(HEALTH)
    async def health(request: Request) -> dict[str, Any]:
        """`ok`, and for whoever has the token what is wrong if it is not. Nobody needs a token to ask."""
        found = orchestrator.health()
        known = getattr(request.state, KNOWN)
        return found if known else {name: found[name] for name in ("service", "ok")}


def _add_errors(api: FastAPI) -> None:
    for kind in _STATUS:
        api.add_exception_handler(kind, _expected)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http)
    api.add_exception_handler(Exception, _defect)


def _expected(request: Request, error: Exception) -> Response:
    status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
    message = " ".join(str(error).split())
    headers = {"Retry-After": "5"} if status == 503 else {}
    return JSONResponse(error_body(message, getattr(error, "field", None)), status, headers)


def _invalid(request: Request, error: Exception) -> Response:
    """pydantic's first problem, without the input."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:] if not isinstance(part, int) or len(first["loc"]) > 2]
    field = ".".join(where) or None
    return JSONResponse(error_body(f"{field or 'the body'}: {first['msg']}", field), 400)


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing here", 405: "this path does not take that method"}.get(error.status_code)
    return JSONResponse(error_body(what or str(error.detail)), error.status_code, error.headers)


def _defect(request: Request, error: Exception) -> Response:
    log_defect(request.url.path, error)
    return JSONResponse(error_body("the service failed on this request; its log says where"), 500)


def parse_tags(given: list[str]) -> dict[str, str]:
    """`name=value` each. Raises RequestRefused."""
    for each in given:
        if not all(each.partition("=")):
            raise RequestRefused(f"tag={each[:80]!r} is not of the form name=value", "tag")
    return {name: value for name, _, value in (each.partition("=") for each in given)}


def _all_logs(orchestrator: Orchestrator, job_id: str) -> list[str]:
    return list(orchestrator.jobs.logs(job_id))


async def _chained(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for piece in rest:
        yield piece
