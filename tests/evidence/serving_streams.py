"""500 streams at once through the whole of serving, on two cores, with modelled replicas.

    python tests/evidence/serving_streams.py [--streams 500] [--tokens 40] [--rounds 8]

One replica whose engine sleeps in the place of a model, the production ingress before it, one `httpx` client. Every
stream must end with its last token and `[DONE]`. After WARM_ROUNDS, by which time every ring and pool is full, the
memory of ingress and replica may grow no more than LARGEST_GROWTH times what Serve's own proxy does, in which nothing
of ours runs: Ray itself keeps something of every call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import httpx  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.handle import DeploymentHandle  # noqa: E402

from cluster.serve import app  # noqa: E402
from cluster.serve.ingress import Ingress, IngressConfig  # noqa: E402
from cluster.serve.replay.modelled_engine import ModelledEngine  # noqa: E402
from cluster.serve.replay.timing import StepTime  # noqa: E402
from cluster.serve.replica import EngineReplica, ReplicaConfig  # noqa: E402
from cluster.serve.settings import APP_NAME, BuildArgs, EngineOptions  # noqa: E402
from cluster.session import ray_processes  # noqa: E402
from llama.engine import Engine, EngineConfig  # noqa: E402
from tests.cluster.serve.local_ray import local_ray  # noqa: E402
from tests.cluster.serve.tiny_model import save_tiny_model  # noqa: E402
from tests.conftest import find_free_port  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402

MODEL = "tiny"
ENGINE = EngineConfig(num_blocks=8192, max_batched_tokens=512, max_running=300, max_waiting=1000)
STEP = StepTime(fixed_s=0.05)
WARM_ROUNDS = 3
LARGEST_GROWTH = 1.5


class ModelledReplica(EngineReplica):
    """The production replica around an engine that sleeps."""

    def __init__(self, config: ReplicaConfig) -> None:
        super().__init__(config)
        self._load_model(EngineOptions(model=""))

    def _make_engine(self, uri: str) -> tuple[Engine, int]:
        return cast(Engine, ModelledEngine(self._config.engine, STEP)), 1 << 16


class OpenIngress(Ingress):
    """Asks for no key."""

    def __init__(self, config: IngressConfig, engines: DeploymentHandle) -> None:
        super().__init__(config, engines)
        self._access.set(None)


def deploy(model: Path) -> str:
    app.EngineReplica, app.Ingress = ModelledReplica, OpenIngress  # type: ignore[misc]
    port = find_free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = BuildArgs(model=str(model), served_name=MODEL, cpus_per_replica=0.1, engine=ENGINE)
    serve.run(app.build(args), name=APP_NAME, route_prefix="/")
    return f"http://127.0.0.1:{port}"


def resident_mib() -> dict[str, float]:
    """Of Serve's processes, by what they are."""
    found: dict[str, float] = {}
    for process in ray_processes():
        title = " ".join(process.cmdline()).strip()
        if title.startswith("ray::ServeReplica") or title.startswith("ray::Proxy"):
            name = title.removeprefix("ray::").removeprefix("ServeReplica:").split("(")[0].split(".")[0]
            found[name] = found.get(name, 0.0) + process.memory_info().rss / 2**20
    return found


async def burst(url: str, streams: int, tokens: int) -> list[str]:
    """What was wrong with each stream; "" is nothing."""

    async def one(http: httpx.AsyncClient, number: int) -> str:
        prompt = [number % 300 + 10, *range(20, 60)]
        body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        usage, last = None, ""
        try:
            async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    return f"status {response.status_code}"
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        last = line.removeprefix("data: ")
                        if last != "[DONE]":
                            event = json.loads(last)
                            if "error" in event:
                                return event["error"]["message"]
                            usage = event.get("usage") or usage
        except httpx.HTTPError as error:
            return type(error).__name__
        if last != "[DONE]":
            return "no end"
        return "" if usage and usage["completion_tokens"] == tokens else f"usage {usage}"

    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(trust_env=False, timeout=300, limits=limits) as http:
        return await asyncio.gather(*(one(http, number) for number in range(streams)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    if options.rounds <= WARM_ROUNDS:
        parser.error(f"--rounds {options.rounds} must be more than {WARM_ROUNDS}")
    claims = Claims()
    with tempfile.TemporaryDirectory() as folder, local_ray(Path(folder)):
        url = deploy(save_tiny_model(Path(folder) / "model"))
        memory = []
        for number in range(options.rounds):
            began = time.monotonic()
            wrong = [problem for problem in asyncio.run(burst(url, options.streams, options.tokens)) if problem]
            seconds = time.monotonic() - began
            time.sleep(5)
            memory.append(resident_mib())
            sizes = ", ".join(f"{name} {size:.0f} MiB" for name, size in sorted(memory[-1].items()))
            figure = f"{len(wrong)} of {options.streams} in {seconds:.0f} s {sorted(set(wrong))[:3] or ''}"
            claims.check(f"round {number + 1}: no stream is lost", figure, not wrong)
            print(f"      {sizes}", flush=True)
        growth = {name: memory[-1][name] / memory[WARM_ROUNDS - 1][name] - 1 for name in memory[-1]}
        allowed = LARGEST_GROWTH * max(growth["ProxyActor"], 0.01)
        for name in sorted(set(growth) - {"ProxyActor"}):
            claim = f"memory of {name} grows no more than {LARGEST_GROWTH} times the proxy's"
            figure = f"{growth[name]:.1%} and {growth['ProxyActor']:.1%}"
            claims.check(claim, figure, growth[name] <= allowed)
        serve.shutdown()
    return 1 if claims.failed else 0


if __name__ == "__main__":
    sys.exit(main())
