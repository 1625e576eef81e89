"""Response bodies parse as the `openai` package's own types, and pieces add up to the whole."""

import json

import tokenizers
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import decoders, models, pre_tokenizers, trainers

from cluster.serve.responses import ChatReply, CompletionReply, RouteReport, with_report
from llama.engine import Chunk, TokenLogprob
from llama.tokenizer import SPECIAL_TOKENS, Tokenizer

REPORT = RouteReport("r1", "replica-1", 32, 16)


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


def _chunks() -> list[Chunk]:
    ids = TOKENIZER.encode("hello world")
    chunks = []
    for n, token_id in enumerate(ids):
        logprob = TokenLogprob(token_id, -0.5, {token_id: -0.5, 7: -1.5})
        reason = "stop" if n == len(ids) - 1 else None
        text = TOKENIZER.decode([token_id])
        chunks.append(Chunk("r1", [token_id], text, reason, 16, 40, n + 1, [logprob], n))
    return chunks


def _dump(body) -> dict:
    return json.loads(body.model_dump_json(exclude_unset=True))


def test_a_whole_completion():
    reply = CompletionReply("r1", "m", TOKENIZER, want_logprobs=True)
    for chunk in _chunks():
        reply.add(chunk)
    raw = _dump(reply.whole(REPORT))
    body = Completion.model_validate(raw, strict=True)
    choice, usage = body.choices[0], body.usage
    assert choice.text == "hello world" and choice.finish_reason == "stop"
    assert usage.prompt_tokens == 40 and usage.completion_tokens == len(_chunks())
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 16
    assert "".join(choice.logprobs.tokens) == "hello world"
    places = zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)
    assert all(choice.text[offset:].startswith(token) for offset, token in places)
    assert raw["caravan"] == {
        "request_id": "r1",
        "replica": "replica-1",
        "predicted_cached_tokens": 32,
        "cached_tokens": 16,
    }


def test_completion_pieces_add_up():
    reply = CompletionReply("r1", "m", TOKENIZER, want_logprobs=True)
    pieces = [_dump(reply.piece(chunk)) for chunk in _chunks()]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "hello world"
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    offsets = [piece["choices"][0]["logprobs"]["text_offset"][0] for piece in pieces]
    tokens = [piece["choices"][0]["logprobs"]["tokens"][0] for piece in pieces]
    assert all("hello world"[offset:].startswith(token) for offset, token in zip(offsets, tokens, strict=True))
    usage = Completion.model_validate(_dump(reply.usage_piece(REPORT)), strict=True)
    assert usage.choices == [] and usage.usage.completion_tokens == len(pieces)


def test_a_whole_chat_completion():
    reply = ChatReply("r1", "m", TOKENIZER, want_logprobs=True)
    for chunk in _chunks():
        reply.add(chunk)
    body = ChatCompletion.model_validate(_dump(reply.whole(REPORT)), strict=True)
    choice = body.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == "hello world"
    assert choice.finish_reason == "stop" and len(choice.logprobs.content) == len(_chunks())
    assert bytes(choice.logprobs.content[0].bytes).decode() == choice.logprobs.content[0].token
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_chat_pieces_add_up_and_the_first_names_the_role():
    reply = ChatReply("r1", "m", TOKENIZER, want_logprobs=False)
    pieces = [ChatCompletionChunk.model_validate(_dump(reply.piece(chunk)), strict=True) for chunk in _chunks()]
    assert "".join(piece.choices[0].delta.content for piece in pieces) == "hello world"
    assert [piece.choices[0].delta.role for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert pieces[0].choices[0].logprobs is None
    assert len({piece.id for piece in pieces}) == 1


def test_offsets_run_on_over_tokens_whose_text_is_held_back():
    ids = TOKENIZER.encode("hello world")
    chunks = [
        Chunk("r1", ids[:1], "", None, 0, 1, 1, [TokenLogprob(ids[0], -1.0, {})], 0),
        Chunk("r1", ids[1:], "hello world", "stop", 0, 1, 2, [TokenLogprob(ids[1], -1.0, {})], 0),
    ]
    reply = CompletionReply("r1", "m", TOKENIZER, want_logprobs=True)
    choices = [_dump(reply.piece(chunk))["choices"][0] for chunk in chunks]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0], [5]]


def test_parts_of_characters_are_told_apart_among_the_likeliest_tokens():
    one, two = TOKENIZER.encode("é")
    reply = CompletionReply("r1", "m", TOKENIZER, want_logprobs=True)
    reply.add(Chunk("r1", [one], "", "length", 0, 1, 1, [TokenLogprob(one, -1.0, {one: -1.0, two: -2.0})], 0))
    logprobs = _dump(reply.whole(REPORT))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3"]
    assert logprobs["top_logprobs"] == [{"bytes:\\xc3": -1.0, "bytes:\\xa9": -2.0}]


def test_part_of_a_character_has_its_bytes():
    half = TOKENIZER.encode("é")[0]
    reply = ChatReply("r1", "m", TOKENIZER, want_logprobs=True)
    reply.add(Chunk("r1", [half], "", "length", 0, 1, 1, [TokenLogprob(half, -1.0, {})], 0))
    body = ChatCompletion.model_validate(_dump(reply.whole(REPORT)), strict=True)
    assert body.choices[0].logprobs.content[0].bytes == [0xC3]


def test_the_report_is_an_extra_member():
    reply = ChatReply("r1", "m", TOKENIZER, want_logprobs=False)
    piece = with_report(reply.piece(_chunks()[0]), REPORT)
    assert ChatCompletionChunk.model_validate(_dump(piece)).caravan["replica"] == "replica-1"
