"""Evidence of what the API itself costs, between the web server and the client of the engines.

    python tests/evidence/api_overhead.py [--streams 32] [--profile]

The production routes in this process, called as a web server calls them, over engines that answer at once. Beside them,
in turn, an endpoint that does nothing but read its body. Medians of several rounds; the time of Serve and of the way to
a replica is not in it. Exits with 1 when a bar is missed. Ten seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, Response  # noqa: E402

from cluster.serve.answer import Answers  # noqa: E402
from cluster.serve.engine_client import RoutedChunk  # noqa: E402
from cluster.serve.messages import GenerateRequest  # noqa: E402
from cluster.serve.routes import add_openai_routes  # noqa: E402
from cluster.serve.served_model import ServedModel  # noqa: E402
from llama.engine import Chunk  # noqa: E402
from tests.cluster.serve.local_api import routing_state  # noqa: E402
from tests.cluster.serve.reply_cases import TOKENIZER  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402

TOKENS, REQUESTS, ROUNDS = 200, 60, 5
MOST_REQUEST_MS, MOST_TOKEN_MS = 4.0, 0.3
TEXT = "hello world " * 40
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "m", "prompt": TEXT},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": TEXT}]},
}


class Instant:
    """Engines that need no time: `TOKENS` tokens in a stream, one otherwise."""

    def _chunk(self, request: GenerateRequest, number: int, last: bool) -> RoutedChunk:
        chunk = Chunk(request.request_id, [9], "hello", "length" if last else None, 0, 100, number + 1, None, 0)
        return RoutedChunk("replica-1", 0, chunk)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[RoutedChunk, None]:
        for number in range(TOKENS):
            await asyncio.sleep(0)
            yield self._chunk(request, number, number == TOKENS - 1)

    async def complete(self, request: GenerateRequest) -> list[RoutedChunk]:
        return [self._chunk(request, 0, True)]


async def nothing(http: Request) -> Response:
    await http.body()
    return JSONResponse({})


async def call(api: FastAPI, path: str, body: dict[str, Any]) -> None:
    """One POST, as a web server makes it."""
    content = json.dumps(body).encode()
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Any:
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200, message

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {"request_id": "r"},
    }
    await api(scope, receive, send)


async def request_ms(api: FastAPI, path: str, body: dict[str, Any]) -> float:
    times = []
    for _ in range(REQUESTS):
        started = time.perf_counter()
        await call(api, path, body)
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


async def token_ms(api: FastAPI, path: str, streams: int) -> float:
    """Of the processor, for each token of so many streams side by side."""
    started = time.process_time()
    await asyncio.gather(*(call(api, path, BODIES[path] | {"stream": True}) for _ in range(streams)))
    return (time.process_time() - started) * 1000 / (streams * TOKENS)


async def measure(api: FastAPI, streams: int, claims: Claims) -> None:
    for path, body in BODIES.items():
        await request_ms(api, path, body)  # warm
        pairs = [(await request_ms(api, path, body), await request_ms(api, "/nothing", body)) for _ in range(ROUNDS)]
        over = statistics.median(ours - theirs for ours, theirs in pairs)
        claims.check(f"{path}: ms a request over one that does nothing", f"{over:.2f}", over <= MOST_REQUEST_MS)
        token = statistics.median([await token_ms(api, path, streams) for _ in range(ROUNDS)])
        claims.check(f"{path}: ms a token of {streams} streams", f"{token:.4f}", token <= MOST_TOKEN_MS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    arguments = parser.parse_args()
    api = FastAPI()
    model = ServedModel("m", "family", TOKENIZER, routing_state("w", 400, 4096))
    add_openai_routes(api, model, Answers(cast(Any, Instant())))
    api.add_api_route("/nothing", nothing, methods=["POST"])
    claims = Claims()
    profile = cProfile.Profile()
    if arguments.profile:
        profile.enable()
    asyncio.run(measure(api, arguments.streams, claims))
    if arguments.profile:
        profile.disable()
        profile.print_stats("cumtime")
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
