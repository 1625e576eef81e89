"""What Serve is told to run: pure functions from settings to its declarative config, and back.

A declaration has two parts. `args` (`BuildArgs`) belong to the application's code version: a difference there restarts
every process. `deployments` override what `cluster.serve.app.build` made: numbers of processes and `user_config`, which
running processes take in (`reconfigure`), one after the other, and new ones before they serve. Serve keeps the
declaration in the head's key-value store, so it outlives every process of ours and its own controller.

The engine's entry names the router, though `build` does too: to apply an override Serve's controller makes the
deployment's config anew, and would import the router's module, which its process does not have. Where the config itself
names it, Serve keeps the class that the build task, which has our packages, pickled.
"""

from typing import Any

from cluster.serve.settings import (
    APP_NAME,
    ENGINE_DEPLOYMENT,
    INGRESS_DEPLOYMENT,
    ROUTER,
    AppArgs,
    BuildArgs,
    EngineOptions,
    IngressOptions,
)

IMPORT_PATH = "cluster.serve.app:build"


def declaration(
    args: AppArgs, engine: EngineOptions, *, replicas: int, runtime_env: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The application as Serve's REST interface takes it; its replicas have loaded what `engine` names."""
    return {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "runtime_env": runtime_env or {},
        "external_scaler_enabled": True,
        "args": args.build_args().model_dump(mode="json"),
        "deployments": [
            {
                "name": ENGINE_DEPLOYMENT,
                "num_replicas": replicas,
                "user_config": engine.model_dump(mode="json"),
                "request_router_config": {"request_router_class": ROUTER},
            },
            {
                "name": INGRESS_DEPLOYMENT,
                "num_replicas": args.ingresses,
                "user_config": args.ingress_options().model_dump(mode="json"),
            },
        ],
    }


def declared_args(app: dict[str, Any]) -> AppArgs:
    """The settings in a declaration."""
    ingress = _deployment(app, INGRESS_DEPLOYMENT)
    return AppArgs(
        **dict(BuildArgs(**app["args"])),
        **dict(IngressOptions(**ingress["user_config"])),
        ingresses=ingress["num_replicas"],
    )


def declared_engine(app: dict[str, Any]) -> EngineOptions:
    """The model in a declaration that its replicas have, or are to have."""
    return EngineOptions(**_deployment(app, ENGINE_DEPLOYMENT)["user_config"])


def with_model(app: dict[str, Any], model: str, *, replicas: int) -> dict[str, Any]:
    """A declaration whose running replicas load `model`, be it the one they have: its files may be others now."""
    engine = EngineOptions(model=model, revision=declared_engine(app).revision + 1)
    return declaration(declared_args(app), engine, replicas=replicas, runtime_env=app.get("runtime_env"))


def without_autoscaling(app: dict[str, Any], *, replicas: int) -> dict[str, Any] | None:
    """A declaration in which the number of replicas stays what it is set to; None if `app` is one."""
    args = declared_args(app)
    if args.min_replicas is None:
        return None
    fixed = args.model_copy(update={"min_replicas": None, "max_replicas": None})
    return declaration(fixed, declared_engine(app), replicas=replicas, runtime_env=app.get("runtime_env"))


def _deployment(app: dict[str, Any], name: str) -> dict[str, Any]:
    return next(deployment for deployment in app["deployments"] if deployment["name"] == name)
