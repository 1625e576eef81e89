"""The Serve application: typed settings in, an ingress and its engine replicas out.

`build` runs inside the cluster: Serve imports it by name (`cluster.serve.app:build`) and passes it the arguments of
the declarative config. Everything in `AppArgs` is part of the application's code version: changing it restarts the
replicas. So `replicas` is only how many there are at the start; afterwards `cluster.serve.control.scale` changes the
number through Serve's scaling endpoint, which keeps the running processes and their caches.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from cluster.serve.cost import CostCoefficients
from cluster.serve.ingress import Ingress, IngressConfig
from cluster.serve.replica import EngineReplica, ReplicaConfig
from cluster.serve.weights import ModelNotFound, check_model
from llama.engine import EngineConfig

APP_NAME = "caravan"
ENGINE_DEPLOYMENT = "engine"
INGRESS_DEPLOYMENT = "ingress"
IMPORT_PATH = "cluster.serve.app:build"
ROUTER = "cluster.serve.router.CacheAwareRouter"

_SUBSCRIPTIONS = 64  # ingress processes that may follow a replica; each holds one of its calls open


class ReplicaSettings(BaseModel):
    """How replicas compute and what they ask of Ray; the same for all of an application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    served_name: str = Field(default="caravan", min_length=1)
    cpus_per_replica: float = Field(default=1.0, ge=0)
    gpus_per_replica: float = Field(default=0.0, ge=0)
    accelerator_type: str | None = None
    threads: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    engine: EngineConfig = EngineConfig()
    cost: CostCoefficients = CostCoefficients()


class AppArgs(ReplicaSettings):
    """What `build` takes. `model`: URI of a Hugging Face directory or of a committed export."""

    model: str
    replicas: int = Field(default=1, ge=1)


def build(args: AppArgs) -> Application:
    """The application for Serve. Raises RayServeException when there is no model at `args.model`."""
    try:
        check_model(args.model)
    except ModelNotFound as error:
        # Of all exceptions, Serve takes this one as final; after others it builds three times more.
        raise RayServeException(str(error)) from error
    replica = ReplicaConfig(
        model=args.model,
        engine=args.engine,
        dtype=args.dtype,
        threads=args.threads,
        use_gpu=args.gpus_per_replica > 0,
    )
    engine = serve.deployment(
        name=ENGINE_DEPLOYMENT,
        num_replicas=args.replicas,
        max_ongoing_requests=args.engine.max_running + args.engine.max_waiting + _SUBSCRIPTIONS,
        ray_actor_options=_actor_options(args),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]
        health_check_period_s=2.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=20.0,
        max_constructor_retry_count=2,
    )(EngineReplica)
    ingress = serve.deployment(
        name=INGRESS_DEPLOYMENT,
        num_replicas=1,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2.0,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=2,
    )(serve.ingress()(Ingress))
    return ingress.bind(IngressConfig(args.model, args.served_name, args.cost), engine.bind(replica))


def _actor_options(args: AppArgs) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica}
    if args.accelerator_type is not None:
        options["accelerator_type"] = args.accelerator_type
    return options
