"""The endpoint of a local cluster: one Ray, one application, the real `openai` client."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import ray

from cluster import processes
from cluster.serve.request_body import MAX_BODY_BYTES
from cluster.session import ray_processes
from tests.cluster.serve.served import pids_of, replicas_of, totals_of, wait_until
from tests.cluster.serve.test_metrics import _samples, _total, _value

pytestmark = pytest.mark.integration

MODEL = "tiny"


class _Conversation:
    """A chat whose every turn carries the whole history."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.messages: list[dict[str, str]] = []
        self.reports: list[dict] = []

    def turn(self, client: openai.OpenAI) -> None:
        question = f"{self.number * 7919} is the number of this conversation, and turn {len(self.reports)} asks again."
        self.messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model=MODEL, messages=self.messages, max_tokens=12, temperature=0)
        self.messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        assert answer.usage.prompt_tokens_details.cached_tokens == answer.caravan["cached_tokens"]
        self.reports.append(answer.caravan)


@pytest.fixture(scope="module")
def conversations(client) -> list[_Conversation]:
    """20 conversations of 3 turns, four of them at a time, interleaved."""
    conversations = [_Conversation(number) for number in range(20)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            list(pool.map(lambda conversation: conversation.turn(client), conversations))
    return conversations


def test_every_turns_cached_tokens_are_predicted_exactly(conversations):
    for conversation in conversations:
        predicted = [report["predicted_cached_tokens"] for report in conversation.reports]
        assert predicted == [report["cached_tokens"] for report in conversation.reports]
        assert predicted[0] == 0 and 16 <= predicted[1] < predicted[2]
        assert len({report["replica"] for report in conversation.reports}) == 1
    share = Counter(conversation.reports[0]["replica"] for conversation in conversations)
    assert len(share) == 2 and min(share.values()) >= 4


def test_flushing_one_replica_ends_its_predictions_at_once(conversations, client, http):
    flushed = conversations[0].reports[-1]["replica"]
    kept = next(c for c in conversations if c.reports[-1]["replica"] != flushed)
    assert replicas_of(http)[flushed]["cached_blocks"] > 0
    started = time.monotonic()
    answer = http.post(f"/caravan/replicas/{flushed}/flush").raise_for_status().json()
    assert answer["applied"]
    assert replicas_of(http)[flushed]["cached_blocks"] == 0
    assert time.monotonic() - started < 1
    conversations[0].turn(client)
    kept.turn(client)
    last = conversations[0].reports[-1]
    assert last["predicted_cached_tokens"] == last["cached_tokens"] == 0
    last = kept.reports[-1]
    assert last["predicted_cached_tokens"] == last["cached_tokens"] > 0


def test_the_index_holds_what_the_replicas_have_cached(conversations, http):
    for replica, entry in replicas_of(http).items():
        found = http.get(f"/caravan/replicas/{replica}/cache").raise_for_status().json()
        assert found == {"replica": replica, "blocks": entry["cached_blocks"], "missing": 0, "stale": 0}
    assert http.get("/caravan/replicas/nobody/cache").status_code == 404


def test_flushing_an_unknown_replica_is_an_error(http):
    response = http.post("/caravan/replicas/nobody/flush")
    assert response.status_code == 404 and response.json()["error"]["code"] == "replica_not_found"


def test_replicas_hold_the_gpus_they_asked_for_by_name(endpoint):
    total, free = ray.cluster_resources(), ray.available_resources()
    assert total["GPU"] - free["GPU"] == 1.0
    assert 0 < total["accelerator_type:T4"] - free["accelerator_type:T4"] < 0.01


def test_nothing_listens_beyond_loopback(endpoint, http):
    found = processes.listeners(ray_processes())
    assert set(pids_of(http).values()) <= {listener.pid for listener in found}
    assert [listener for listener in found if not listener.is_loopback] == []


def test_models_and_readiness(client, http):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert http.get("/health").raise_for_status().json() == {"status": "ok"}
    ready = http.get("/ready").raise_for_status().json()
    assert ready["ready"] and {entry["replica"] for entry in ready["replicas"]} == set(replicas_of(http))
    assert [entry["fresh"] for entry in ready["replicas"]] == [True, True]


def test_several_prompts_and_completions_in_one_request(client):
    request = {"model": MODEL, "prompt": [[n] * 20 for n in range(30, 36)], "max_tokens": 4, "temperature": 0, "n": 2}
    whole = client.completions.create(**request)
    assert [choice.index for choice in whole.choices] == list(range(12)) and whole.usage.prompt_tokens == 120
    alone = [client.completions.create(**request | {"prompt": prompt, "n": 1}) for prompt in request["prompt"]]
    assert [choice.text for choice in whole.choices] == [one.choices[0].text for one in alone for _ in range(2)]
    texts = [""] * 12
    for piece in client.completions.create(**request, stream=True):
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_the_published_description_names_every_route(http):
    paths = http.get("/openapi.json").raise_for_status().json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/ready", "/caravan/replicas"} <= set(paths)


def test_streaming_a_chat_equals_not_streaming_it(client):
    request = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me more."}], "temperature": 0}
    whole = client.chat.completions.create(**request, max_tokens=30)
    pieces = list(
        client.chat.completions.create(**request, max_tokens=30, stream=True, stream_options={"include_usage": True})
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1])
    assert text == whole.choices[0].message.content and text
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert pieces[-1].caravan["predicted_cached_tokens"] == pieces[-1].usage.prompt_tokens_details.cached_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_streaming_a_completion_equals_not_streaming_it(client):
    request = {"model": MODEL, "prompt": list(range(10, 60)), "temperature": 0, "max_tokens": 20, "logprobs": 2}
    whole = client.completions.create(**request)
    pieces = list(client.completions.create(**request, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    streamed = [token for piece in pieces for token in piece.choices[0].logprobs.tokens]
    assert streamed == whole.choices[0].logprobs.tokens and len(streamed) == 20
    assert all(len(top) <= 2 for top in whole.choices[0].logprobs.top_logprobs)
    assert pieces[-1].caravan["replica"]
    raw = client.completions.with_raw_response.create(**request)
    assert raw.headers["x-caravan-replica"] == raw.parse().caravan["replica"]
    assert len(raw.headers.get_list("x-request-id")) == 1


def test_seeds_and_stop_strings_are_obeyed(client):
    request = {"model": MODEL, "prompt": "once", "max_tokens": 20, "seed": 3}
    one, two = (client.completions.create(**request).choices[0] for _ in range(2))
    assert one.text == two.text
    stop = one.text[5:7]
    stopped = client.completions.create(**request, stop=[stop]).choices[0]
    assert stopped.text == one.text[: one.text.index(stop)] and stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("/v1/completions", b'{"model": ', 400, None, "invalid_json"),
        ("/v1/chat/completions", b"[]", 400, None, "invalid_json"),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "bananas": 1}, 400, "bananas", "unknown_parameter"),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "suffix": "y"}, 400, "suffix", "unsupported_parameter"),
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "model", "model_not_found"),
        ("/v1/completions", {"model": MODEL, "prompt": [9] * 512}, 400, "prompt", "context_length_exceeded"),
        ("/v1/completions", {"model": MODEL, "prompt": [9, 10_000]}, 400, "prompt", "invalid_value"),
        (
            "/v1/chat/completions",
            {"model": MODEL, "messages": [{"role": "user", "content": "Z" * 9999}], "stream": True},
            400,
            "messages",
            "context_length_exceeded",
        ),
        (
            "/v1/completions",
            {"model": MODEL, "prompt": "ab" * (MAX_BODY_BYTES // 3)},
            400,
            "prompt",
            "context_length_exceeded",
        ),
        ("/v1/completions", b" " * (MAX_BODY_BYTES + 1), 413, None, "request_too_large"),
        ("/v1/nothing", {}, 404, None, None),
    ],
    ids=lambda value: "body" if isinstance(value, bytes | dict) else None,
)
def test_errors_have_openais_shape(http, path, body, status, param, code):
    response = http.post(path, content=body) if isinstance(body, bytes) else http.post(path, json=body)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/caravan/replicas/{}/flush"])
def test_what_a_web_page_could_send_is_refused(http, path):
    replica = next(iter(replicas_of(http)))
    response = http.post(path.format(replica), content=b"{}", headers={"Content-Type": "text/plain"})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens"):
        client.completions.create(model=MODEL, prompt=[9] * 600)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_a_request_is_found_by_its_id_with_its_scores_and_times(client, http):
    for cached in (0, 48):  # of 64 tokens the last is computed always, and so its block
        answer = client.completions.create(model=MODEL, prompt=list(range(30, 94)), max_tokens=6)
        (record,) = http.get(f"/caravan/requests/{answer.id}").raise_for_status().json()["requests"]
        assert record["predicted_cached_tokens"] == record["cached_tokens"] == cached
        assert record["generated_tokens"] == record["steps"] == answer.usage.completion_tokens
        assert 0 <= record["queue_s"] <= record["first_token_s"] <= record["end_s"] < 60
        assert record["attempts"][0]["scores"][0]["replica"] == record["replica"]
        assert {score["replica"] for score in record["attempts"][0]["scores"]} == set(replicas_of(http))


def test_metrics_show_at_the_ingress_and_at_rays_agent(conversations, http):
    found = _samples(http.get("/metrics").raise_for_status().content)
    ended, cached = _value(found, "caravan_requests_total"), _value(found, "caravan_cached_tokens_total")
    assert ended >= 60 and 0 < cached == _value(found, "caravan_predicted_cached_tokens_total")
    assert 0 <= max(value for key, value in found.items() if key[0] == "caravan_index_lag_seconds") < 10
    node, name = ray.nodes()[0], "ray_caravan_requests_total"
    agent = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wait_until(lambda: ended <= _total(_samples(http.get(agent).content), name), 30, "the arrival at Ray's agent")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_aborts_its_request(http, endpoint, stream):
    wait_until(lambda: totals_of(http)["running"] == 0, 3, "quiet")
    before = totals_of(http)["generated_tokens"]
    body = {"model": MODEL, "prompt": [11, 12, 13], "max_tokens": 500, "temperature": 0, "stream": stream}
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=30 if stream else 0.15) as leaving:
        if stream:
            with leaving.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/v1/completions", json=body)
    wait_until(lambda: totals_of(http)["running"] == totals_of(http)["active"] == 0, 3, "the abort")
    time.sleep(0.6)  # a heartbeat, so that the counter is the last one
    assert 0 < totals_of(http)["generated_tokens"] - before < 450
