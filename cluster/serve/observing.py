"""The operator's view of requests and metrics: `/metrics` and `/caravan/requests`.

With several ingress processes Serve gives these requests to any of them, so each answers for all (`Siblings`).
"""

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from cluster.serve.api_error import ApiError
from cluster.serve.metrics import exposition
from cluster.serve.observer import Observer
from cluster.serve.openapi import add_route
from cluster.serve.record import KEPT_RECORDS, RequestRecord
from cluster.serve.siblings import Siblings
from cluster.serve.state import RoutingState

_ID_PREFIXES = ("chatcmpl-", "cmpl-")


class Observing:
    def __init__(self, observer: Observer, siblings: Siblings, state: RoutingState) -> None:
        self._observer = observer
        self._siblings = siblings
        self._state = state

    def add_routes(self, api: FastAPI) -> None:
        add_route(api, "GET", "/metrics", self.metrics, text=True)
        add_route(api, "GET", "/caravan/requests", self.requests)
        add_route(api, "GET", "/caravan/requests/{request_id}", self.request)
        add_route(api, "GET", "/caravan/grafana.json", self.dashboard)

    async def metrics(self) -> Response:
        """Every ingress process's metrics, in Prometheus's text format."""
        try:
            everyone = await self._siblings.ask("metric_families")
        except TimeoutError:
            everyone = [await self._observer.families()]  # one of us is frozen, and the others' series do not end
        families = [family for families in everyone for family in families]
        return Response(exposition(families), media_type=CONTENT_TYPE_LATEST)

    async def requests(self, limit: str = "20") -> Response:
        """The requests that ended last, newest first, so many of them."""
        # Not an int to FastAPI: its errors are not of OpenAI's shape.
        if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit) <= KEPT_RECORDS:
            message = f"limit={limit!r} is no number from 1 to {KEPT_RECORDS}."
            raise ApiError(400, message, param="limit", code="invalid_value")
        found = await self._ask("newest_records", int(limit))
        return self._answer(found[: int(limit)])

    async def request(self, request_id: str) -> Response:
        """One HTTP request, by the id in its answer or its `X-Request-Id`: one record for each of its prompts."""
        name = request_id
        for prefix in _ID_PREFIXES:
            name = name.removeprefix(prefix)
        found = await self._ask("find_records", name)
        if not found:
            message = f"No request {request_id!r} has ended lately; the last {KEPT_RECORDS} are kept."
            raise ApiError(404, message, param="request_id", code="request_not_found")
        return self._answer(found)

    async def dashboard(self) -> Response:
        """A Grafana dashboard of these metrics."""
        text = files("cluster.serve").joinpath("grafana.json").read_text()
        return Response(text, media_type="application/json")

    async def _ask(self, method: str, argument: str | int) -> list[RequestRecord]:
        try:
            answers = await self._siblings.ask(method, argument)
        except TimeoutError as error:
            message = "An ingress process does not answer; try again."
            raise ApiError(503, message, code="ingress_lost", kind="server_error") from error
        records = [record for answer in answers for record in answer]
        return sorted(records, key=lambda record: record.arrived_at + record.end_s, reverse=True)

    def _answer(self, records: list[RequestRecord]) -> Response:
        coefficients = self._state.coefficients
        return JSONResponse({"requests": [record.as_json(coefficients) for record in records]})
