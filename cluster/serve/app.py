"""The Serve application: typed settings in, ingresses and their engine replicas out.

`build` runs inside the cluster: Serve imports it by name (`cluster.serve.app:build`) and passes it the arguments of
the declarative config. All of `BuildArgs` is part of the application's code version: changing it restarts every
process. What may change while they run is not in it: numbers of processes, and the options of
`cluster.serve.settings`, which Serve hands to `reconfigure` of each (see cluster/serve/declaration.py).
"""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from cluster.serve.ingress import Ingress, IngressConfig
from cluster.serve.replica import EngineReplica, ReplicaConfig
from cluster.serve.settings import ENGINE_DEPLOYMENT, INGRESS_DEPLOYMENT, ROUTER, BuildArgs
from cluster.serve.weights import ModelNotFound, family, shape_id

_SUBSCRIPTIONS = 64  # ingress processes that may follow a replica; each holds one of its calls open


def build(args: BuildArgs) -> Application:
    """The application for Serve. Raises RayServeException when there is no model at `args.model`."""
    try:
        kin = family(args.model, args.served_name)
    except ModelNotFound as error:
        # Of all exceptions, Serve takes this one as final; after others it builds three times more.
        raise RayServeException(str(error)) from error
    replica = ReplicaConfig(
        family=kin,
        shape=shape_id(args.model),
        engine=args.engine,
        dtype=args.dtype,
        threads=args.threads,
        use_gpu=args.gpus_per_replica > 0,
    )
    engine = serve.deployment(
        name=ENGINE_DEPLOYMENT,
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
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2.0,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=2,
    )(serve.ingress()(Ingress))
    return ingress.bind(IngressConfig(args.model, kin, args.served_name, args.cost), engine.bind(replica))


def _actor_options(args: BuildArgs) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica}
    if args.accelerator_type is not None:
        options["accelerator_type"] = args.accelerator_type
    return options
