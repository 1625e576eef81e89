"""The bodies of `/tokenize` and `/detokenize`, and of their answers, as vLLM has them."""

from pydantic import BaseModel, Field, model_validator

from cluster.serve.chat_request import ChatMessage, plain_messages
from cluster.serve.protocol import Body, TokenId, json_object, supported_fields, validated


class TokenizeRequest(Body):
    """A text, or a conversation, which is put through the chat template.

    `add_special_tokens`: nothing is added to a text before it is completed either, so there is only false.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_generation_prompt: bool = True
    add_special_tokens: bool = Field(default=False, json_schema_extra={"const": False})
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.add_special_tokens:
            raise ValueError("add_special_tokens=True is not supported: none are added to a text; leave it out")
        return self


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


class DetokenizeResponse(BaseModel):
    prompt: str


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Reads a `/tokenize` body; raises ApiError (400)."""
    fields = supported_fields(json_object(body), TokenizeRequest, {})
    if "messages" in fields:
        fields["messages"] = plain_messages(fields["messages"])
    return validated(TokenizeRequest, fields)


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Reads a `/detokenize` body; raises ApiError (400)."""
    return validated(DetokenizeRequest, supported_fields(json_object(body), DetokenizeRequest, {}))
