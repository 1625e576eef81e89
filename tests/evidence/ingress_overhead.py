"""What our ingress and its replica cost beside Serve ingresses that do nothing, all behind one proxy, in one run.

    python tests/evidence/ingress_overhead.py [--requests 150] [--streams 32] [--tokens 120] [--step-ms 40]

Ours is the whole of serving with one replica: a real engine with a tiny model whose steps are made to last `--step-ms`
while it streams. The other one, `nothing`, is a FastAPI application that sends as many bytes, at the same pace, and
asks nobody; `two hops` is the same asking a second deployment for the bytes, as ours asks an engine for tokens.

    a request      median of one-token completions, asked in turns of all, less the time that the engine's steps take.
                   At most 4 ms over `nothing` by the ingress's own listener, and over `two hops` by Serve's proxy; a
                   second hop through Serve takes about 4 ms itself, so by the proxy no engine is 4 ms over `nothing`
    a token        processor time of proxy, ingress and replica (less the model's own) for each token of `--streams`
                   streams, less what proxy and ingress take for the other: at most 0.3 ms
    an abort       from a client's leaving to its blocks being free, as the replica sees both: below 50 ms

Processor time, and not the clock, because both keep the pace they are given. Exits with 1 when a claim fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import httpx  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import Response, StreamingResponse  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.handle import DeploymentHandle  # noqa: E402

from cluster.serve import app  # noqa: E402
from cluster.serve.ingress import Ingress, IngressConfig  # noqa: E402
from cluster.serve.replica import EngineReplica, ReplicaConfig  # noqa: E402
from cluster.serve.settings import APP_NAME, ENGINE_DEPLOYMENT, INGRESS_DEPLOYMENT, BuildArgs, EngineOptions  # noqa: E402
from cluster.session import ray_processes  # noqa: E402
from llama.engine import EngineConfig  # noqa: E402
from tests.cluster.serve.local_ray import local_ray  # noqa: E402
from tests.cluster.serve.tiny_model import save_tiny_model  # noqa: E402
from tests.conftest import find_free_port  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402

MODEL = "tiny"
PAUSE_S = 0.02  # between requests: what one leaves to be done does not fall on the next
ENGINE = EngineConfig(num_blocks=2048, max_batched_tokens=512, max_running=64)


class PacedReplica(EngineReplica):
    """A replica whose steps last `step_s` at least, and which knows what its model took and when blocks were freed."""

    uri = ""

    def __init__(self, config: ReplicaConfig) -> None:
        super().__init__(config)
        self._load_model(EngineOptions(model=self.uri))
        self._step_s = 0.0
        self._model_cpu_s = 0.0
        self._model_s: list[float] = []
        self._idle_at: float | None = None
        run = self._engine._runner.run

        def paced(inputs: Any) -> Any:
            began, cpu = time.monotonic(), time.thread_time()
            computed = run(inputs)
            self._model_s.append(time.monotonic() - began)
            self._model_cpu_s += time.thread_time() - cpu
            time.sleep(max(0.0, began + self._step_s - time.monotonic()))
            return computed

        self._engine._runner.run = paced  # type: ignore[method-assign]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Notes when the engine fell idle; only while somebody wants to know."""
        while True:
            if self._idle_at is None:
                stats = self._engine.stats()
                if not stats.running and not stats.waiting and stats.free_blocks == stats.num_blocks:
                    self._idle_at = time.monotonic()
            time.sleep(0.001 if self._idle_at is None else 0.02)

    async def pace(self, step_s: float) -> None:
        self._step_s = step_s
        self._model_s.clear()

    async def model_time(self) -> tuple[float, list[float]]:
        """Processor seconds of the model so far, and the seconds of each step since `pace`."""
        return self._model_cpu_s, self._model_s

    async def forget_idle(self) -> None:
        self._idle_at = None

    async def idle_at(self) -> float | None:
        return self._idle_at


class OpenIngress(Ingress):
    """Asks for no key."""

    def __init__(self, config: IngressConfig, engines: DeploymentHandle) -> None:
        super().__init__(config, engines)
        self._access.set(None)

    async def listen(self, port: int) -> None:
        """On a port of its own, so that what comes to Serve's proxy comes through it."""
        await self._listener.listen(("127.0.0.1", port))


class Bytes:
    """Serves as many as it is asked for."""

    async def __call__(self, number: int) -> bytes:
        return b"x" * number


def nothing_app() -> FastAPI:
    """Answers `/v1/completions` as long as it is told to, with the bytes it is told."""
    api = FastAPI()

    @api.post("/v1/completions")
    async def completions(http: Request) -> Response:
        body = await http.json()
        if body.get("hops") == 2:
            answer = await serve.get_deployment_handle("bytes", "bytes").remote(body["bytes"])
            return Response(answer, media_type="application/json")
        if not body["stream"]:
            return Response("x" * body["bytes"], media_type="application/json")

        async def events() -> AsyncIterator[bytes]:
            loop = asyncio.get_running_loop()
            began = loop.time()
            for number in range(body["tokens"]):
                await asyncio.sleep(began + number * body["step_s"] - loop.time())
                yield b"data: " + b"x" * (body["bytes"] - 8) + b"\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return api


def deploy(model: Path) -> tuple[str, str]:
    """All applications behind one proxy; returns its address and that of our ingress's own listener."""
    PacedReplica.uri = str(model)
    app.EngineReplica, app.Ingress = PacedReplica, OpenIngress  # type: ignore[misc]
    port = find_free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = BuildArgs(model=str(model), served_name=MODEL, cpus_per_replica=0.1, engine=ENGINE)
    serve.run(app.build(args), name=APP_NAME, route_prefix="/")
    direct = find_free_port()
    serve.get_deployment_handle(INGRESS_DEPLOYMENT, APP_NAME).listen.remote(direct).result()
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 1000}
    serve.run(serve.deployment(name="bytes", **options)(Bytes).bind(), name="bytes", route_prefix="/bytes")
    nothing = serve.deployment(name="nothing", **options)
    serve.run(
        nothing(serve.ingress(nothing_app())(type("Nothing", (), {}))).bind(), name="nothing", route_prefix="/nothing"
    )
    return f"http://127.0.0.1:{port}", f"http://127.0.0.1:{direct}"


def ours(*, tokens: int, stream: bool, number: int = 0) -> dict[str, Any]:
    prompt = [10 + number % 300, *range(20, 40)]
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
        "seed": number,
    }


def request_times(url: str, direct: str, replica: Any, requests: int) -> dict[str, float]:
    """Medians in milliseconds: each way to ask, and a request's engine steps."""
    body = ours(tokens=1, stream=False)
    with httpx.Client(trust_env=False, timeout=60) as http:
        size = len(http.post(f"{url}/v1/completions", json=body).raise_for_status().content)
        nothing = {"stream": False, "bytes": size}
        ways = {
            "by the proxy": (f"{url}/v1/completions", body),
            "nothing": (f"{url}/nothing/v1/completions", nothing),
            "by the listener": (f"{direct}/v1/completions", body),
            "two hops": (f"{url}/nothing/v1/completions", {**nothing, "hops": 2}),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(requests + 20):
            if number == 20:
                replica.pace.remote(0.0).result()
            for way, (address, asked) in ways.items():
                time.sleep(PAUSE_S)
                began = time.perf_counter()
                http.post(address, json=asked).raise_for_status()
                if number >= 20:
                    times[way].append(time.perf_counter() - began)
    _, times["steps"] = replica.model_time.remote().result()
    return {way: 1e3 * statistics.median(own) for way, own in times.items()}


async def stream_all(url: str, bodies: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Events and bytes of every stream."""

    async def one(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, int]:
        events = size = 0
        async with http.stream("POST", url, json=body) as response:
            response.raise_for_status()
            async for part in response.aiter_raw():
                events += part.count(b"data: {") + part.count(b"data: x")
                size += len(part)
        return events, size

    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(trust_env=False, timeout=300, limits=limits) as http:
        return await asyncio.gather(*(one(http, body) for body in bodies))


def cpu_seconds() -> dict[str, float]:
    """Processor time of Serve's processes, by what they are."""
    found: dict[str, float] = {}
    for process in ray_processes():
        title = " ".join(process.cmdline())
        if title.startswith("ray::"):
            used = process.cpu_times()
            name = title.split("(")[0].split(".")[0]
            found[name] = found.get(name, 0.0) + used.user + used.system
    return found


def token_cost(url: str, replica: Any, streams: int, tokens: int, step_s: float) -> dict[str, float]:
    """Processor milliseconds a token: ours by process, `nothing` by process, and how many events each sent."""
    replica.pace.remote(step_s).result()
    mine = [ours(tokens=tokens, stream=True, number=number) for number in range(streams)]
    asyncio.run(stream_all(f"{url}/v1/completions", [{**body, "max_tokens": 5} for body in mine]))
    model_before, _ = replica.model_time.remote().result()
    before = cpu_seconds()
    sent = asyncio.run(stream_all(f"{url}/v1/completions", mine))
    after = cpu_seconds()
    model_after, _ = replica.model_time.remote().result()
    total, events = streams * tokens, sum(count for count, _ in sent)
    size = sum(size for _, size in sent) // events
    body = {"stream": True, "bytes": size, "tokens": tokens, "step_s": step_s}
    asyncio.run(stream_all(f"{url}/nothing/v1/completions", [{**body, "tokens": 5}] * streams))
    before_nothing = cpu_seconds()
    asyncio.run(stream_all(f"{url}/nothing/v1/completions", [body] * streams))
    after_nothing = cpu_seconds()

    def used(first: dict[str, float], last: dict[str, float], word: str) -> float:
        return 1e3 * sum(last[name] - first.get(name, 0.0) for name in last if word in name) / total

    return {
        "ours: proxy": used(before, after, "Proxy"),
        "ours: ingress": used(before, after, ":ingress"),
        "ours: replica": used(before, after, ":engine") - 1e3 * (model_after - model_before) / total,
        "nothing: proxy": used(before_nothing, after_nothing, "Proxy"),
        "nothing: ingress": used(before_nothing, after_nothing, ":nothing"),
        "events": events,
        "tokens": total,
        "bytes an event": size,
    }


def abort_times(url: str, replica: Any, times: int) -> list[float]:
    """Milliseconds from a client's leaving to its blocks being free; one machine, so one clock."""
    replica.pace.remote(0.01).result()
    found = []
    for number in range(times):
        body = ours(tokens=400, stream=True, number=number)
        with (
            httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=body) as response,
        ):
            response.raise_for_status()
            parts = response.iter_raw()  # kept: an iterator that nobody holds closes the stream
            next(parts)
            replica.forget_idle.remote().result()
            time.sleep(0.05)
            left = time.monotonic()
        while (freed := replica.idle_at.remote().result()) is None:
            time.sleep(0.02)
        found.append(1e3 * (freed - left))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--step-ms", type=float, default=40.0)
    args = parser.parse_args()
    claims = Claims()
    with tempfile.TemporaryDirectory() as folder, local_ray(Path(folder)):
        try:
            url, direct = deploy(save_tiny_model(Path(folder) / "model"))
            replica = serve.get_deployment_handle(ENGINE_DEPLOYMENT, APP_NAME)
            times = request_times(url, direct, replica, args.requests)
            cost = token_cost(url, replica, args.streams, args.tokens, args.step_ms / 1e3)
            aborts = abort_times(url, replica, 20)
        finally:
            serve.shutdown()
    print("a request, median ms: " + json.dumps({way: round(value, 2) for way, value in times.items()}))
    print("a token, processor ms: " + json.dumps({name: round(value, 3) for name, value in cost.items()}))
    for way, other in (("by the listener", "nothing"), ("by the proxy", "two hops")):
        over = times[way] - times["steps"] - times[other]
        claims.check(f"a request {way} <= 4 ms over {other}", f"{over:.2f} ms", over <= 4)
    second, over = times["two hops"] - times["nothing"], times["by the proxy"] - times["steps"] - times["nothing"]
    print(f"      by the proxy over nothing: {over:.2f} ms, of which Serve's second hop alone {second:.2f} ms")
    token = sum(value for name, value in cost.items() if name.startswith("ours"))
    token -= sum(value for name, value in cost.items() if name.startswith("nothing"))
    claims.check(f"a token of {args.streams} streams <= 0.3 ms", f"{token:.3f} ms", token <= 0.3)
    worst = f"median {statistics.median(aborts):.1f} ms, worst {max(aborts):.1f} ms"
    claims.check("a client that leaves frees its blocks in < 50 ms", worst, max(aborts) < 50)
    sys.exit(claims.failed > 0)


if __name__ == "__main__":
    main()
