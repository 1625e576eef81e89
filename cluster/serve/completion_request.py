"""The body of `/v1/completions`."""

from typing import Annotated, Any

from openai.types import completion_create_params
from pydantic import Field

from cluster.serve.api_error import ApiError
from cluster.serve.protocol import (
    MAX_CHOICES,
    SamplingRequest,
    TokenId,
    json_object,
    refuse,
    supported_fields,
    validated,
)

_OPENAI_FIELDS = completion_create_params.CompletionCreateParamsBase.__annotations__
UNSUPPORTED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {**dict.fromkeys(_OPENAI_FIELDS, ()), "suffix": ("",)}
"""OpenAI's fields, for those that are not obeyed, and the values with which they ask for nothing."""

Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(SamplingRequest):
    """The obeyed part of the body: prompts as text or as token ids.

    `echo` puts the prompt before each completion, its log-probabilities too; `max_tokens=0` computes nothing else.
    `prompt_logprobs` is vLLM's, and a member of each choice.
    """

    # From left to right: of many token ids every other type would note that each of them is none of its.
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    ) = Field(union_mode="left_to_right")
    max_tokens: int = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def parse_completion(body: bytes) -> CompletionRequest:
    """Reads a `/v1/completions` body; raises ApiError (400)."""
    fields = supported_fields(json_object(body), CompletionRequest, UNSUPPORTED_IN_COMPLETIONS)
    try:
        request = validated(CompletionRequest, fields)
    except ApiError as error:
        if (error.param or "").partition("[")[0] != "prompt" or error.code != "invalid_value":
            raise
        # Of a union pydantic tells what the first type has against it.
        message = f"prompt: give a text, token ids, or a list of at most {MAX_CHOICES} of either, none of them empty"
        raise ApiError(400, message, param=error.param, code=error.code) from None
    if request.best_of is not None and request.best_of != request.n:
        refuse("best_of", f"best_of={request.best_of} is only supported where it equals n={request.n}; leave it out")
    if request.stream and request.prompt_logprobs is not None:
        refuse("prompt_logprobs", "prompt_logprobs is not supported with stream; use echo and logprobs")
    choices = len(request.prompts) * request.n
    if choices > MAX_CHOICES:
        refuse("prompt", f"{len(request.prompts)} prompts × n={request.n} are more than {MAX_CHOICES} completions")
    return request
