"""Chunks of an engine, without one, and the vocabulary that they are in."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from cluster.serve.engine_client import RoutedChunk
from cluster.serve.reply import Reply
from cluster.serve.token_text import TokenText
from llama.engine import Chunk, TokenLogprob
from llama.tokenizer import SPECIAL_TOKENS, Tokenizer


def _tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["hello world"], trainer)
    return Tokenizer(backend)


TOKENIZER = _tokenizer()
TOKENS = TokenText(TOKENIZER)
REPORT = {"request_id": "r1", "replica": "replica-1", "predicted_cached_tokens": 32, "cached_tokens": 16}


def routed(chunk: Chunk) -> RoutedChunk:
    return RoutedChunk("replica-1", 32, chunk)


def chunks_of(text: str, *, index: int = 0, cached: int = 16) -> list[RoutedChunk]:
    """One for each token of an answer to 40 tokens."""
    ids = TOKENIZER.encode(text)
    chunks = []
    for n, token_id in enumerate(ids):
        logprob = TokenLogprob(token_id, -0.5, {token_id: -0.5, 7: -1.5})
        reason = "stop" if n == len(ids) - 1 else None
        piece = TOKENIZER.decode([token_id])
        chunks.append(routed(Chunk("r1", [token_id], piece, reason, cached, 40, n + 1, [logprob], n, index)))
    return chunks


def dump(reply: Reply) -> dict:
    """The whole body, as it is sent."""
    return json.loads(reply.whole().model_dump_json(exclude_unset=True))


def event(sent: bytes) -> dict:
    """What is in an event."""
    assert sent.startswith(b"data: ") and sent.endswith(b"}\n\n") and sent.count(b"\n") == 2
    return json.loads(sent[6:])
