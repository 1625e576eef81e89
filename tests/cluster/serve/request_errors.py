"""Bodies that are refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from cluster.serve.api_error import ApiError

COMPLETION = {"model": "m", "prompt": "hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def refusal(parse: Callable[[bytes], object], body: dict[str, Any]) -> dict[str, Any]:
    """The error object that answers a body."""
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(body).encode())
    assert caught.value.status == 400
    error = caught.value.body()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    return error
