"""The API without Ray: the production routes over an engine in this process."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import openai
from fastapi import FastAPI

from cluster.serve.access import Access
from cluster.serve.answer import Answers
from cluster.serve.api_error import ApiError
from cluster.serve.engine_client import RoutedChunk
from cluster.serve.gate import Gate
from cluster.serve.messages import GenerateRequest, ReplicaInfo, ReplicaLoad, ReplicaUpdate
from cluster.serve.routes import add_openai_routes
from cluster.serve.served_model import ServedModel
from cluster.serve.state import RoutingState
from llama.engine import CacheSnapshot, Chunk, Engine, EngineConfig
from llama.hf import load_pretrained
from llama.tokenizer import Tokenizer

MODEL = "tiny"


class LocalEngine:
    """What `EngineClient` does, with one engine and without a router."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.asked: list[GenerateRequest] = []

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[RoutedChunk, None]:
        self.asked.append(request)
        chunks = self.engine.stream(
            request.token_ids,
            request.params,
            request_id=request.request_id,
            salt=request.salt,
            priority=request.priority,
            timeout_s=request.timeout_s,
        )
        try:
            async with aclosing(cast(AsyncGenerator[Chunk, None], chunks)) as items:
                async for chunk in items:
                    yield RoutedChunk("replica-1", 0, chunk)
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from error

    async def complete(self, request: GenerateRequest) -> list[RoutedChunk]:
        async with aclosing(self.stream(request)) as items:
            return [item async for item in items]


def routing_state(directory: str, vocab_size: int, max_seq_len: int) -> RoutingState:
    """One replica that has told of itself."""
    state = RoutingState()
    state.set_replicas(["replica-1"])
    info = ReplicaInfo("replica-1", 1, "node", directory, vocab_size, max_seq_len, 16, 512, "family")
    load = ReplicaLoad(0, 0, 512, 0, 0, 0, 0, 0, 0)
    state.apply_update("replica-1", ReplicaUpdate("e", load, snapshot=CacheSnapshot("e", 0, ()), info=info))
    return state


class LocalApi:
    """`app` answers for the model in `directory`; `direct` is a second engine, which it does not know."""

    def __init__(self, directory: Path, **config: Any) -> None:
        model = load_pretrained(directory)
        self.direct = Engine(load_pretrained(directory), Tokenizer.load(directory), EngineConfig(num_blocks=512))
        self.tokenizer = Tokenizer.load(directory)
        self.engine = LocalEngine(Engine(model, self.tokenizer, EngineConfig(num_blocks=512, **config)))
        self.app = FastAPI(title="Caravan")
        state = routing_state("w", model.config.vocab_size, model.config.max_seq_len)
        self.answers = Answers(cast(Any, self.engine))
        add_openai_routes(self.app, ServedModel(MODEL, "family", self.tokenizer, state), self.answers)
        self.access = Access()
        self.access.set(None)
        self.app.add_middleware(Gate, access=self.access)  # type: ignore[arg-type]

    def close(self) -> None:
        """Ends the threads of both engines."""
        self.direct.close()
        self.engine.engine.close()

    @asynccontextmanager
    async def http(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            yield client

    @asynccontextmanager
    async def client(self) -> AsyncIterator[openai.AsyncOpenAI]:
        async with self.http() as http:
            yield openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http)

    def post(self, path: str, body: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            async with self.http() as http:
                return await http.post(path, json=body)

        return asyncio.run(run())
