"""Answers of `/v1/completions` parse as the `openai` package's own types, and events add up to the whole."""

import pytest
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from cluster.serve.completion_reply import CompletionBody, CompletionReply
from cluster.serve.reply import Wishes
from llama.engine import Chunk, TokenLogprob
from tests.cluster.serve.reply_cases import REPORT, TOKENIZER, TOKENS, chunks_of, dump, event, routed


def _reply(wishes=Wishes(logprobs=True), **settings) -> CompletionReply:  # noqa: B008 - frozen
    return CompletionReply("r1", "m", TOKENS, wishes, **settings)


def _fed(reply: CompletionReply, *chunks) -> CompletionReply:
    for chunk in chunks:
        reply.add(0, chunk)
    return reply


def test_a_whole_completion():
    raw = dump(_fed(_reply(), *chunks_of("hello world")))
    body = Completion.model_validate(raw, strict=True)
    choice, usage = body.choices[0], body.usage
    assert choice.text == "hello world" and choice.finish_reason == "stop"
    assert usage.prompt_tokens == 40 and usage.completion_tokens == len(chunks_of("hello world"))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 16
    assert "".join(choice.logprobs.tokens) == "hello world"
    places = zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)
    assert all(choice.text[offset:].startswith(token) for offset, token in places)
    assert raw["caravan"] == REPORT


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("text", ["hello world", 'tab\t quote" back\\ new\n é 漢 \x00\x1f\x7f \u2028'])
def test_an_event_is_what_openais_type_would_write(logprobs, text):
    reply = _reply(Wishes(logprobs=logprobs))
    chunk = routed(Chunk("r1", [9], text, None, 0, 4, 1, [TokenLogprob(9, -0.25, {9: -0.25})], 0))
    sent = reply.event(0, chunk)
    name = TOKENS.name(9)
    expected = Completion(
        id="cmpl-r1",
        object="text_completion",
        created=event(sent)["created"],
        model="m",
        choices=[
            # construct: one that goes on has no finish_reason yet, which the type for whole ones does not allow.
            CompletionChoice.model_construct(
                index=0,
                text=text,
                finish_reason=None,
                logprobs=Logprobs(text_offset=[0], token_logprobs=[-0.25], tokens=[name], top_logprobs=[{name: -0.25}])
                if logprobs
                else None,
            )
        ],
    )
    assert event(sent) == expected.model_dump(exclude_unset=True)
    if not logprobs:  # of the hot path not only the meaning, but every byte of what is new in it
        assert expected.choices[0].model_dump_json(include={"text"}).encode()[1:-1] in sent


def test_events_add_up():
    reply = _reply()
    pieces = [event(reply.event(0, chunk)) for chunk in chunks_of("hello world")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "hello world"
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    offsets = [piece["choices"][0]["logprobs"]["text_offset"][0] for piece in pieces]
    tokens = [piece["choices"][0]["logprobs"]["tokens"][0] for piece in pieces]
    assert all("hello world"[offset:].startswith(token) for offset, token in zip(offsets, tokens, strict=True))
    assert [piece.get("caravan") for piece in pieces] == [None] * (len(pieces) - 1) + [REPORT]
    assert not any("usage" in piece for piece in pieces) and reply.last_event() == b"data: [DONE]\n\n"


def test_usage_comes_after_the_last_event_when_it_is_wanted():
    reply = _reply(Wishes(usage=True))
    pieces = [event(reply.event(0, chunk)) for chunk in chunks_of("hello world")]
    assert all(piece["usage"] is None and "caravan" not in piece for piece in pieces)
    last, mark, _ = reply.last_event().split(b"\n\n")
    body = event(last + b"\n\n")
    assert Completion.model_validate(body, strict=True).usage.completion_tokens == len(pieces)
    assert body["choices"] == [] and body["caravan"] == REPORT and mark == b"data: [DONE]"


def test_usage_in_every_event_when_it_is_wanted():
    reply = _reply(Wishes(usage=True, continuous_usage=True))
    counts = [event(reply.event(0, chunk))["usage"]["completion_tokens"] for chunk in chunks_of("hello world")]
    assert counts == list(range(1, len(counts) + 1))


def test_several_prompts_with_several_completions():
    reply = _reply(Wishes(prompts=2, n=2))
    texts = {(0, 0): "hello", (0, 1): "world", (1, 0): "lo", (1, 1): "he"}
    for (prompt, index), text in texts.items():
        for chunk in chunks_of(text, index=index, cached=16 if index == 0 else 32):
            reply.add(prompt, chunk)
    raw = dump(reply)
    body = Completion.model_validate(raw, strict=True)
    assert [(choice.index, choice.text) for choice in body.choices] == list(enumerate(texts.values()))
    assert body.usage.prompt_tokens == 80  # each prompt once
    assert body.usage.completion_tokens == sum(len(TOKENIZER.encode(text)) for text in texts.values())
    assert body.usage.prompt_tokens_details.cached_tokens == 32  # not what a second completion finds of the first
    assert [report["cached_tokens"] for report in raw["caravan"]["requests"]] == [16, 16]


PROMPT = TOKENIZER.encode("hello?")


def _scored(*chunks):
    scores = [None, *(TokenLogprob(token_id, -2.0, {7: -1.0}) for token_id in PROMPT[1:])]
    chunks[0].chunk.prompt_logprobs = scores
    return chunks


def test_an_echo_has_the_prompts_logprobs_too():
    reply = _reply(echo=[("hello?", PROMPT)])
    raw = dump(_fed(reply, *_scored(*chunks_of(" world!"))))
    CompletionBody.model_validate(raw, strict=True)
    choice = raw["choices"][0]
    assert choice["text"] == "hello? world!" and "".join(choice["logprobs"]["tokens"]) == "hello? world!"
    n = len(PROMPT)
    assert choice["logprobs"]["token_logprobs"][: n + 1] == [None] + [-2.0] * (n - 1) + [-0.5]
    # The token that came is always among the likeliest.
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {TOKENS.name(7): -1.0, TOKENS.name(PROMPT[1]): -2.0}]
    places = zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True)
    assert all(choice["text"][offset:].startswith(token) for offset, token in places)


def test_an_echo_is_in_the_first_event_alone():
    reply = _reply(echo=[("hello?", PROMPT)])
    choices = [event(reply.event(0, chunk))["choices"][0] for chunk in _scored(*chunks_of(" world!"))]
    assert "".join(choice["text"] for choice in choices) == "hello? world!"
    assert len(choices[0]["logprobs"]["tokens"]) == len(PROMPT) + 1
    assert choices[1]["logprobs"]["text_offset"] == [
        len("hello?") + len(TOKENS.name(chunks_of(" world!")[0].chunk.token_ids[0]))
    ]


def test_prompt_logprobs_as_vllm_has_them():
    reply = _reply(Wishes(), prompt_logprobs=True)
    choice = dump(_fed(reply, *_scored(*chunks_of("x"))))["choices"][0]
    assert choice["text"] == "x" and choice["logprobs"] is None
    first, second = choice["prompt_logprobs"][:2]
    assert first is None and second == {
        "7": {"logprob": -1.0, "rank": 1, "decoded_token": TOKENS.name(7)},
        str(PROMPT[1]): {"logprob": -2.0, "rank": None, "decoded_token": TOKENS.name(PROMPT[1])},
    }


def test_offsets_run_on_over_tokens_whose_text_is_held_back():
    ids = TOKENIZER.encode("hello world")
    chunks = [
        Chunk("r1", ids[:1], "", None, 0, 1, 1, [TokenLogprob(ids[0], -1.0, {})], 0),
        Chunk("r1", ids[1:], "hello world", "stop", 0, 1, 2, [TokenLogprob(ids[1], -1.0, {})], 0),
    ]
    reply = _reply()
    choices = [event(reply.event(0, routed(chunk)))["choices"][0] for chunk in chunks]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0], [5]]


def test_parts_of_characters_are_told_apart_among_the_likeliest_tokens():
    one, two = TOKENIZER.encode("é")
    chunk = Chunk("r1", [one], "", "length", 0, 1, 1, [TokenLogprob(one, -1.0, {one: -1.0, two: -2.0})], 0)
    logprobs = dump(_fed(_reply(), routed(chunk)))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3"]
    assert logprobs["top_logprobs"] == [{"bytes:\\xc3": -1.0, "bytes:\\xa9": -2.0}]
