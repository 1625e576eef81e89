"""The published description against the server: what it allows is taken, what it forbids refused, answers fit it."""

import asyncio
from collections.abc import Iterator

import jsonschema
import pytest
from fastapi import FastAPI

from cluster.serve.openapi import add_route
from tests.cluster.serve.local_api import MODEL, LocalApi
from tests.cluster.serve.request_errors import CHAT
from tests.cluster.serve.tiny_model import save_tiny_model

TURNS = CHAT["messages"]


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[LocalApi]:
    api = LocalApi(save_tiny_model(tmp_path_factory.mktemp("model")))
    yield api
    api.close()


@pytest.fixture(scope="module")
def published(api) -> dict:
    async def run() -> dict:
        async with api.http() as http:
            return (await http.get("/openapi.json")).json()

    return asyncio.run(run())


def _validator(published: dict, schema: dict) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema | {"components": published["components"]})


def _body_schema(operation: dict) -> dict:
    return operation["requestBody"]["content"]["application/json"]["schema"]


@pytest.mark.parametrize(
    ("path", "fields", "taken"),
    [
        ("/v1/completions", {"prompt": "a"}, True),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "echo": True, "logprobs": 1, "prompt_logprobs": 1}, True),
        ("/v1/completions", {"prompt": [[5]], "stop": None, "suffix": "", "stream": None}, True),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": {"type": "null"}}}, True),
        ("/v1/completions", {"prompt": ""}, False),
        ("/v1/completions", {"prompt": ["a", 1]}, False),
        ("/v1/completions", {"prompt": None}, False),
        ("/v1/completions", {"prompt": "a", "suffix": "x"}, False),
        ("/v1/completions", {"prompt": "a", "bananas": 1}, False),
        ("/v1/completions", {"prompt": "a", "model": "other"}, False),
        ("/v1/completions", {"prompt": "a", "n": True}, False),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, False),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"bananas": 1}}, False),
        ("/v1/chat/completions", {"messages": TURNS, "logprobs": True, "top_logprobs": 2}, True),
        ("/v1/chat/completions", {"messages": [*TURNS, {"role": "assistant", "content": "b", "refusal": None}]}, True),
        ("/v1/chat/completions", {"messages": TURNS, "tools": [], "audio": None, "tool_choice": "none"}, True),
        ("/v1/chat/completions", {"messages": TURNS, "response_format": {"type": "json_object"}}, True),
        ("/v1/chat/completions", {"messages": TURNS, "response_format": {"type": "xml"}}, False),
        ("/v1/chat/completions", {"messages": TURNS, "tools": [{}]}, False),
        ("/v1/chat/completions", {"messages": []}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", "name": "n"}]}, False),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, True),
        ("/tokenize", {"messages": TURNS, "add_special_tokens": False}, True),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}, False),
        ("/detokenize", {"tokens": [5, 6]}, True),
        ("/detokenize", {"tokens": [-1]}, False),
    ],
)
def test_bodies(api, published, path, fields, taken):
    body = {"model": MODEL, **({} if "tok" in path else {"max_tokens": 2}), **fields}
    operation = published["paths"][path]["post"]
    assert _validator(published, _body_schema(operation)).is_valid(body) == taken
    response = api.post(path, body)
    assert (response.status_code == 200) == taken, response.text
    answers = operation["responses"]
    schema = (answers["200"] if taken else answers["4XX"])["content"]["application/json"]["schema"]
    _validator(published, schema).validate(response.json())


def test_streams_are_named_where_there_are_any(published):
    for path, operations in published["paths"].items():
        for operation in operations.values():
            streams = "text/event-stream" in operation["responses"]["200"]["content"]
            assert streams == path.endswith("completions")


def test_errors_of_what_answers_text_are_json():
    async def nothing() -> None: ...

    api = FastAPI()
    add_route(api, "GET", "/metrics", nothing, text=True)
    answers = api.openapi()["paths"]["/metrics"]["get"]["responses"]
    assert {status: list(answer["content"]) for status, answer in answers.items()} == {
        "200": ["text/plain"],
        "4XX": ["application/json"],
        "5XX": ["application/json"],
    }


def test_the_description_is_a_description(published):
    jsonschema.Draft202012Validator.check_schema(published["components"]["schemas"]["CompletionRequest"])
    names = set(published["components"]["schemas"])
    refs = set(_refs(published))
    assert refs and refs <= {f"#/components/schemas/{name}" for name in names}


def _refs(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _refs(part)
