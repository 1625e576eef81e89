"""What a request is answered with when it is refused or fails: OpenAI's error object."""

import logging
import math
import traceback
from typing import Any

from pydantic import BaseModel

logger = logging.getLogger("ray.serve")


class ErrorObject(BaseModel):
    """What went wrong. `param`: the field of the request that is to blame; `code`: a name for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 or more, and the last event of a stream that fails."""

    error: ErrorObject


class ApiError(Exception):
    """A request that is answered with OpenAI's error object. `retry_after_s`: seconds until it is worth another try."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`"""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, as HTTP has it."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def internal_error() -> ApiError:
    """What a client is told of a defect of ours: nothing but that."""
    return ApiError(500, "The server failed on this request.", kind="server_error", code="internal_error")


def log_defect(request_id: str, error: BaseException) -> None:
    """The error's type and the lines of code it came through. Not what it says: that may be of a prompt."""
    lines = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed with %s:\n%s", request_id, type(error).__name__, lines)
