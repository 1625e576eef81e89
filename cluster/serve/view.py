"""What Serve and the ingress say of the running application."""

from dataclasses import dataclass
from typing import Any, Literal

import httpx

from cluster.serve.errors import telling_line
from cluster.serve.settings import APP_NAME, ENGINE_DEPLOYMENT

_REQUEST_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Endpoint:
    """A running application: its OpenAI base URL is `{url}/v1`."""

    url: str
    served_name: str


@dataclass(frozen=True)
class ReplicaProcess:
    """One engine replica as the Serve controller lists it. `state`: STARTING, RUNNING, UPDATING, STOPPING, ..."""

    replica: str
    state: str
    pid: int | None
    node_id: str | None


@dataclass(frozen=True)
class AppStatus:
    """The application and its engine replicas. `routing` is the ingress's own view (`GET /caravan/replicas`);
    None when it does not answer. `model` is where the replicas' weights come from, `autoscaling` the least and the
    largest number of replicas, or None."""

    state: Literal["NOT_STARTED", "DEPLOYING", "DEPLOY_FAILED", "RUNNING", "UNHEALTHY", "DELETING"]
    message: str
    endpoint: Endpoint
    replicas: list[ReplicaProcess]
    routing: list[dict[str, Any]] | None
    model: str | None
    autoscaling: tuple[int, int] | None


def declared(details: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The declarations of the applications that run."""
    apps = details["applications"].items()
    return {name: app["deployed_app_config"] for name, app in apps if app.get("deployed_app_config")}


def endpoint_of(details: dict[str, Any]) -> Endpoint:
    """Where our application answers."""
    http = details["http_options"]
    config = details["applications"][APP_NAME].get("deployed_app_config") or {}
    return Endpoint(f"http://{http['host']}:{http['port']}", config.get("args", {}).get("served_name", APP_NAME))


def target_replicas(details: dict[str, Any]) -> int | None:
    """How many replicas Serve is to keep; None without an application, and before it has been built."""
    engine = details["applications"].get(APP_NAME, {}).get("deployments", {}).get(ENGINE_DEPLOYMENT)
    return None if engine is None else engine["target_num_replicas"]


def replicas_of(app: dict[str, Any]) -> list[ReplicaProcess]:
    """The engine replicas, those that start or stop among them."""
    engine = app["deployments"].get(ENGINE_DEPLOYMENT, {})
    return [
        ReplicaProcess(entry["replica_id"], entry["state"], entry.get("pid"), entry.get("node_id"))
        for entry in engine.get("replicas", [])
    ]


def followed(endpoint: Endpoint) -> list[dict[str, Any]] | None:
    """Which replicas one of the ingress processes knows, whether it hears them and what they have loaded (`replica`,
    `fresh`, `revision`); it needs no key. None when none answers."""
    answer = _get(f"{endpoint.url}/ready", None)
    return None if answer is None or "replicas" not in answer else answer["replicas"]


def routing(endpoint: Endpoint, api_key: str | None = None) -> list[dict[str, Any]] | None:
    """All that one of the ingress processes knows of the replicas; None when none answers, or not without a key."""
    answer = _get(f"{endpoint.url}/caravan/replicas", api_key)
    return None if answer is None or "replicas" not in answer else answer["replicas"]


def _get(url: str, api_key: str | None) -> dict[str, Any] | None:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        # Environment proxies are for other hosts; the endpoint is loopback unless asked otherwise.
        with httpx.Client(trust_env=False, timeout=_REQUEST_TIMEOUT_S, headers=headers) as http:
            return http.get(url).json()
    except (httpx.HTTPError, ValueError):
        return None


def reason(app: dict[str, Any]) -> str:
    """The message nearest to the cause: a deployment's own, else the application's."""
    messages = [deployment.get("message", "") for deployment in app["deployments"].values()]
    return telling_line(next((message for message in messages if message), app["message"])) or app["status"]
