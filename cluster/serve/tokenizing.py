"""`/tokenize` and `/detokenize`, as vLLM has them."""

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from cluster.serve.request_body import read_json_body
from cluster.serve.served_model import ServedModel
from cluster.serve.tokenize_request import (
    DetokenizeResponse,
    TokenizeResponse,
    parse_detokenize,
    parse_tokenize,
)


class Tokenizing:
    def __init__(self, model: ServedModel) -> None:
        self._model = model

    async def tokenize(self, http: Request) -> Response:
        """The token ids of a text, or of a conversation in the chat template: those that a completion would see."""
        body = parse_tokenize(await read_json_body(http))
        if body.model is not None:
            self._model.check_name(body.model)
        if body.messages is not None:
            ids = await self._model.encode_chat(
                [message.plain for message in body.messages], add_generation_prompt=body.add_generation_prompt
            )
        else:
            ids = await self._model.encode(body.prompt or "", "prompt")
        info = await self._model.info()
        names = [self._model.tokens.name(token_id) for token_id in ids] if body.return_token_strs else None
        response = TokenizeResponse(count=len(ids), max_model_len=info.max_seq_len, tokens=ids, token_strs=names)
        return JSONResponse(response.model_dump())

    async def detokenize(self, http: Request) -> Response:
        """The text of token ids, control tokens included."""
        body = parse_detokenize(await read_json_body(http))
        if body.model is not None:
            self._model.check_name(body.model)
        await self._model.check_ids(body.tokens, "tokens")
        return JSONResponse(DetokenizeResponse(prompt=await self._model.decode(body.tokens)).model_dump())
