"""OpenAI's endpoints over an engine in this process, by the real client; the engine itself is the reference."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from cluster.serve.api_error import ApiError
from llama.engine import SamplingParams
from tests.cluster.serve.local_api import MODEL, LocalApi
from tests.cluster.serve.reply_cases import chunks_of
from tests.cluster.serve.tiny_model import MAX_SEQ_LEN, save_tiny_model

PROMPT = "def _save_model"
TURN = {"role": "user", "content": "Tell me more."}


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[LocalApi]:
    api = LocalApi(save_tiny_model(tmp_path_factory.mktemp("model")))
    yield api
    api.close()


def _direct(api: LocalApi, prompt, **params):
    """What the engine says when it is asked directly."""
    params = {"temperature": 0, "max_tokens": 6} | params
    completions = api.direct.generate([prompt], SamplingParams(**params))
    return completions if params.get("n", 1) > 1 else completions[0]


def _complete(api: LocalApi, **body):
    response = api.post("/v1/completions", {"model": MODEL, "temperature": 0, "max_tokens": 6} | body)
    assert response.status_code == 200, response.text
    return response.json()


def _events(response: httpx.Response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, mark, end = response.text.split("\n\n")
    assert (mark, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_completion_is_the_engines(api):
    ids = api.tokenizer.encode(PROMPT)
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        choice = _complete(api, prompt=prompt, logprobs=2)["choices"][0]
        expected = _direct(api, PROMPT, logprobs=2)
        assert choice["text"] == expected.text and choice["finish_reason"] == expected.finish_reason
        assert choice["logprobs"]["token_logprobs"] == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-4)


def test_echo_with_logprobs_and_no_completion_scores_the_prompt(api):
    expected = _direct(api, PROMPT, prompt_logprobs=1).prompt_logprobs
    body = _complete(api, prompt=PROMPT, echo=True, logprobs=1, max_tokens=0)
    choice = body["choices"][0]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    scores = choice["logprobs"]["token_logprobs"]
    assert scores[0] is None and len(scores) == len(api.tokenizer.encode(PROMPT))
    assert scores[1:] == pytest.approx([entry.logprob for entry in expected[1:]], abs=1e-4)
    streamed = api.post(
        "/v1/completions",
        {"model": MODEL, "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0, "stream": True},
    )
    (event,) = _events(streamed)
    assert event["choices"][0]["text"] == PROMPT and event["choices"][0]["logprobs"] == choice["logprobs"]


def test_several_prompts_and_completions_have_their_places(api):
    prompts = [PROMPT, "import os", "x"]
    ids = [api.tokenizer.encode(prompt) for prompt in prompts]
    body = {"prompt": prompts, "n": 2, "temperature": 1, "seed": 5, "echo": True}
    choices = _complete(api, **body)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    expected = [one.text for prompt in prompts for one in _direct(api, prompt, n=2, temperature=1, seed=5)]
    echoed = [text for text in prompts for _ in range(2)]
    assert [choice["text"] for choice in choices] == [a + b for a, b in zip(echoed, expected, strict=True)]
    assert _complete(api, **body | {"prompt": ids})["choices"] == choices
    pieces = _events(api.post("/v1/completions", {"model": MODEL, "max_tokens": 6, **body, "stream": True}))
    texts = [""] * 6
    for choice in (choice for piece in pieces for choice in piece["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in choices]


def test_each_of_several_prompts_is_a_request_of_its_own(api):
    before = len(api.engine.asked)
    _complete(api, prompt=["a", "b"], priority=3, timeout_s=9, max_wait_s=2)
    asked = api.engine.asked[before:]
    assert len({request.request_id for request in asked}) == 2
    assert {(request.priority, request.timeout_s, request.max_wait_s) for request in asked} == {(3, 9, 2)}


def test_the_clients_request_id_is_part_of_the_answers(api):
    async def ask(given: str) -> str:
        async with api.client() as client:
            made = await client.completions.create(
                model=MODEL, prompt="a", max_tokens=1, extra_headers={"X-Request-Id": given}
            )
            return made.id

    one, two = (asyncio.run(ask("mine.1")) for _ in range(2))
    assert one.startswith("cmpl-mine.1-") and two.startswith("cmpl-mine.1-") and one != two
    assert "../" not in asyncio.run(ask("../../etc"))


def test_chat_is_the_engines_through_the_template(api):
    prompt = api.tokenizer.apply_chat_template([TURN])
    body = {"model": MODEL, "messages": [TURN], "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    whole = api.post("/v1/chat/completions", body).json()
    expected = _direct(api, prompt, logprobs=3)
    assert whole["choices"][0]["message"]["content"] == expected.text
    entries = whole["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-4)
    pieces = _events(api.post("/v1/chat/completions", body | {"stream": True}))
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == expected.text
    assert [entry for piece in pieces for entry in piece["choices"][0]["logprobs"]["content"]] == entries


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("fields", "is_kept"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            lambda text: 0 <= json.loads(text)["a"] <= 9,
        ),
        ({"guided_choice": ["yes, no", "n.o"]}, lambda text: text in ("yes, no", "n.o")),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, lambda text: len(text) == 3 and text.isdigit()),
        ({"guided_grammar": 'start: "ab" | "cd"'}, lambda text: text in ("ab", "cd")),
    ],
)
def test_constraints_hold(api, fields, is_kept):
    body = {"model": MODEL, "messages": [TURN], "seed": 1, "max_tokens": 40, "n": 3} | fields
    answer = api.post("/v1/chat/completions", body).json()
    assert len(answer["choices"]) == 3
    assert all(is_kept(choice["message"]["content"]) for choice in answer["choices"])


def test_a_request_whose_time_is_over(api):
    body = {"model": MODEL, "prompt": "a", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "timeout_s": 1e-6}
    response = api.post("/v1/completions", body)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert api.post("/v1/completions", body | {"stream": True}).status_code == 504
    late = api.post("/v1/completions", body | {"stream": True, "timeout_s": 0.1})
    *pieces, last, _ = late.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout" and pieces


def test_tokenize_and_detokenize_are_the_tokenizers(api):
    ids = api.tokenizer.encode(PROMPT)
    answer = api.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    assert answer["tokens"] == ids and answer["count"] == len(ids) and answer["max_model_len"] == MAX_SEQ_LEN
    assert "".join(answer["token_strs"]) == PROMPT
    assert api.post("/detokenize", {"model": MODEL, "tokens": ids}).json() == {"prompt": PROMPT}
    chat = api.post("/tokenize", {"model": MODEL, "messages": [TURN]}).json()["tokens"]
    assert chat == api.tokenizer.apply_chat_template([TURN])
    shorter = api.post("/tokenize", {"messages": [TURN], "add_generation_prompt": False}).json()["tokens"]
    assert shorter == chat[: len(shorter)] and len(shorter) < len(chat)


def test_models(api):
    async def run() -> None:
        async with api.client() as client:
            (model,) = [model async for model in client.models.list()]
            assert model == await client.models.retrieve(MODEL) and model.max_model_len == MAX_SEQ_LEN
            for name in ("other", "a/b", "../../etc/passwd", "..%2f..%2fetc"):
                with pytest.raises(openai.NotFoundError):
                    await client.models.retrieve(name)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/completions", {"model": "other", "prompt": "a"}, 404, "model_not_found"),
        ("/tokenize", {"model": "other", "prompt": "a"}, 404, "model_not_found"),
        ("/detokenize", {"tokens": [10**9]}, 400, "invalid_value"),
        ("/v1/completions", {"model": MODEL, "prompt": [10**9]}, 400, "invalid_value"),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "logit_bias": {"99999": 1}}, 400, "invalid_value"),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "guided_regex": "("}, 400, "invalid_value"),
        ("/v1/completions", {"model": MODEL, "prompt": [1] * 600}, 400, "context_length_exceeded"),
        ("/v1/nothing", {}, 404, None),
        ("/v1/models", {}, 405, None),
    ],
)
def test_errors_have_openais_shape(api, path, body, status, code):
    response = api.post(path, body)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


class _Failing:
    """Fails before or after its first chunk."""

    def __init__(self, error: Exception, chunks=()) -> None:
        self.error = error
        self.chunks = chunks

    async def stream(self, request):
        for chunk in self.chunks:
            yield chunk
        raise self.error

    async def complete(self, request):
        raise self.error


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_says_when_to_come_again_and_a_defect_says_nothing(api, monkeypatch, stream):
    body = {"model": MODEL, "prompt": "a", "stream": stream}
    answers = api.answers
    full = ApiError(429, "Full.", code="rate_limit_exceeded", kind="rate_limit_error", retry_after_s=1.2)
    monkeypatch.setattr(answers, "_client", _Failing(full))
    response = api.post("/v1/completions", body)
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")
    monkeypatch.setattr(answers, "_client", _Failing(RuntimeError("a secret")))
    response = api.post("/v1/completions", body)
    assert response.status_code == 500 and "secret" not in response.text
    assert response.json()["error"]["code"] == "internal_error"


def test_a_failure_in_mid_stream_is_an_event(api, monkeypatch):
    monkeypatch.setattr(api.answers, "_client", _Failing(RuntimeError("a secret"), chunks_of("hello")[:1]))
    response = api.post("/v1/completions", {"model": MODEL, "prompt": "a", "stream": True})
    _, last, end = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error" and end == ""
    assert "secret" not in response.text
