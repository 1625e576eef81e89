"""The service's HTTP face. Every answer that is an error is `{"error": {"message", "field"?}}`.

    400  the request is wrong: `field` says what of it           404  there is no such run, log or file
    409  the run is in a state in which that cannot be done      503  the store or the cluster does not answer

Whatever touches the store or the Jobs API runs in a thread and is waited for only so long (bounded.py); lists, the
cluster and the health come from memory, so that they are answered whatever hangs. Of the runs a service knows nothing
before it has read the store once: until then a list is 503, and not empty.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from cluster.head import ClusterError
from cluster.serve.api_error import log_defect
from cluster.storage import NotFound, StorageError
from pipelines.runs import RUN_ID_PATTERN, RunError
from pipelines.service import views
from pipelines.service.answers import (
    ArtifactList,
    ClusterNow,
    FileList,
    FileRow,
    Health,
    Metrics,
    RunDetails,
    RunList,
    problems,
    publish,
)
from pipelines.service.bounded import Bounded
from pipelines.service.door import HEALTH, KNOWN, Door, error_body
from pipelines.service.download import download
from pipelines.service.errors import Busy, RequestRefused, UnknownRun, WrongState
from pipelines.service.index import Selection, Sort
from pipelines.service.intake import RunRequest
from pipelines.service.known import RunRow
from pipelines.service.loop import Orchestrator
from pipelines.service.submission import LEAST_PRIORITY, MAX_TAGS, MOST_PRIORITY, RunState

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


_TAG = {"pattern": "^[^=]+=[\\s\\S]+$"}
_RUN_ID = {"pattern": f"^{RUN_ID_PATTERN}$"}
RunId = Annotated[str, Path(json_schema_extra=_RUN_ID)]
"""Any other is of no run: 404."""
_EXAMPLE: dict[str, Any] = {
    "recipe": {
        "name": "first",
        "data": {"sources": [{"uri": "stdlib"}], "max_bytes": 1_000_000},
        "tokenizer": {"vocab_size": 512},
        "model": {"preset": "tiny"},
        "train": {"steps": 10, "global_batch": 4, "micro_batch": 4, "seq_len": 128},
    },
    "until": "shards",
    "tags": {"user": "ana"},
}
_LINKS = {
    name: {"operationId": name, "parameters": {"run_id": "$response.body#/id"}}
    for name in ("run", "stop", "resume", "delete", "recipe", "logs", "artifacts", "metrics", "files")
}


class RunBody(BaseModel):
    """What `POST /api/runs` takes; `RunRequest` says what it means."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [_EXAMPLE]})

    recipe: str | dict[str, Any]
    overrides: Annotated[list[str], Field(max_length=200)] = []
    run_id: Annotated[str | None, Field(json_schema_extra=_RUN_ID)] = None
    until: str | None = None
    from_stage: str | None = None
    force: Annotated[list[str], Field(max_length=100)] = []
    keep: bool = False
    priority: Annotated[int, Field(ge=LEAST_PRIORITY, le=MOST_PRIORITY)] = 0
    tags: Annotated[dict[str, str], Field(max_length=MAX_TAGS)] = {}


class NoBody(BaseModel):
    """`{}`: nothing is to be said, but as JSON, which no web page of another site can send by itself."""

    model_config = ConfigDict(extra="forbid")


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
    routes = APIRouter(
        dependencies=[Depends(_json_alone), Depends(_nothing_unknown)],
        responses=problems(),
        generate_unique_id_function=_name,
    )
    _add_runs(routes, orchestrator, bounded)
    _add_parts(routes, orchestrator, bounded)
    _add_service(routes, orchestrator)
    api.include_router(routes)
    _add_errors(api, routes)
    publish(api, token_needed=token is not None)
    api.add_middleware(Door, token=token, local_only=local_only)  # type: ignore[arg-type]
    return api


def _name(route: Any) -> str:
    return route.name


def _json_alone(request: Request) -> None:
    """Raises HTTPException for what another site's page could post."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and media_type != "application/json":
        raise HTTPException(415, "Content-Type must be application/json.")


def _nothing_unknown(request: Request) -> None:
    """Raises RequestRefused for a parameter that would be ignored."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            there_are = f"there are {', '.join(sorted(known))}" if known else "this path takes none"
            raise RequestRefused(f"unknown parameter {name[:80]!r}; {there_are}", name[:80])


def _add_runs(routes: APIRouter, orchestrator: Orchestrator, bounded: Bounded) -> None:
    @routes.post("/api/runs", status_code=201, responses={201: {"links": _LINKS}, **problems(409, 415, 503)})
    async def submit(body: RunBody) -> RunRow:
        """Queues a run."""
        return await bounded.call(orchestrator.submit, RunRequest(**dict(body)))

    @routes.get("/api/runs")
    async def runs(
        state: Annotated[list[RunState], Query(default_factory=list)],
        tag: Annotated[list[Annotated[str, Field(json_schema_extra=_TAG)]], Query(default_factory=list)],
        name: str = "",
        since: Annotated[float, Query(allow_inf_nan=False)] = 0.0,
        sort: Sort = "created",
        ascending: bool = False,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> RunList:
        """Runs, newest first; `tag` is `name=value`, `since` seconds since the epoch; `total` counts all pages."""
        selection = Selection(state, parse_tags(tag), name, since, sort, ascending, limit, offset)
        return RunList(*selection.of(orchestrator.rows()))

    @routes.get("/api/runs/{run_id}", responses=problems(404, 503))
    async def run(run_id: RunId) -> RunDetails:
        """A run as it is now, with its stages."""
        return views.run_details(*await bounded.call(orchestrator.find, run_id))

    @routes.post("/api/runs/{run_id}/stop", responses=problems(404, 409, 415, 503))
    async def stop(run_id: RunId, body: NoBody) -> RunRow:
        """Takes a run out of the queue, or asks its driver to end; look at it again to see when it has."""
        return await bounded.call(orchestrator.stop, run_id)

    @routes.post("/api/runs/{run_id}/resume", responses=problems(404, 409, 415, 503))
    async def resume(run_id: RunId, body: NoBody) -> RunRow:
        """Queues a run again that has stopped, failed or was lost."""
        return await bounded.call(orchestrator.resume, run_id)

    @routes.delete("/api/runs/{run_id}", status_code=204, responses=problems(404, 409, 503))
    async def delete(run_id: RunId) -> None:
        """Removes the folder of a run that is over. Its artifacts stay."""
        await bounded.call(orchestrator.delete, run_id)


def _add_parts(routes: APIRouter, orchestrator: Orchestrator, bounded: Bounded) -> None:
    store = orchestrator.store

    @routes.get(
        "/api/runs/{run_id}/recipe",
        response_class=Response,
        responses={200: {"content": {"application/yaml": {"schema": {"type": "object"}}}}, **problems(404, 503)},
    )
    async def recipe(run_id: RunId) -> Response:
        """The resolved recipe, as YAML."""
        await bounded.call(orchestrator.find, run_id)
        text = await bounded.call(store.child("runs", run_id).read_bytes, "recipe.yaml")
        return Response(text, media_type="application/yaml")

    @routes.get(
        "/api/runs/{run_id}/logs",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems(404, 503)},
    )
    async def logs(run_id: RunId, follow: bool = False) -> Response:
        """What the run's latest job has printed; with `follow` until it is over."""
        job_id = await bounded.call(orchestrator.latest_job, run_id)
        if not follow:
            return PlainTextResponse("".join(await bounded.call(_all_logs, orchestrator, job_id)))
        pieces = bounded.follow(orchestrator.jobs.logs(job_id, follow=True))
        first = await anext(pieces, "")  # what goes wrong is an answer as long as none has begun
        return StreamingResponse(_chained(first, pieces), media_type="text/plain; charset=utf-8")

    @routes.get("/api/runs/{run_id}/artifacts", responses=problems(404, 503))
    async def artifacts(run_id: RunId) -> ArtifactList:
        """The artifacts of its stages."""
        _, found = await bounded.call(orchestrator.find, run_id)
        return ArtifactList(await bounded.call(views.artifacts, store, found))

    @routes.get("/api/runs/{run_id}/metrics", responses=problems(404, 503))
    async def metrics(
        run_id: RunId,
        from_step: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=100_000)] = 10_000,
    ) -> Metrics:
        """The training's reports, in order of their steps."""
        await bounded.call(orchestrator.find, run_id)
        return await bounded.call(views.metrics, store, run_id, from_step, limit)

    @routes.get("/api/runs/{run_id}/files", responses=problems(404, 503))
    async def files(run_id: RunId) -> FileList:
        """Names and sizes of what lies in the run's folder."""
        await bounded.call(orchestrator.find, run_id)
        found = await bounded.call(views.files, store, run_id)
        return FileList([FileRow(name, size) for name, size in found.items()])

    @routes.get(
        "/api/runs/{run_id}/files/{name:path}",
        response_class=Response,
        responses={200: {"content": {"*/*": {"schema": {"format": "binary"}}}}, **problems(404, 503)},
    )
    async def file(run_id: RunId, name: str) -> Response:
        """One of those files."""
        return await download(orchestrator, bounded, run_id, name)


def _add_service(routes: APIRouter, orchestrator: Orchestrator) -> None:
    @routes.get("/api/cluster")
    async def cluster() -> ClusterNow:
        """What the cluster has, who takes it and who waits for it, by resource."""
        return ClusterNow.model_validate(orchestrator.cluster())

    @routes.get(HEALTH, response_model_exclude_unset=True)
    async def health(request: Request) -> Health:
        """`ok`, and for whoever has the token what is wrong if it is not. Nobody needs a token to ask."""
        found = orchestrator.health()
        known = getattr(request.state, KNOWN)
        return Health(**(found if known else {name: found[name] for name in ("service", "ok")}))


def _add_errors(api: FastAPI, routes: APIRouter) -> None:
    def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: "there is nothing here", 405: "this path does not take that method"}.get(error.status_code)
        headers = error.headers
        if error.status_code == 405:
            headers = {"Allow": _methods(request, [*api.routes, *routes.routes])}
        return JSONResponse(error_body(what or str(error.detail)), error.status_code, headers)

    for kind in _STATUS:
        api.add_exception_handler(kind, _expected)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, http_error)
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


def _methods(request: Request, routes: Sequence[BaseRoute]) -> str:
    """All that the path takes: each method of it is a route of its own."""
    there = [
        route for route in routes if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
    ]
    return ", ".join(sorted({method for route in there for method in route.methods or ()}))


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
