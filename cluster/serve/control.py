"""Deploying, updating, scaling and removing the application through Serve's REST interface.

`PUT /api/serve/applications/` states what should run, all of it: whatever was declared before and is not in the
statement goes. So every change starts from what is declared now (cluster/serve/declaration.py). The number of replicas
has an endpoint of its own (`external_scaler_enabled`), and what it sets is not in the declaration.
"""

import contextlib
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster import hold
from cluster.serve.checks import LOOPBACK, check_port, check_room, proxy_listens
from cluster.serve.declaration import declaration, declared_args, declared_engine, with_model, without_autoscaling
from cluster.serve.errors import DeployFailed, NotDeployed, ServeError, telling_line
from cluster.serve.keys import check_exposure, check_keys
from cluster.serve.settings import APP_NAME, ENGINE_DEPLOYMENT, AppArgs, EngineOptions, IngressOptions
from cluster.serve.view import (
    AppStatus,
    Endpoint,
    declared,
    endpoint_of,
    followed,
    reason,
    replicas_of,
    routing,
    target_replicas,
)
from cluster.serve.weights import check_model, check_replaceable
from cluster.storage import Store

if TYPE_CHECKING:
    from cluster.serve.rest import ServeClient

_PORT_PROBES = 8
_POLL_S = 0.2


def check_can_deploy(dashboard_url: str, port: int, *, replace: bool) -> None:
    """An early check, before long work, that `deploy` on this machine's `port` would do what its caller wants.

    Raises ServeError when an endpoint is there already and may not be replaced, PortTaken when the port is.
    """
    details = _connect(dashboard_url).details()
    if APP_NAME in details["applications"] and not replace:
        raise ServeError(
            f"an endpoint is deployed at {endpoint_of(details).url} already; caravan undeploy it first, or use --keep "
            "to replace it"
        )
    check_port(details, "127.0.0.1", port)


def shipped_runtime_env() -> dict[str, Any]:
    """The packages of the connected Ray session, as Serve's REST interface takes them: uploaded `py_modules`.

    `ray.init(runtime_env={"py_modules": [...]})` uploads local folders and replaces them by `gcs://` URIs.
    """
    import ray

    modules = ray.get_runtime_context().runtime_env.get("py_modules", [])
    return {"py_modules": list(modules)} if modules else {}


def cluster_nodes() -> list[dict[str, float]]:
    """All that each node of the connected Ray session has, for `deploy` to see whether there is room."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def deploy(
    args: AppArgs,
    *,
    replicas: int | None = None,
    dashboard_url: str,
    runtime_env: dict[str, Any] | None = None,
    nodes: list[dict[str, float]] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    timeout_s: float = 180.0,
) -> Endpoint:
    """Starts the application, or brings the running one to these settings; returns when it answers.

    A running one that differs in numbers of processes or in `IngressOptions` only keeps its processes and caches; any
    other difference restarts them, the model's URI among them: see `update` for weights without a restart.

    Args:
        replicas: how many there shall be. None where `args` say min_replicas and max_replicas: as many as run now, as
            far as they allow.
        dashboard_url: `http://host:port` of the Ray dashboard.
        runtime_env: ships our packages to the cluster, by remote URIs; see `shipped_runtime_env`.
        nodes: of `cluster_nodes`, to see whether the replicas fit; None: not looked at.
        timeout_s: for everything to be up.

    Raises:
        ModelNotFound, KeysError, NoRoom, PortTaken: before anything is started.
        DeployFailed: with the reason.
        ServeError: the dashboard does not answer; a host beyond loopback and no keys.

    However it is left other than by returning, an application that was not there before is removed again.
    """
    check_exposure(host, args.api_keys)
    args = args.model_copy(update={"listen": (host, port)})
    if _is_here(dashboard_url):
        # The cluster is here, so what it would find can be told at once.
        check_model(args.model)
        if args.api_keys is not None:
            check_keys(args.api_keys)
    client = _connect(dashboard_url)
    details = client.details()
    check_port(details, host, port)
    apps = declared(details)
    wanted = _wanted(args, replicas, details)
    if nodes is not None:
        check_room(args, wanted, nodes)
    app = declaration(args, _kept_engine(apps.get(APP_NAME), args), replicas=wanted, runtime_env=runtime_env)
    endpoint = Endpoint(f"http://{host}:{port}", args.served_name)
    hold.take(args.model, dashboard_url)
    try:
        client.declare({**apps, APP_NAME: app}, {"host": host, "port": port})
        _serve(client, endpoint, wanted, args, timeout_s)
    except BaseException:
        if APP_NAME not in details["applications"]:
            # What ended the deployment is what the caller must hear of, not that the removal failed as well.
            with contextlib.suppress(Exception):
                undeploy(dashboard_url=dashboard_url)
                hold.release(args.model, dashboard_url)
        raise
    _let_go(_served(apps), args.model, dashboard_url)
    return endpoint


def update(model: str, *, dashboard_url: str, timeout_s: float = 600.0) -> Endpoint:
    """Brings the running replicas to the weights at `model`, one after the other, while the others serve.

    Processes, settings and the number of replicas stay. A replica finishes what it computes with the old weights, loads
    the new ones and serves again; those that start later begin with the new ones, since what is declared says so.

    Raises:
        ModelNotFound, AnotherModel: there is no model, or another one than its weights could be exchanged for; before
            anything is changed.
        NotDeployed: there is no application.
        DeployFailed: a replica could not take them; the weights before are asked for again.
    """
    client = _connect(dashboard_url)
    details = client.details()
    apps = declared(details)
    before, target = apps.get(APP_NAME), target_replicas(details)
    if before is None or target is None:
        raise NotDeployed(f"nothing is deployed on the cluster at {dashboard_url}; deploy without --update first")
    if _is_here(dashboard_url) or "://" in model:
        # What is wrong is told at once; of a file on another machine each replica finds it, and then all goes back.
        check_replaceable(declared_engine(before).model, model)
    app, endpoint = with_model(before, model, replicas=target), endpoint_of(details)
    hold.take(model, dashboard_url)
    client.declare({**apps, APP_NAME: app}, details["http_options"])
    try:
        _wait_until_serving(client, endpoint, None, timeout_s, declared_engine(app).revision)
    except DeployFailed as error:
        back = with_model(app, declared_engine(before).model, replicas=target)
        client.declare({**apps, APP_NAME: back}, details["http_options"])
        _let_go(model, declared_engine(before).model, dashboard_url)
        raise DeployFailed(f"{error}; back to the weights of {declared_engine(before).model}") from error
    _let_go(declared_engine(before).model, model, dashboard_url)
    return endpoint


def scale(replicas: int, *, dashboard_url: str, timeout_s: float = 120.0) -> bool:
    """Changes the number of replicas; those that stay keep their processes and caches.

    A number that somebody asks for is kept: autoscaling, if it is on, ends. Returns whether it was.

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
    apps = declared(details)
    before = target_replicas(details) or 1
    fixed = without_autoscaling(apps[APP_NAME], replicas=replicas) if APP_NAME in apps else None
    if fixed is not None:
        # Serve acts on it later, maybe after the number that is set next, so it must say the same.
        client.declare({**apps, APP_NAME: fixed}, details["http_options"])
    client.scale(APP_NAME, ENGINE_DEPLOYMENT, replicas)
    try:
        _wait_until_serving(client, endpoint_of(details), replicas, timeout_s)
    except DeployFailed as error:
        client.scale(APP_NAME, ENGINE_DEPLOYMENT, before)
        raise DeployFailed(f"{error}; back to {before} replicas") from error
    return fixed is not None


def status(*, dashboard_url: str, api_key: str | None = None) -> AppStatus:
    """What runs now. `api_key`: an operator's, where keys are set. Raises NotDeployed."""
    details = _connect(dashboard_url).details()
    if APP_NAME not in details["applications"]:
        raise NotDeployed(f"nothing is deployed on the cluster at {dashboard_url}")
    app, endpoint = details["applications"][APP_NAME], endpoint_of(details)
    config = declared(details).get(APP_NAME)
    engine = None if config is None else declared_engine(config)
    options = IngressOptions() if config is None else declared_args(config)
    bounds = None if options.min_replicas is None else (options.min_replicas, options.max_replicas or 0)
    return AppStatus(
        app["status"],
        app["message"],
        endpoint,
        replicas_of(app),
        routing(endpoint, api_key),
        None if engine is None else engine.model,
        bounds,
    )


def undeploy(*, dashboard_url: str, timeout_s: float = 60.0) -> None:
    """Removes the application, and Serve with it when no other application is left. Absent is fine.

    Raises ServeError when it is still there after `timeout_s`.
    """
    client = _connect(dashboard_url)
    details = client.details()
    alone = not set(details["applications"]) - {APP_NAME}
    if alone:
        client.remove_all()
    elif APP_NAME in details["applications"]:
        others = declared(details)
        others.pop(APP_NAME, None)
        client.declare(others, details["http_options"])
    deadline = time.monotonic() + timeout_s
    while APP_NAME in client.details()["applications"] or (alone and proxy_listens(details)):
        if time.monotonic() > deadline:
            raise ServeError(f"the application is still there after {timeout_s:.0f} s")
        time.sleep(_POLL_S)
    _let_go(_served(declared(details)), None, dashboard_url)


def _served(apps: dict[str, Any]) -> str | None:
    """The model of the application among those declared."""
    return declared_engine(apps[APP_NAME]).model if APP_NAME in apps else None


def _let_go(model: str | None, successor: str | None, dashboard_url: str) -> None:
    """`model` is served no more, unless the successor is the same."""
    if model is not None and (successor is None or Store(model) != Store(successor)):
        hold.release(model, dashboard_url)


def _is_here(dashboard_url: str) -> bool:
    return urlsplit(dashboard_url).hostname in LOOPBACK


def _wanted(args: AppArgs, replicas: int | None, details: dict[str, Any]) -> int:
    """The number of replicas to begin with."""
    low, high = args.min_replicas, args.max_replicas
    if low is None or high is None:
        if replicas is None:
            raise ValueError("replicas=None: say how many, or min_replicas and max_replicas")
        return replicas
    running = target_replicas(details)
    return min(max(replicas or running or low, low), high)


def _kept_engine(app: dict[str, Any] | None, args: AppArgs) -> EngineOptions:
    """What the replicas load: `args.model`, under the revision that a replica which has it has it by."""
    if app is not None:
        present = declared_engine(app)
        if present.model == args.model:
            return present
        return EngineOptions(model=args.model, revision=present.revision + 1)
    return EngineOptions(model=args.model)


def _connect(dashboard_url: str) -> "ServeClient":
    # Here, because Ray reads its environment when it is first imported, and callers may have to set it before.
    from cluster.serve.rest import ServeClient

    if not dashboard_url:
        raise ServeError("the cluster has no dashboard, and Serve is controlled through it; start Ray with it")
    try:
        return ServeClient(dashboard_url)
    except (ValueError, RuntimeError, OSError) as error:
        raise ServeError(f"the Ray dashboard at {dashboard_url} does not answer: {telling_line(str(error))}") from error


def _serve(client: "ServeClient", endpoint: Endpoint, replicas: int, args: AppArgs, timeout_s: float) -> None:
    """Waits for a declared application; the number of replicas may have been set apart from what is declared."""
    deadline = time.monotonic() + timeout_s
    target = target_replicas(client.details())
    if target is not None and target != replicas:
        client.scale(APP_NAME, ENGINE_DEPLOYMENT, replicas)
    autoscales = args.min_replicas is not None
    _wait_until_serving(client, endpoint, None if autoscales else replicas, deadline - time.monotonic())


def _wait_until_serving(
    client: "ServeClient", endpoint: Endpoint, replicas: int | None, timeout_s: float, revision: int | None = None
) -> None:
    """Until the controller runs exactly `replicas` of them (None: as many as it is to), the ingress follows every one,
    and they have loaded `revision` (None: whichever)."""
    deadline = time.monotonic() + timeout_s
    while True:
        details = client.details()
        app = details["applications"].get(APP_NAME)
        if app is None:
            raise DeployFailed("the application was removed while it was starting")
        if app["status"] == "DEPLOY_FAILED":
            raise DeployFailed(f"the application does not start: {reason(app)}")
        wanted = replicas or target_replicas(details) or 1
        listed = replicas_of(app)
        states = [replica.state for replica in listed]
        seen = followed(endpoint) if app["status"] == "RUNNING" and states == ["RUNNING"] * wanted else None
        ready = [entry for entry in seen or [] if entry["fresh"] and revision in (None, entry["revision"])]
        if seen is not None and len(ready) == len(seen) == wanted:
            _check_port_is_ours(endpoint, {replica.replica for replica in listed})
            return
        if time.monotonic() > deadline:
            raise DeployFailed(
                f"after {timeout_s:.0f} s {states.count('RUNNING')} of {wanted} replicas run ({reason(app)}); "
                "see that the cluster has room for cpus_per_replica and gpus_per_replica of each"
            )
        time.sleep(_POLL_S)


def _check_port_is_ours(endpoint: Endpoint, replicas: set[str]) -> None:
    """Raises DeployFailed when another cluster's endpoint answers on the port as well.

    Serve binds with SO_REUSEPORT (without it a port stays taken for a minute after its last connection), and then the
    kernel deals out new connections among all who listen.
    """
    for _ in range(_PORT_PROBES):
        answering = {entry["replica"] for entry in followed(endpoint) or []}
        if answering and not answering & replicas:
            raise DeployFailed(f"another endpoint answers at {endpoint.url} too; undeploy that, or choose another port")
