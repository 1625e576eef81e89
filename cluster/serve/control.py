"""Deploying, scaling and removing the application through Serve's REST interface.

`PUT /api/serve/applications/` states what should run, all of it: whatever was declared before and is not in the
statement goes. So every change starts from what is declared now. The statement overrides no option of a deployment:
to apply such a change, Serve's controller imports the router's module, and its process does not have our packages.
Scaling has an endpoint of its own (`external_scaler_enabled`), and leaves running replicas alone.
"""

import contextlib
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import httpx

from cluster.serve.errors import DeployFailed, NotDeployed, PortTaken, ServeError, last_line
from cluster.serve.settings import APP_NAME, ENGINE_DEPLOYMENT, AppArgs, BuildArgs
from cluster.serve.weights import check_model

if TYPE_CHECKING:
    from cluster.serve.rest import ServeClient

IMPORT_PATH = "cluster.serve.app:build"

_PORT_PROBES = 8
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_POLL_S = 0.2
_REQUEST_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Endpoint:
    """A running application: its OpenAI base URL is `{url}/v1`."""

    url: str
    served_name: str


@dataclass(frozen=True)
class ReplicaProcess:
    """One engine replica as the Serve controller lists it. `state`: STARTING, RUNNING, STOPPING, ..."""

    replica: str
    state: str
    pid: int | None
    node_id: str | None


@dataclass(frozen=True)
class AppStatus:
    """The application and its engine replicas. `routing` is the ingress's own view (`GET /caravan/replicas`);
    None when it does not answer."""

    state: Literal["NOT_STARTED", "DEPLOYING", "DEPLOY_FAILED", "RUNNING", "UNHEALTHY", "DELETING"]
    message: str
    endpoint: Endpoint
    replicas: list[ReplicaProcess]
    routing: list[dict[str, Any]] | None


def shipped_runtime_env() -> dict[str, Any]:
    """The packages of the connected Ray session, as Serve's REST interface takes them: uploaded `py_modules`.

    `ray.init(runtime_env={"py_modules": [...]})` uploads local folders and replaces them by `gcs://` URIs.
    """
    import ray

    modules = ray.get_runtime_context().runtime_env.get("py_modules", [])
    return {"py_modules": list(modules)} if modules else {}


def check_can_deploy(dashboard_url: str, port: int, *, replace: bool) -> None:
    """An early check, before long work, that `deploy` on this machine's `port` would do what its caller wants.

    Raises ServeError when an endpoint is there already and may not be replaced, PortTaken when the port is.
    """
    details = _connect(dashboard_url).details()
    if APP_NAME in details["applications"] and not replace:
        raise ServeError(
            f"an endpoint is deployed at {_endpoint(details).url} already; caravan undeploy it first, or use --keep to "
            "replace it"
        )
    _check_port(details, "127.0.0.1", port)


def deploy(
    args: AppArgs,
    *,
    replicas: int,
    dashboard_url: str,
    runtime_env: dict[str, Any] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    timeout_s: float = 180.0,
) -> Endpoint:
    """Starts the application, or brings the running one to these settings; returns when it answers.

    An application that differs in the number of replicas only is scaled; any other difference restarts them.

    Args:
        dashboard_url: `http://host:port` of the Ray dashboard.
        runtime_env: ships our packages to the cluster, by remote URIs; see `shipped_runtime_env`.
        timeout_s: for everything to be up.

    Raises:
        ModelNotFound, PortTaken: before anything is started.
        DeployFailed: with the reason.
        ServeError: the dashboard does not answer.

    However it is left other than by returning, an application that was not there before is removed again.
    """
    if urlsplit(dashboard_url).hostname in _LOOPBACK:
        # The cluster is here, so what it would find can be told at once.
        check_model(args.model)
    client = _connect(dashboard_url)
    details = client.details()
    _check_port(details, host, port)
    app = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "runtime_env": runtime_env or {},
        "external_scaler_enabled": True,
        "args": BuildArgs(**dict(args), replicas=replicas).model_dump(mode="json"),
    }
    declared = _declared(details)
    endpoint = Endpoint(f"http://{host}:{port}", args.served_name)
    try:
        if _differ_in_replicas_only(declared.get(APP_NAME), app):
            client.scale(APP_NAME, ENGINE_DEPLOYMENT, replicas)
        else:
            client.declare({**declared, APP_NAME: app}, {"host": host, "port": port})
        _wait_until_serving(client, endpoint, replicas, timeout_s)
    except BaseException:
        if APP_NAME not in details["applications"]:
            # What ended the deployment is what the caller must hear of, not that the removal failed as well.
            with contextlib.suppress(Exception):
                undeploy(dashboard_url=dashboard_url)
        raise
    return endpoint


def scale(replicas: int, *, dashboard_url: str, timeout_s: float = 120.0) -> None:
    """Changes the number of replicas; those that stay keep their processes and caches.

    Raises:
        ValueError: `replicas` is less than 1.
        NotDeployed: there is no application.
        DeployFailed: they are not up in time (often: the cluster has no room for them); the number before is asked
            for again.
    """
    if replicas < 1:
        raise ValueError(f"replicas={replicas} must be 1 or more; use undeploy to stop serving")
    client = _connect(dashboard_url)
    details = client.details()
    if APP_NAME not in details["applications"]:
        raise NotDeployed(f"nothing is deployed on the cluster at {dashboard_url}; deploy first")
    before = details["applications"][APP_NAME]["deployments"][ENGINE_DEPLOYMENT]["target_num_replicas"]
    client.scale(APP_NAME, ENGINE_DEPLOYMENT, replicas)
    try:
        _wait_until_serving(client, _endpoint(details), replicas, timeout_s)
    except DeployFailed as error:
        client.scale(APP_NAME, ENGINE_DEPLOYMENT, before)
        raise DeployFailed(f"{error}; back to {before} replicas") from error


def status(*, dashboard_url: str) -> AppStatus:
    """What runs now. Raises NotDeployed."""
    details = _connect(dashboard_url).details()
    if APP_NAME not in details["applications"]:
        raise NotDeployed(f"nothing is deployed on the cluster at {dashboard_url}")
    app, endpoint = details["applications"][APP_NAME], _endpoint(details)
    return AppStatus(app["status"], app["message"], endpoint, _replicas(app), _routing(endpoint))


def undeploy(*, dashboard_url: str, timeout_s: float = 60.0) -> None:
    """Removes the application, and Serve with it when no other application is left. Absent is fine.

    Raises ServeError when it is still there after `timeout_s`.
    """
    client = _connect(dashboard_url)
    details = client.details()
    alone = not set(details["applications"]) - {APP_NAME}
    if alone:
        client.delete_applications()
    elif APP_NAME in details["applications"]:
        declared = _declared(details)
        declared.pop(APP_NAME, None)
        client.declare(declared, details["http_options"])
    deadline = time.monotonic() + timeout_s
    while APP_NAME in client.details()["applications"] or (alone and _proxy_listens(details)):
        if time.monotonic() > deadline:
            raise ServeError(f"the application is still there after {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def _proxy_listens(details: dict[str, Any]) -> bool:
    """Whether the proxy that `details` told of still has its port, as far as this machine can see."""
    http = details["http_options"] if details.get("proxies") else None
    if http is None or http["host"] not in _LOOPBACK:
        return False
    try:
        _check_port_free(http["host"], http["port"])
    except PortTaken:
        return True
    return False


def _connect(dashboard_url: str) -> "ServeClient":
    # Here, because Ray reads its environment when it is first imported, and callers may have to set it before.
    from cluster.serve.rest import ServeClient

    if not dashboard_url:
        raise ServeError("the cluster has no dashboard, and Serve is controlled through it; start Ray with it")
    try:
        return ServeClient(dashboard_url)
    except (ValueError, RuntimeError, OSError) as error:
        raise ServeError(f"the Ray dashboard at {dashboard_url} does not answer: {last_line(str(error))}") from error


def _declared(details: dict[str, Any]) -> dict[str, dict[str, Any]]:
    apps = details["applications"].items()
    return {name: app["deployed_app_config"] for name, app in apps if app.get("deployed_app_config")}


def _differ_in_replicas_only(declared: dict[str, Any] | None, app: dict[str, Any]) -> bool:
    if declared is None:
        return False
    return {**declared, "args": {**declared["args"], "replicas": None}} == {
        **app,
        "args": {**app["args"], "replicas": None},
    }


def _check_port(details: dict[str, Any], host: str, port: int) -> None:
    running = details["http_options"] if details.get("proxies") else None
    if running is None:
        _check_port_free(host, port)
    elif (running["host"], running["port"]) != (host, port):
        raise PortTaken(
            f"Serve already listens on {running['host']}:{running['port']} in this cluster; "
            f"deploy there, or undeploy before using {host}:{port}"
        )


def _check_port_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the proxy binds: a socket in TIME_WAIT does not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"port {port} on {host} is taken ({error.strerror})"
            raise PortTaken(f"{reason}; choose another: --port, or serve.port in the recipe") from error


def _wait_until_serving(client: "ServeClient", endpoint: Endpoint, replicas: int, timeout_s: float) -> None:
    """Until the controller runs exactly `replicas` of them and the ingress follows every one."""
    deadline = time.monotonic() + timeout_s
    while True:
        app = client.details()["applications"].get(APP_NAME)
        if app is None:
            raise DeployFailed("the application was removed while it was starting")
        if app["status"] == "DEPLOY_FAILED":
            raise DeployFailed(f"the application does not start: {_reason(app)}")
        listed = _replicas(app)
        states = [replica.state for replica in listed]
        routing = _routing(endpoint) if app["status"] == "RUNNING" and states == ["RUNNING"] * replicas else None
        if routing is not None and sum(entry["fresh"] for entry in routing) == len(routing) == replicas:
            _check_port_is_ours(endpoint, {replica.replica for replica in listed})
            return
        if time.monotonic() > deadline:
            raise DeployFailed(
                f"after {timeout_s:.0f} s {states.count('RUNNING')} of {replicas} replicas run ({_reason(app)}); "
                "see that the cluster has room for cpus_per_replica and gpus_per_replica of each"
            )
        time.sleep(_POLL_S)


def _check_port_is_ours(endpoint: Endpoint, replicas: set[str]) -> None:
    """Raises DeployFailed when another cluster's endpoint answers on the port as well.

    Serve binds with SO_REUSEPORT (without it a port stays taken for a minute after its last connection), and then the
    kernel deals out new connections among all who listen.
    """
    for _ in range(_PORT_PROBES):
        answering = {entry["replica"] for entry in _routing(endpoint) or []}
        if answering and not answering & replicas:
            raise DeployFailed(f"another endpoint answers at {endpoint.url} too; undeploy that, or choose another port")


def _endpoint(details: dict[str, Any]) -> Endpoint:
    http = details["http_options"]
    config = details["applications"][APP_NAME].get("deployed_app_config") or {}
    return Endpoint(f"http://{http['host']}:{http['port']}", config.get("args", {}).get("served_name", APP_NAME))


def _replicas(app: dict[str, Any]) -> list[ReplicaProcess]:
    engine = app["deployments"].get(ENGINE_DEPLOYMENT, {})
    return [
        ReplicaProcess(entry["replica_id"], entry["state"], entry.get("pid"), entry.get("node_id"))
        for entry in engine.get("replicas", [])
    ]


def _routing(endpoint: Endpoint) -> list[dict[str, Any]] | None:
    try:
        # Environment proxies are for other hosts; the endpoint is loopback unless asked otherwise.
        with httpx.Client(trust_env=False, timeout=_REQUEST_TIMEOUT_S) as http:
            return http.get(f"{endpoint.url}/caravan/replicas").raise_for_status().json()["replicas"]
    except httpx.HTTPError:
        return None


def _reason(app: dict[str, Any]) -> str:
    """The message nearest to the cause: a deployment's own, else the application's."""
    messages = [deployment.get("message", "") for deployment in app["deployments"].values()]
    return last_line(next((message for message in messages if message), app["message"])) or app["status"]
