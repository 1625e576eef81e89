"""OpenAI's request bodies: which fields are obeyed, and how everything else is refused.

The names of the known fields come from the `openai` package's own request types, so that "not supported here" and
"no such field" are told apart. A known field that is not supported is still accepted at the one value that asks
for nothing (`n=1`, `echo=false`, `logit_bias={}`, null), because there it is obeyed.
"""

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

COMPLETION_FIELDS = frozenset(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
CHAT_FIELDS = frozenset(chat_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
}


class ApiError(Exception):
    """A request that is answered with OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`"""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    include_usage: bool = False


StopString = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


class _Request(BaseModel):
    """What both kinds of request have. `user` is OpenAI's label of the caller's end user: accepted, because its
    clients send it, and by definition without effect on the answer."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    user: str | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self


class CompletionRequest(_Request):
    """The obeyed part of a `/v1/completions` body: one prompt, as text or as token ids."""

    prompt: str | list[TokenId]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(_Request):
    """The obeyed part of a `/v1/chat/completions` body."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def token_limit(self) -> int | None:
        """The bound on generated tokens; None: up to the end of the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens exclude each other; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self


_RequestT = TypeVar("_RequestT", bound=_Request)


def parse_completion(body: bytes) -> CompletionRequest:
    """Reads a `/v1/completions` body; raises ApiError (400)."""
    fields = _supported_fields(_json_object(body), COMPLETION_FIELDS, CompletionRequest)
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            _refuse("prompt", f"{len(prompt)} prompts in one request are not supported; send one request for each")
        fields["prompt"] = prompt[0]
    if fields.get("prompt") in ("", []):
        _refuse("prompt", "the prompt is empty; give at least one token")
    return _validate(CompletionRequest, fields)


def parse_chat(body: bytes) -> ChatRequest:
    """Reads a `/v1/chat/completions` body; raises ApiError (400)."""
    fields = _supported_fields(_json_object(body), CHAT_FIELDS, ChatRequest)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [_plain_message(message, index) for index, message in enumerate(messages)]
    return _validate(ChatRequest, fields)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # fails on half of a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"We could not parse the JSON body of your request: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The JSON body must be an object, not {type(value).__name__}.", code="invalid_json")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _supported_fields(body: dict[str, Any], known: frozenset[str], request_type: type[_RequestT]) -> dict[str, Any]:
    obeyed = request_type.model_fields
    for name, value in body.items():
        if name not in known:
            raise ApiError(400, f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter")
        if name not in obeyed and value is not None and not _is_neutral(name, value):
            _refuse(name, f"{name} is not supported by this server; leave it out")
    return {name: value for name, value in body.items() if name in obeyed and value is not None}


def _is_neutral(name: str, value: Any) -> bool:
    # JSON keeps true and 1 apart; Python's == does not.
    neutral = _NEUTRAL.get(name, ())
    return any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral)


def _plain_message(message: Any, index: int) -> Any:
    """Drops null members and joins text parts; anything else is left for validation to refuse."""
    if not isinstance(message, dict):
        return message
    plain = {name: value for name, value in message.items() if value is not None}
    parts = plain.get("content")
    if isinstance(parts, list):
        texts = [part for part in parts if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) != len(parts) or not all(isinstance(part.get("text"), str) for part in texts):
            _refuse(f"messages[{index}].content", "only parts of type 'text' are supported")
        plain["content"] = "".join(part["text"] for part in texts)
    return plain


def _refuse(param: str, message: str) -> NoReturn:
    raise ApiError(400, message, param=param, code="unsupported_parameter")


def _validate(request_type: type[_RequestT], fields: dict[str, Any]) -> _RequestT:
    try:
        return request_type.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        # A union reports its members in the path; the part of it that the client wrote is enough.
        path = [part for part in first["loc"] if isinstance(part, int) or part in _PATH_NAMES]
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{param}: {reason}" if param else reason
        raise ApiError(400, message, param=param or None, code=code) from None


_PATH_NAMES = frozenset(
    {*CompletionRequest.model_fields, *ChatRequest.model_fields, *ChatMessage.model_fields, *StreamOptions.model_fields}
)
