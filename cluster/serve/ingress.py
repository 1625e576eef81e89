"""The HTTP face: OpenAI's API in front of the engine replicas.

Each request is templated and tokenised here, once; its block hashes go with it to the router, which runs in this
process and knows every replica's cache. A request's last chunk is not sent before this process's index has applied
the events of that request, so that whoever reads an answer and asks the next question finds the router informed.

Every POST, the one without a body as well, must say `Content-Type: application/json`: see `require_json`.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from cluster.serve.cost import CostCoefficients
from cluster.serve.engine_client import EngineClient, ReplicaLost, RoutedChunk
from cluster.serve.events import Subscriptions
from cluster.serve.loopback import NodeOnlyServer
from cluster.serve.messages import GenerateRequest, ReplicaInfo
from cluster.serve.protocol import ApiError, ChatRequest, CompletionRequest, parse_chat, parse_completion
from cluster.serve.request_body import read_json_body, require_json
from cluster.serve.responses import ChatReply, CompletionReply, Reply, RouteReport, with_report
from cluster.serve.state import routing_state
from cluster.serve.weights import fetch_model, weights_id
from cluster.session import node_folder
from llama.engine import SamplingParams, generation_root, hash_blocks
from llama.tokenizer import ChatTemplateError, Tokenizer

FIRST_REPLICA_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class IngressConfig:
    """What the ingress needs to start. `served_name`: the model's name in the API."""

    model: str
    served_name: str
    cost: CostCoefficients


class Ingress:
    """The ingress deployment. Deploy it with `cluster.serve.app.build`."""

    def __init__(self, config: IngressConfig, engines: DeploymentHandle) -> None:
        self._server = NodeOnlyServer()
        self._served_name = config.served_name
        self._created = int(time.time())
        directory = fetch_model(config.model, node_folder("models"))
        self._weights_id = weights_id(directory)
        self._tokenizer = Tokenizer.load(directory)
        # A token's entry in the vocabulary is never shorter than the text it stands for.
        self._longest_token = max(map(len, self._tokenizer.backend.get_vocab()))
        self._state = routing_state(serve.get_replica_context().app_name)
        self._state.set_coefficients(config.cost)
        self._client = EngineClient(engines, self._state)
        self._subscriptions = Subscriptions(engines, self._state)
        self._subscriptions.start()

    async def __del__(self) -> None:
        """Serve's shutdown hook: the replicas, which drain after us, must not wait for our subscriptions."""
        await self._subscriptions.stop()

    def check_health(self) -> None:
        """Serve's probe."""
        self._server.check()

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = FastAPI(title="Caravan", docs_url=None, redoc_url=None)
        api.add_api_route("/health", self.health, methods=["GET"])
        api.add_api_route("/v1/models", self.models, methods=["GET"])
        api.add_api_route("/v1/completions", self.completions, methods=["POST"])
        api.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"])
        api.add_api_route("/caravan/replicas", self.replicas, methods=["GET"])
        api.add_api_route("/caravan/replicas/{replica_id}/flush", self.flush, methods=["POST"])
        api.add_exception_handler(ApiError, _answer_api_error)
        api.add_exception_handler(HTTPException, _answer_http_error)
        api.add_exception_handler(Exception, _answer_server_error)
        return api

    # -- the operator's endpoints --------------------------------------------------------------------------

    async def health(self) -> Response:
        """200 when every replica that Serve routes to is followed, 503 before that."""
        replicas = self._state.status()
        fresh = sum(status.fresh for status in replicas)
        ready = bool(replicas) and fresh == len(replicas)
        return JSONResponse({"ready": ready, "replicas": len(replicas), "fresh": fresh}, 200 if ready else 503)

    async def replicas(self) -> Response:
        """Every replica as this ingress sees it: process, load, cached blocks, freshness of its event feed."""
        return JSONResponse({"replicas": [asdict(status) for status in self._state.status()]})

    async def flush(self, replica_id: str, http: Request) -> Response:
        """Empties one replica's prefix cache and waits until this ingress has heard of it."""
        require_json(http)
        if replica_id not in self._state.replicas:
            message = f"There is no replica {replica_id!r}; see /caravan/replicas."
            raise ApiError(404, message, param="replica_id", code="replica_not_found")
        try:
            seq = await self._client.flush(replica_id)
        except ReplicaLost as error:
            message = f"Replica {replica_id!r} has just left."
            raise ApiError(503, message, code="replica_lost", kind="server_error") from error
        applied = await self._state.wait_applied(replica_id, seq, timeout_s=1.0)
        return JSONResponse({"replica": replica_id, "event_seq": seq, "applied": applied})

    async def models(self) -> Response:
        """OpenAI's list of models: the one that is served."""
        entry = {"id": self._served_name, "object": "model", "created": self._created, "owned_by": "caravan"}
        return JSONResponse({"object": "list", "data": [entry]})

    # -- OpenAI's endpoints --------------------------------------------------------------------------------

    async def completions(self, http: Request) -> Response:
        """One prompt, text or token ids, continued. No token is added before a text."""
        request = parse_completion(await read_json_body(http))
        self._check_model(request.model)
        info = await self._model_info()
        prompt = request.prompt
        if isinstance(prompt, str):
            self._check_length(len(prompt), info, "prompt")
            token_ids = await asyncio.to_thread(self._tokenizer.encode, prompt)
        else:
            token_ids = prompt
        self._check_prompt(token_ids, info, "prompt")
        params = _sampling(request, request.max_tokens, request.logprobs)
        generate = _generate_request(token_ids, params, info)
        reply = CompletionReply(
            generate.request_id, self._served_name, self._tokenizer, want_logprobs=request.logprobs is not None
        )
        return await self._respond(generate, reply, request)

    async def chat_completions(self, http: Request) -> Response:
        """A conversation, put through the model's chat template, and the assistant's next message."""
        request = parse_chat(await read_json_body(http))
        self._check_model(request.model)
        info = await self._model_info()
        self._check_length(sum(len(message.content) for message in request.messages), info, "messages")
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        try:
            token_ids = await asyncio.to_thread(self._tokenizer.apply_chat_template, messages)
        except ChatTemplateError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        self._check_prompt(token_ids, info, "messages")
        limit = request.token_limit or info.max_seq_len - len(token_ids)
        params = _sampling(request, limit, (request.top_logprobs or 0) if request.logprobs else None)
        generate = _generate_request(token_ids, params, info)
        reply = ChatReply(generate.request_id, self._served_name, self._tokenizer, want_logprobs=request.logprobs)
        return await self._respond(generate, reply, request)

    # -- inside --------------------------------------------------------------------------------------------

    def _check_model(self, model: str) -> None:
        if model != self._served_name:
            message = f"The model {model!r} does not exist; this server has {self._served_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _model_info(self) -> ReplicaInfo:
        """What the replicas of our model say of it; waits for the first of them."""
        deadline = time.monotonic() + FIRST_REPLICA_TIMEOUT_S
        while (info := self._state.info(self._weights_id)) is None:
            if time.monotonic() > deadline:
                raise ApiError(503, "No replica is ready; try again later.", code="no_replica", kind="server_error")
            await asyncio.sleep(0.05)
        return info

    def _check_length(self, num_characters: int, info: ReplicaInfo, param: str) -> None:
        """Refuses a text that cannot fit however it is tokenised, before it costs the time to do so."""
        most = info.max_seq_len * self._longest_token
        if num_characters > most:
            message = (
                f"This model's maximum context length is {info.max_seq_len} tokens, which are at most {most} "
                f"characters, and your {param} has {num_characters}; shorten it."
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    @staticmethod
    def _check_prompt(token_ids: list[int], info: ReplicaInfo, param: str) -> None:
        if not token_ids:
            raise ApiError(400, f"{param} holds no tokens; give at least one.", param=param, code="invalid_value")
        if len(token_ids) >= info.max_seq_len:
            message = (
                f"This model's maximum context length is {info.max_seq_len} tokens, and your {param} has "
                f"{len(token_ids)}, which leaves no room for an answer; shorten it."
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        if max(token_ids) >= info.vocab_size:
            message = f"{param} holds token id {max(token_ids)}; the vocabulary ends at {info.vocab_size - 1}."
            raise ApiError(400, message, param=param, code="invalid_value")

    async def _respond(
        self, generate: GenerateRequest, reply: Reply, request: CompletionRequest | ChatRequest
    ) -> Response:
        if request.stream:
            rest = self._client.stream(generate)
            # Awaited before the response begins: until then a failure still gets a status of its own.
            first = await anext(rest)
            report = _report(first)
            events = _events(first, rest, reply, report, include_usage=request.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=_headers(report))
        items = await self._client.complete(generate)
        for item in items:
            reply.add(item.chunk)
        report = _report(items[0])
        body = reply.whole(report).model_dump_json(exclude_unset=True)
        return Response(body, media_type="application/json", headers=_headers(report))


def _generate_request(token_ids: list[int], params: SamplingParams, info: ReplicaInfo) -> GenerateRequest:
    hashes = hash_blocks(generation_root(info.weights_id), token_ids, info.block_size)
    return GenerateRequest(uuid.uuid4().hex, tuple(token_ids), tuple(hashes), params, info.weights_id)


def _report(first: RoutedChunk) -> RouteReport:
    chunk = first.chunk
    return RouteReport(chunk.request_id, first.replica, first.predicted_cached_tokens, chunk.num_cached_tokens)


def _headers(report: RouteReport) -> dict[str, str]:
    return {"X-Caravan-Replica": report.replica}


def _sampling(request: CompletionRequest | ChatRequest, max_tokens: int, logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=request.stop_strings,
        logprobs=logprobs,
    )


async def _events(
    first: RoutedChunk,
    rest: AsyncGenerator[RoutedChunk, None],
    reply: Reply,
    report: RouteReport,
    *,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events. A failure in mid-stream becomes an event with OpenAI's error object."""
    async with aclosing(rest):
        try:
            yield _event(_piece(first, reply, report, include_usage))
            async for item in rest:
                yield _event(_piece(item, reply, report, include_usage))
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if include_usage:
            yield _event(reply.usage_piece(report))
        yield "data: [DONE]\n\n"


def _piece(item: RoutedChunk, reply: Reply, report: RouteReport, include_usage: bool) -> BaseModel:
    """A chunk's event; the last one carries the report unless a usage event follows it."""
    piece = reply.piece(item.chunk)
    last = item.chunk.finish_reason is not None
    return with_report(piece, report) if last and not include_usage else piece


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status)


async def _answer_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)


async def _answer_server_error(_: Request, __: Exception) -> Response:
    error = ApiError(500, "The server failed on this request.", kind="server_error", code="internal_error")
    return JSONResponse(error.body(), 500)
