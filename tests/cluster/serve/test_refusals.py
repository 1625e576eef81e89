"""Which answers are counted as refusals, and under which name."""

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.testclient import TestClient

from cluster.serve.api_error import ApiError
from cluster.serve.refusals import Refusals

ANSWERS = {
    "good": lambda: JSONResponse({"error": {"code": "not_one"}}),
    "stream": lambda: StreamingResponse(iter([b"data: 1\n\n", b"data: 2\n\n"])),
    "coded": lambda: JSONResponse(ApiError(429, "later", code="rate_limit_exceeded").body(), 429),
    "bare": lambda: JSONResponse(ApiError(404, "nothing there").body(), 404),
    "text": lambda: Response("no", 502),
    "list": lambda: JSONResponse([1], 500),
    "empty": lambda: Response(b"", 413),
    "pieces": lambda: StreamingResponse(iter([b"a", b"b"]), 503),
}


@pytest.mark.parametrize(
    ("path", "counted"),
    [
        ("good", []),
        ("stream", []),
        ("coded", ["rate_limit_exceeded"]),
        ("bare", ["404"]),
        ("text", ["502"]),
        ("list", ["500"]),
        ("empty", ["413"]),
        ("pieces", ["503"]),
        ("elsewhere", ["404"]),
    ],
)
def test_an_error_is_counted_once_and_goes_out_unchanged(path, counted):
    found: list[str] = []
    plain, watched = FastAPI(), FastAPI()
    for api in (plain, watched):
        for name, answer in ANSWERS.items():
            api.add_api_route(f"/{name}", answer, response_model=None)
    watched.add_middleware(Refusals, refused=found.append)
    answers = [TestClient(api).get(f"/{path}") for api in (plain, watched)]
    assert [(answer.status_code, answer.content) for answer in answers[:1]] == [
        (answer.status_code, answer.content) for answer in answers[1:]
    ]
    assert found == counted
