"""OpenAI's endpoints and vLLM's beside them, on a FastAPI application, and every error in OpenAI's shape."""

from typing import Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from openai.types import Model
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from cluster.serve.answer import Answers
from cluster.serve.api_error import ApiError
from cluster.serve.chat import ChatCompletions
from cluster.serve.chat_reply import ChatBody
from cluster.serve.chat_request import UNSUPPORTED_IN_CHAT, ChatRequest
from cluster.serve.completion_reply import CompletionBody
from cluster.serve.completion_request import UNSUPPORTED_IN_COMPLETIONS, CompletionRequest
from cluster.serve.completions import Completions
from cluster.serve.openapi import Bodies, add_route, publish
from cluster.serve.served_model import ServedModel
from cluster.serve.tokenize_request import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from cluster.serve.tokenizing import Tokenizing


class ModelBody(Model):
    """OpenAI's, and as vLLM has it how many tokens a prompt and its answer may have."""

    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelBody]


class Health(BaseModel):
    status: Literal["ok"]


class _Models:
    def __init__(self, model: ServedModel) -> None:
        self._model = model

    async def list(self) -> Response:
        """OpenAI's list of models: the one that is served."""
        return JSONResponse({"object": "list", "data": [await self._entry()]})

    async def retrieve(self, model: str) -> Response:
        """One model of the list."""
        self._model.check_name(model)
        return JSONResponse(await self._entry())

    async def _entry(self) -> dict[str, str | int]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "caravan",
            "max_model_len": (await self._model.info()).max_seq_len,
        }


async def _health() -> Response:
    """This process lives and answers; whether the replicas do says `/ready`."""
    return JSONResponse({"status": "ok"})


def add_openai_routes(api: FastAPI, model: ServedModel, answers: Answers) -> None:
    """Adds the endpoints, the error handlers and `/openapi.json`, which describes what is added later too."""
    models, tokenizing = _Models(model), Tokenizing(model)
    completions, chat = Completions(model, answers), ChatCompletions(model, answers)
    add_route(api, "GET", "/health", _health, answer=Health)
    add_route(api, "GET", "/v1/models", models.list, answer=ModelList)
    add_route(api, "GET", "/v1/models/{model:path}", models.retrieve, answer=ModelBody)
    add_route(
        api, "POST", "/v1/completions", completions.create, body=CompletionRequest, answer=CompletionBody, events=True
    )
    add_route(api, "POST", "/v1/chat/completions", chat.create, body=ChatRequest, answer=ChatBody, events=True)
    add_route(api, "POST", "/tokenize", tokenizing.tokenize, body=TokenizeRequest, answer=TokenizeResponse)
    add_route(api, "POST", "/detokenize", tokenizing.detokenize, body=DetokenizeRequest, answer=DetokenizeResponse)
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_error)
    bodies: Bodies = {CompletionRequest: UNSUPPORTED_IN_COMPLETIONS, ChatRequest: UNSUPPORTED_IN_CHAT}
    publish(api, model.name, bodies | {TokenizeRequest: {}, DetokenizeRequest: {}})


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _answer_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers=error.headers)
