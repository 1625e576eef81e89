"""What all request bodies have in common: how they are read, what is obeyed, and how everything else is refused.

The names of OpenAI's fields come from the `openai` package's own request types, so that "not supported here" and "no
such field" are told apart. A known field that is not supported is still accepted at the one value that asks for
nothing (`suffix=""`, `tools=[]`, null), because there it is obeyed. Null is the same as leaving a field out.

The fields beyond OpenAI's are named as vLLM names them, except `max_wait_s` and `timeout_s`, which are ours.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.serve.api_error import ApiError
from llama.engine import SamplingParams

MAX_CHOICES = 128
"""Completions that one request may ask for: its prompts times `n`."""


class Body(BaseModel):
    """A JSON object whose members are all known and of the very type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Body):
    """`continuous_usage_stats` is vLLM's: usage in every event, not only in one after the last."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(Body):
    """What the output must be, as vLLM has it; at most one of them."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None


StopString = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TokenKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


class SamplingRequest(Body):
    """What both kinds of generation have. `user` and `safety_identifier` are OpenAI's labels of the caller's end user:
    accepted, because its clients send them, and by definition without effect on the answer."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default={}, max_length=1024, json_schema_extra={"additionalProperties": False}
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    user: str | None = None
    # vLLM's
    top_k: int = Field(default=0, ge=-1, lt=2**31, description="0 and -1: every token.")
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=1e-3, le=1e3)
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=128)
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1)
    guided_grammar: str | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31, description="Lower is sooner; 0 is usual.")
    # Ours
    max_wait_s: float | None = Field(
        default=None, gt=0, le=1e6, description="Refuse at once (429) if the first token would take longer; seconds."
    )
    timeout_s: float | None = Field(default=None, gt=0, le=1e6, description="End it after so many seconds (504).")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    def constraints(self) -> list[tuple[str, Any]]:
        """What is to constrain the output: names and values of SamplingParams."""
        asked = self.structured_outputs or StructuredOutputs()
        found = [("json_schema", asked.json_), ("regex", asked.regex), ("grammar", asked.grammar)]
        found += [("json_schema", self.guided_json), ("regex", self.guided_regex), ("grammar", self.guided_grammar)]
        found += [("regex", _one_of(choices)) for choices in (asked.choice, self.guided_choice) if choices]
        found += [("json_schema", {"type": "object"})] if asked.json_object else []
        return [(name, value) for name, value in found if value is not None]

    def sampling(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """What the engine is told; raises ApiError (400) where fields contradict each other."""
        constraints = self.constraints()
        if len(constraints) > 1:
            raise ApiError(400, "Two constraints of the output exclude each other; give one.", code="invalid_value")
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                min_tokens=self.min_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=max(0, self.top_k),
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias={int(token_id): bias for token_id, bias in self.logit_bias.items()},
                seed=self.seed,
                stop=self.stop_strings,
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                n=self.n,
                **dict(constraints),
            )
        except ValueError as error:
            message = str(error)
            raise ApiError(400, message, param=message.partition("=")[0], code="invalid_value") from None


def _one_of(choices: list[str]) -> str:
    return "|".join(map(re.escape, choices))


_BodyT = TypeVar("_BodyT", bound=Body)


def json_object(body: bytes) -> dict[str, Any]:
    """A JSON object; raises ApiError (400)."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half of a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"We could not parse the JSON body of your request: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The JSON body must be an object, not {type(value).__name__}.", code="invalid_json")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def supported_fields(
    body: dict[str, Any], body_type: type[Body], unsupported: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The members of `body` that `body_type` obeys, without nulls.

    Args:
        unsupported: names of OpenAI's fields that are not obeyed, and the values with which they ask for nothing.

    Raises:
        ApiError: 400, another member asks for something.
    """
    obeyed = {field.alias or name for name, field in body_type.model_fields.items()}
    for name, value in body.items():
        if name in obeyed:
            continue
        if name not in unsupported:
            message = f"Unrecognized request argument supplied: {name}"
            raise ApiError(400, message, param=name, code="unknown_parameter")
        if value is not None and not _is_one_of(value, unsupported[name]):
            refuse(name, f"{name} is not supported by this server; leave it out")
    return {name: value for name, value in body.items() if name in obeyed and value is not None}


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    # JSON keeps true and 1 apart; Python's == does not.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def refuse(param: str, message: str) -> NoReturn:
    raise ApiError(400, message, param=param, code="unsupported_parameter")


def validated(body_type: type[_BodyT], fields: dict[str, Any]) -> _BodyT:
    """The body; raises ApiError (400) that names the first field at fault."""
    try:
        return body_type.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # A union reports its members in the path; the part of it that the client wrote is enough.
        path = _written(first["loc"], fields, first["type"] == "missing")
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{param}: {reason}" if param else reason
        raise ApiError(400, message, param=param or None, code=code) from None


def _written(location: tuple[int | str, ...], value: Any, missing: bool) -> list[int | str]:
    """The part of an error's location that leads through what the client wrote, and the name that is missing there."""
    path: list[int | str] = []
    for part in location:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            path.append(part)
            value = value[part]  # type: ignore[index]
    return [*path, location[-1]] if missing else path
