"""Names and bytes of single tokens, which may be only a part of a character."""

import codecs
from functools import cached_property

from llama.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class TokenText:
    """What a vocabulary's tokens are called in answers; each is looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._names: dict[int, str] = {}

    @cached_property
    def _table(self) -> list[bytes | None]:
        try:
            return self.tokenizer.token_bytes
        except ValueError:  # a decoder that does not go token by token
            return []

    def bytes_of(self, token_id: int) -> bytes | None:
        """The UTF-8 bytes that a token stands for; None when its vocabulary does not say."""
        known = self._table[token_id] if token_id < len(self._table) else None
        if known is not None:
            return known
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return None if _REPLACEMENT in text else text.encode()

    def name(self, token_id: int) -> str:
        """A token's text; of one that is no text by itself, its bytes as `bytes:\\xe2\\x80`, as OpenAI writes them."""
        name = self._names.get(token_id)
        if name is None:
            name = self._names[token_id] = self._name(token_id)
        return name

    def _name(self, token_id: int) -> str:
        raw = self.bytes_of(token_id)
        if raw is None:
            return self.tokenizer.backend.id_to_token(token_id) or f"token:{token_id}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TextOffsets:
    """Where each token of a text begins, in characters of the text of all tokens before it.

    A token inside a character begins where that character does.
    """

    def __init__(self, tokens: TokenText) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def next(self, token_id: int) -> int:
        """The next token's offset."""
        offset = self._offset
        self._offset += len(self._decoder.decode(self._tokens.bytes_of(token_id) or b""))
        return offset
