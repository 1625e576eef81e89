"""The body of `/v1/chat/completions`."""

from typing import Annotated, Any, Literal

from openai.types.chat import completion_create_params
from pydantic import Field, model_validator

from cluster.serve.protocol import Body, SamplingRequest, json_object, refuse, supported_fields, validated

_OPENAI_FIELDS = completion_create_params.CompletionCreateParamsBase.__annotations__
UNSUPPORTED_IN_CHAT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_OPENAI_FIELDS, ()),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # of no tools
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),  # of no tools
    "tools": ([],),
}
"""OpenAI's fields, for those that are not obeyed, and the values with which they ask for nothing."""


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn. "developer" is OpenAI's newer name of the system's role."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def plain(self) -> dict[str, str]:
        """The message as chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(Body):
    """`strict` and not, the schema is kept; `name` and `description` are for the reader."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(SamplingRequest):
    """The obeyed part of the body."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    safety_identifier: str | None = None

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates know them."""
        return [message.plain for message in self.messages]

    @property
    def token_limit(self) -> int | None:
        """The bound on generated tokens; None: up to the end of the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def constraints(self) -> list[tuple[str, Any]]:
        form = self.response_format
        if isinstance(form, JsonObjectFormat):
            return [*super().constraints(), ("json_schema", {"type": "object"})]
        if isinstance(form, JsonSchemaFormat):
            return [*super().constraints(), ("json_schema", form.json_schema.schema_)]
        return super().constraints()

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens exclude each other; give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self


def parse_chat(body: bytes) -> ChatRequest:
    """Reads a `/v1/chat/completions` body; raises ApiError (400)."""
    fields = supported_fields(json_object(body), ChatRequest, UNSUPPORTED_IN_CHAT)
    if "messages" in fields:
        fields["messages"] = plain_messages(fields["messages"])
    return validated(ChatRequest, fields)


def plain_messages(messages: Any) -> Any:
    """Messages without null members, as clients send back what they were answered; refuses what is no text."""
    if not isinstance(messages, list):
        return messages
    plain = []
    for index, message in enumerate(messages):
        if isinstance(message, dict):
            message = {name: value for name, value in message.items() if value is not None}
            parts = message.get("content")
            others = isinstance(parts, list) and any(isinstance(p, dict) and p.get("type") != "text" for p in parts)
            if others:
                refuse(f"messages[{index}].content", "only parts of type 'text' are supported")
        plain.append(message)
    return plain
