"""Documents as token ids: a stream of them, and which of the tokens are to be learned.

A text stands between `<|bos|>` and `<|eos|>`: a model learns where texts end, and a generation ends there. All of it is
learned. A conversation is what the chat template makes of it, which brings its own begin and end; if it does not close
with a token that ends a generation, `<|eos|>` follows. Learned is what an assistant wrote, and the token that ends its
turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from llama.tokenizer import ChatTemplateError, Tokenizer
from pipelines.conversations import Message, chat_contents
from pipelines.documents import Document, Kind
from pipelines.tally import EXAMPLE_CHARS

_ENCODE_CHARS = 1 << 18  # until it is dropped, an encoding is more than a hundred times its text
_TODAY = datetime(2025, 1, 1)  # for chat templates that ask: what is written must not depend on the day
_REASON_CHARS = 200


@dataclass(frozen=True)
class Refused:
    """A conversation that the chat template does not take, and why; `text` is the beginning of it."""

    path: str
    offset: int
    reason: str
    text: str


@dataclass(frozen=True)
class Encoded:
    """Documents one after the other.

    `stream`: their ids, `[tokens]`. `lengths`: tokens of each, int64 `[documents]`. `learned`: bool `[tokens]`; None if
    all are. `bytes`: of their texts as UTF-8, of conversations of what is said in them.
    """

    stream: np.ndarray
    lengths: np.ndarray
    learned: np.ndarray | None
    bytes: int
    refused: tuple[Refused, ...] = ()


def encode_documents(
    documents: Iterable[Document], kind: Kind, tokenizer: Tokenizer, dtype: np.dtype, limit: int | None = None
) -> Encoded:
    """The documents up to, and without, the first with which they would be more than `limit` tokens of `dtype`.

    At any time some 2¹⁸ characters are being encoded, however long a document is (`llama.tokenizer.stretches`); of what
    was, only arrays are held."""
    streams, masks = [np.empty(0, dtype)], [np.empty(0, bool)]
    lengths = [np.empty(0, np.int64)]
    refused: list[Refused] = []
    tokens = text_bytes = 0
    for batch in _batches(documents):
        if kind == "chat":
            stream, counts, learned, reasons = _encode_chats(batch, tokenizer, dtype)
        else:
            stream, counts = _encode_texts(batch, tokenizer, dtype)
            learned, reasons = None, {}
        fitting = len(batch)
        if limit is not None:
            fitting = int(np.searchsorted(tokens + np.cumsum(counts), limit, side="right"))
        end = int(counts[:fitting].sum())
        streams.append(stream[:end])
        lengths.append(counts[:fitting])
        if learned is not None:
            masks.append(learned[:end])
        for index, document in enumerate(batch[:fitting]):
            if index in reasons:
                reason = reasons[index][:_REASON_CHARS]
                refused.append(Refused(document.path, document.offset, reason, document.text[:EXAMPLE_CHARS]))
            else:
                text_bytes += len((chat_contents(document.text) if kind == "chat" else document.text).encode())
        tokens += end
        if fitting < len(batch):
            break
    counts = np.concatenate(lengths)
    return Encoded(
        stream=np.concatenate(streams),
        lengths=counts[counts > 0],
        learned=np.concatenate(masks) if kind == "chat" else None,
        bytes=text_bytes,
        refused=tuple(refused),
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _ENCODE_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_texts(
    documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The stream of the texts, each between its two tokens, and the tokens of each, these two included."""
    ids, counts = tokenizer.encode_arrays([document.text for document in documents], dtype)
    counts += 2
    ends = np.cumsum(counts)
    bounds = np.concatenate([ends - counts, ends - 1])
    inside = np.ones(len(ids) + len(bounds), bool)
    inside[bounds] = False
    stream = np.empty(len(inside), dtype)
    stream[inside] = ids
    stream[bounds[: len(counts)]] = tokenizer.bos_id
    stream[bounds[len(counts) :]] = tokenizer.eos_id
    return stream, counts


def _encode_chats(
    documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
    """The stream of the conversations, the tokens of each, and which of them are learned; a refused one has none, and
    there is a reason by its place."""
    ids: list[int] = []
    learned: list[bool] = []
    counts = np.zeros(len(documents), np.int64)
    reasons: dict[int, str] = {}
    for index, document in enumerate(documents):
        try:
            chat_ids, chat_learned = encode_chat(json.loads(document.text), tokenizer)
        except ChatTemplateError as error:
            reasons[index] = str(error)
            continue
        ids += chat_ids
        learned += chat_learned
        counts[index] = len(chat_ids)
    return np.array(ids, dtype), counts, np.array(learned, bool), reasons


def encode_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """A conversation's ids, closed by a token that ends a generation, and which of them are learned.

    Raises ChatTemplateError."""
    ids, learned = tokenizer.encode_chat(messages, now=_TODAY)
    last = next((place for place in range(len(ids) - 1, -1, -1) if not _is_blank(ids[place], tokenizer)), None)
    if last is None:
        raise ChatTemplateError("the chat template makes nothing of the messages")
    if ids[last] not in tokenizer.eos_ids:
        ids.append(tokenizer.eos_id)
        learned.append(learned[last])
    if len(ids) < 2:
        raise ChatTemplateError("the chat template makes a single token of the messages")
    return ids, learned


def _is_blank(token_id: int, tokenizer: Tokenizer) -> bool:
    return not tokenizer.decode([token_id], skip_special_tokens=False).strip()
