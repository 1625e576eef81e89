"""The service from outside: what the commands ask of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

from cluster.head import recorded
from pipelines.service.door import HEALTH, read_token

TOKEN_FILE = "CARAVAN_TOKEN_FILE"
"""Environment variable: the file with the token of a service that `caravan up` did not start here."""

_SECONDS = 60.0
_COMING_BACK_SECONDS = 20.0
_POLL_SECONDS = 0.5


class ServiceUnavailable(RuntimeError):
    """The service does not answer."""


class ServiceRefused(RuntimeError):
    """The service has answered that it will not; the message is its own. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ServiceClient:
    """Methods raise ServiceUnavailable and ServiceRefused. A service that has just died is waited for: it returns."""

    def __init__(self, url: str, token: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # no proxy between us and a cluster
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=_SECONDS, trust_env=False, transport=transport
        )

    def health(self) -> dict[str, Any]:
        return self._json("GET", HEALTH)

    def submit(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("POST", "/api/runs", json=dict(body))

    def runs(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("GET", "/api/runs", params={k: v for k, v in parameters.items() if v is not None})

    def run(self, run_id: str) -> dict[str, Any]:
        return self._json("GET", _path(run_id))

    def stop(self, run_id: str) -> dict[str, Any]:
        return self._json("POST", f"{_path(run_id)}/stop", json={})

    def resume(self, run_id: str) -> dict[str, Any]:
        return self._json("POST", f"{_path(run_id)}/resume", json={})

    def artifacts(self, run_id: str) -> list[dict[str, Any]]:
        return self._json("GET", f"{_path(run_id)}/artifacts")["artifacts"]

    def cluster(self) -> dict[str, Any]:
        return self._json("GET", "/api/cluster")

    def delete(self, run_id: str) -> None:
        self._request("DELETE", _path(run_id))

    def logs(self, run_id: str, *, follow: bool = False) -> Iterator[str]:
        """What the run's latest job has printed, in pieces; with `follow` until it is over."""
        with (
            self._told(),
            self._http.stream(
                "GET", f"{_path(run_id)}/logs", params={"follow": follow}, timeout=None if follow else _SECONDS
            ) as response,
        ):
            if response.is_error:
                response.read()
                raise _refusal(response)
            yield from response.iter_text()

    def await_state(self, run_id: str, states: frozenset[str], seconds: float) -> dict[str, Any]:
        """The run once it is in one of the states, or as it is after so long."""
        deadline = time.monotonic() + seconds
        while (run := self.run(run_id))["state"] not in states and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return run

    def close(self) -> None:
        self._http.close()

    def _json(self, method: str, path: str, **options: Any) -> Any:
        try:
            return self._request(method, path, **options).json()
        except ValueError as error:
            raise ServiceUnavailable(f"what answers at {self.url} is not the service of caravan") from error

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        deadline = time.monotonic() + _COMING_BACK_SECONDS
        while True:
            try:
                with self._told():
                    response = self._http.request(method, path, **options)
                break
            except ServiceUnavailable as error:
                # only of a refused connection it is sure that nothing was done
                if not isinstance(error.__cause__, httpx.ConnectError) or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_SECONDS)
        if response.is_error:
            raise _refusal(response)
        return response

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise ServiceUnavailable(
                f"the service at {self.url} does not answer ({error or type(error).__name__})"
            ) from error


def find_service(address: str | None) -> ServiceClient | None:
    """The service that `--address` names, or without one that of `caravan up`; None if there is none, so that Ray's own
    Jobs API is to be asked. Raises TokenError."""
    if address is None and not any(os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")):
        record = recorded()
        if record is None or record.service_url is None:
            return None
        return ServiceClient(record.service_url, _token(record.service_token_file))
    if address is None or not address.startswith(("http://", "https://")):
        return None
    client = ServiceClient(address, _token(None))
    try:
        with httpx.Client(timeout=10, trust_env=False) as http:
            answer = http.get(f"{client.url}{HEALTH}")
            if answer.status_code == 200 and answer.json().get("service") == "caravan":
                return client
    except (httpx.HTTPError, ValueError, AttributeError):
        pass  # a dashboard of Ray, perhaps, which says itself what is wrong
    client.close()
    return None


def _token(file: str | None) -> str | None:
    file = file or os.environ.get(TOKEN_FILE)
    return read_token(file) if file else None


def _path(run_id: str) -> str:
    return f"/api/runs/{quote(run_id, safe='')}"


def _refusal(response: httpx.Response) -> ServiceRefused:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, TypeError, KeyError):
        message = f"it answers with HTTP status {response.status_code}"
    return ServiceRefused(response.status_code, message)
