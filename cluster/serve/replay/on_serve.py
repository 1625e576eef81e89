"""Replays on Serve: an application for each policy, several of them side by side. Needs a connection to Ray."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ray import serve
from ray.serve import Application, RunTarget
from ray.serve.config import DeploymentActorConfig, RequestRouterConfig
from ray.serve.experimental.capacity_queue import CapacityQueue

from cluster.serve.replay.driver import Driver
from cluster.serve.replay.engines import EngineSpec, ModelledSpec, RealSpec
from cluster.serve.replay.measure import Replay
from cluster.serve.replay.modelled_engine import MODELLED_WEIGHTS
from cluster.serve.replay.policies import ROUTERS, Variant
from cluster.serve.replay.replicas import CaravanReplica, PeerReplica
from cluster.serve.replay.simulate import Scenario
from cluster.serve.replay.trace import TOKENS_PER_ID, VOCAB_SIZE, Prompts, TraceRequest
from cluster.serve.weights import fetch_model
from cluster.session import ray_processes
from llama.bench.harness import BenchError
from llama.config import ModelConfig
from llama.engine import EngineConfig
from llama.hf import load_pretrained, save_pretrained
from llama.model import Transformer

CAPACITY_QUEUE = "capacity_queue"
START_AFTER_S = 1.0
SAMPLE = 200
REAL_ENGINE = EngineConfig(num_blocks=2000, block_size=16, max_batched_tokens=256, max_running=64, max_waiting=4096)


@dataclass(frozen=True)
class Live:
    """What every policy is given. `tokens_per_id`: see `Prompts`."""

    requests: Sequence[TraceRequest]
    replicas: int
    spec: EngineSpec
    weights_id: str
    tokens_per_id: int


def modelled(scenario: Scenario) -> Live:
    """The simulation's scenario, on modelled engines."""
    spec = ModelledSpec(scenario.engine, scenario.timing)
    return Live(scenario.requests, scenario.replicas, spec, MODELLED_WEIGHTS, TOKENS_PER_ID)


def real(requests: Sequence[TraceRequest], replicas: int, model: str | None, folder: str) -> tuple[Live, int]:
    """The requests, as much shorter as a real engine's blocks are, for engines with a model.

    Args:
        model: URI of a Hugging Face directory; None makes a small random one in `folder`.

    Returns:
        Also how many requests are left out, being longer than the model's context.
    """
    if model is None:
        directory = Path(folder)
        config = ModelConfig(vocab_size=VOCAB_SIZE, dim=64, num_layers=2, num_heads=4, max_seq_len=8192)
        made = Transformer(config)
        made.init_weights(seed=0)
        save_pretrained(made, directory)
    else:
        directory = fetch_model(model, Path(folder))
    spec = RealSpec(str(directory), REAL_ENGINE)
    prompts = Prompts(REAL_ENGINE.block_size)
    longest = min(load_pretrained(directory).config.max_seq_len, REAL_ENGINE.num_blocks * REAL_ENGINE.block_size)
    fitting = [request for request in requests if prompts.length(request) + prompts.output(request) <= longest]
    if not fitting:
        raise BenchError(f"model={model} has a context of {longest} tokens, too short for every request of the trace")
    return Live(fitting, replicas, spec, spec.weights_id, prompts.tokens_per_id), len(requests) - len(fitting)


def saturated_s(live: Live, say: Callable[[str], None]) -> float:
    """Seconds that the replicas would take for all requests, measured on the first of them, sent at once."""
    sample = [replace(request, at=0.0) for request in live.requests[:SAMPLE]]
    (replay,) = replay_together([Variant("round_robin")], replace(live, requests=sample), say)
    return replay.seconds * len(live.requests) / len(sample)


def application(variant: Variant, live: Live) -> Application:
    """One policy's driver and replicas."""
    kwargs = dict(variant.kwargs)
    actors = []
    if variant.policy == "capacity_queue":
        kwargs["capacity_queue_actor_name"] = CAPACITY_QUEUE
        settings = {"acquire_timeout_s": 30.0, "token_ttl_s": None}
        actors.append(DeploymentActorConfig(name=CAPACITY_QUEUE, actor_class=CapacityQueue, init_kwargs=settings))
    router = RequestRouterConfig(request_router_class=ROUTERS[variant.policy], request_router_kwargs=kwargs)  # type: ignore[arg-type]
    engines = serve.deployment(
        name="engine",
        num_replicas=live.replicas,
        max_ongoing_requests=variant.max_ongoing,
        ray_actor_options={"num_cpus": 0},
        request_router_config=router,
        deployment_actors=actors or None,  # type: ignore[arg-type]
        health_check_period_s=5.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=2.0,
        max_constructor_retry_count=1,
    )(CaravanReplica if variant.policy == "caravan" else PeerReplica)
    driver = serve.deployment(
        name="driver",
        max_ongoing_requests=8,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=5.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=2.0,
        max_constructor_retry_count=1,
    )(Driver)
    return cast(Application, driver.bind(engines.bind(live.spec), variant, live.replicas))


def replay_together(variants: Sequence[Variant], live: Live, say: Callable[[str], None]) -> list[Replay]:
    """Replays under several policies at the same time; in the order of `variants`.

    What they compete for is the machine's CPU; how busy it was is in each result.
    """
    names = [f"replay-{number}" for number in range(len(variants))]
    try:
        drivers = serve.run_many(
            [
                RunTarget(application(variant, live), name, route_prefix=None)
                for name, variant in zip(names, variants, strict=True)
            ]
        )
        for driver in drivers:
            driver.ready.remote().result()
        say(f"{', '.join(variant.name for variant in variants)}: {live.requests[-1].at:.0f} s of requests begin")
        start = time.monotonic() + START_AFTER_S
        block_size = live.spec.config.block_size
        with _cpu() as used:
            running = [
                driver.replay.remote(live.requests, start, live.tokens_per_id, block_size, live.weights_id)
                for driver in drivers
            ]
            replays = [cast(Replay, response.result()) for response in running]
        return [replace(found, extra={**found.extra, **used}) for found in replays]
    finally:
        for name in names:
            serve.delete(name)


@contextlib.contextmanager
def _cpu() -> Iterator[dict[str, Any]]:
    """CPU seconds a second, of all of Ray's processes, while the block runs."""
    used: dict[str, Any] = {}
    began, before = time.monotonic(), _cpu_s()
    yield used
    used["machine_cpu"] = (_cpu_s() - before) / (time.monotonic() - began)


def _cpu_s() -> float:
    import psutil  # Ray's own copy, on the path once ray is imported

    total = 0.0
    for process in ray_processes():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
