"""Answers of `/v1/chat/completions` parse as the `openai` package's own types, and events add up to the whole."""

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.serve.chat_reply import ChatReply
from cluster.serve.reply import Wishes
from llama.engine import Chunk, TokenLogprob
from tests.cluster.serve.reply_cases import REPORT, TOKENIZER, TOKENS, chunks_of, dump, event, routed


def _reply(**wishes) -> ChatReply:
    return ChatReply("r1", "m", TOKENS, Wishes(**wishes))


def test_a_whole_chat_completion():
    reply = _reply(logprobs=True, n=2)
    for index, text in enumerate(["hello world", "hello"]):
        for chunk in chunks_of(text, index=index):
            reply.add(0, chunk)
    raw = dump(reply)
    body = ChatCompletion.model_validate(raw, strict=True)
    assert [choice.message.content for choice in body.choices] == ["hello world", "hello"]
    choice = body.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert len(choice.logprobs.content) == len(chunks_of("hello world"))
    assert bytes(choice.logprobs.content[0].bytes).decode() == choice.logprobs.content[0].token
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert raw["caravan"] == REPORT


def test_events_add_up_and_the_first_of_each_choice_names_the_role():
    reply = _reply(n=2)
    chunks = [chunk for index in (0, 1) for chunk in chunks_of("hello world", index=index)]
    raw = [event(reply.event(0, chunk)) for chunk in chunks]
    pieces = [ChatCompletionChunk.model_validate(piece, strict=True) for piece in raw]
    assert "".join(piece.choices[0].delta.content for piece in pieces) == "hello world" * 2
    half = len(pieces) // 2
    assert [piece.choices[0].delta.role for piece in pieces] == (["assistant"] + [None] * (half - 1)) * 2
    assert [piece.choices[0].index for piece in pieces] == [0] * half + [1] * half
    assert pieces[half - 1].choices[0].finish_reason == pieces[-1].choices[0].finish_reason == "stop"
    assert pieces[0].choices[0].logprobs is None
    assert len({piece.id for piece in pieces}) == 1
    assert [piece.get("caravan") for piece in raw] == [None] * (2 * half - 1) + [REPORT]


def test_logprobs_of_events():
    reply = _reply(logprobs=True)
    piece = ChatCompletionChunk.model_validate(event(reply.event(0, chunks_of("hello")[0])), strict=True)
    entry = piece.choices[0].logprobs.content[0]
    assert (entry.logprob, len(entry.top_logprobs)) == (-0.5, 2)


def test_part_of_a_character_has_its_bytes():
    half = TOKENIZER.encode("é")[0]
    reply = _reply(logprobs=True)
    reply.add(0, routed(Chunk("r1", [half], "", "length", 0, 1, 1, [TokenLogprob(half, -1.0, {})], 0)))
    body = ChatCompletion.model_validate(dump(reply), strict=True)
    assert body.choices[0].logprobs.content[0].bytes == [0xC3]
