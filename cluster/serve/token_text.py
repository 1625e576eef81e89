"""Names and bytes of single tokens, which may be only a part of a character."""

import codecs
import re

from llama.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes | None:
    """The UTF-8 bytes that a token stands for; None when its vocabulary does not say."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if _REPLACEMENT not in text:
        return text.encode()
    entry = tokenizer.backend.id_to_token(token_id) or ""
    if match := _BYTE_TOKEN.fullmatch(entry):  # a byte-fallback vocabulary
        return bytes([int(match[1], 16)])
    if entry and all(character in _BYTE_OF for character in entry):
        return bytes(_BYTE_OF[character] for character in entry)
    return None


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; of a token that is no text by itself, its bytes as `bytes:\\xe2\\x80`, as OpenAI writes them."""
    raw = token_bytes(tokenizer, token_id)
    if raw is None:
        return tokenizer.backend.id_to_token(token_id) or f"token:{token_id}"
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TextOffsets:
    """Where each token of an answer begins, in characters of the text of all tokens before it.

    A token inside a character begins where that character does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def next(self, token_id: int) -> int:
        """The next token's offset."""
        offset = self._offset
        self._offset += len(self._decoder.decode(token_bytes(self._tokenizer, token_id) or b""))
        return offset


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte: itself where it is printable, else the next one from U+0100 on.

    Source: the released code of GPT-2 (Radford et al. 2019, section 2.2), which every byte-level vocabulary follows.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
