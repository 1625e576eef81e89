"""The whole of serving on a local cluster: one Ray, one application, the real `openai` client."""

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import ray
from ray import serve

from cluster import processes
from cluster.serve import control
from cluster.serve.checks import check_port_free
from cluster.serve.errors import DeployFailed, NotDeployed, PortTaken, ServeError
from cluster.serve.replay.engines import ModelledSpec
from cluster.serve.replay.measure import summary
from cluster.serve.replay.modelled_engine import MODELLED_WEIGHTS
from cluster.serve.replay.on_serve import Live, replay_together
from cluster.serve.replay.policies import variants
from cluster.serve.replay.trace import TOKENS_PER_ID, SyntheticTrace, make_trace, scaled
from cluster.serve.request_body import MAX_BODY_BYTES
from cluster.serve.settings import AppArgs
from cluster.serve.view import Endpoint
from cluster.serve.weights import AnotherModel
from cluster.session import ray_processes
from tests.cluster.serve.local_ray import local_ray
from tests.cluster.serve.test_metrics import _samples, _total, _value
from tests.cluster.serve.tiny_model import save_tiny_model
from tests.conftest import find_free_port

pytestmark = pytest.mark.integration

MODEL = "tiny"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    with local_ray(tmp_path_factory.mktemp("serving")) as dashboard_url:
        yield dashboard_url


@pytest.fixture(scope="module")
def args(cluster, tmp_path_factory) -> AppArgs:
    return AppArgs(
        model=str(save_tiny_model(tmp_path_factory.mktemp("model"))),
        served_name=MODEL,
        cpus_per_replica=0.1,
        gpus_per_replica=0.5,
        accelerator_type="T4",
        engine={"num_blocks": 512, "max_batched_tokens": 64, "max_running": 4},
    )


@pytest.fixture(scope="module")
def endpoint(cluster, args) -> Endpoint:
    return control.deploy(
        args, replicas=2, dashboard_url=cluster, runtime_env=control.shipped_runtime_env(), port=find_free_port()
    )


@pytest.fixture(scope="module")
def client(endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(endpoint) -> Iterator[httpx.Client]:
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=30, headers=headers) as http:
        yield http


def _replicas(http: httpx.Client) -> dict[str, dict]:
    return {entry["replica"]: entry for entry in http.get("/caravan/replicas").raise_for_status().json()["replicas"]}


def _pids(http: httpx.Client) -> dict[str, int]:
    return {replica: entry["info"]["pid"] for replica, entry in _replicas(http).items() if entry["info"]}


def _wait_until(condition, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.05)


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
    assert _replicas(http)[flushed]["cached_blocks"] > 0
    started = time.monotonic()
    answer = http.post(f"/caravan/replicas/{flushed}/flush").raise_for_status().json()
    assert answer["applied"]
    assert _replicas(http)[flushed]["cached_blocks"] == 0
    assert time.monotonic() - started < 1
    conversations[0].turn(client)
    kept.turn(client)
    last = conversations[0].reports[-1]
    assert last["predicted_cached_tokens"] == last["cached_tokens"] == 0
    last = kept.reports[-1]
    assert last["predicted_cached_tokens"] == last["cached_tokens"] > 0


def test_the_index_holds_what_the_replicas_have_cached(conversations, http):
    for replica, entry in _replicas(http).items():
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
    assert set(_pids(http).values()) <= {listener.pid for listener in found}
    assert [listener for listener in found if not listener.is_loopback] == []


def test_models_and_readiness(client, http):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert http.get("/health").raise_for_status().json() == {"status": "ok"}
    ready = http.get("/ready").raise_for_status().json()
    assert ready["ready"] and {entry["replica"] for entry in ready["replicas"]} == set(_replicas(http))
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
    replica = next(iter(_replicas(http)))
    response = http.post(path.format(replica), content=b"{}", headers={"Content-Type": "text/plain"})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens"):
        client.completions.create(model=MODEL, prompt=[9] * 600)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def _totals(http: httpx.Client) -> Counter:
    totals: Counter = Counter()
    for entry in _replicas(http).values():
        load = entry["load"] or {}  # a replica that has just come has not told it yet
        totals.update({**load, "active": entry["active_requests"]})
    return totals


def test_a_request_is_found_by_its_id_with_its_scores_and_times(client, http):
    for cached in (0, 48):  # of 64 tokens the last is computed always, and so its block
        answer = client.completions.create(model=MODEL, prompt=list(range(30, 94)), max_tokens=6)
        (record,) = http.get(f"/caravan/requests/{answer.id}").raise_for_status().json()["requests"]
        assert record["predicted_cached_tokens"] == record["cached_tokens"] == cached
        assert record["generated_tokens"] == record["steps"] == answer.usage.completion_tokens
        assert 0 <= record["queue_s"] <= record["first_token_s"] <= record["end_s"] < 60
        assert record["attempts"][0]["scores"][0]["replica"] == record["replica"]
        assert {score["replica"] for score in record["attempts"][0]["scores"]} == set(_replicas(http))


def test_metrics_show_at_the_ingress_and_at_rays_agent(conversations, http):
    found = _samples(http.get("/metrics").raise_for_status().content)
    ended, cached = _value(found, "caravan_requests_total"), _value(found, "caravan_cached_tokens_total")
    assert ended >= 60 and 0 < cached == _value(found, "caravan_predicted_cached_tokens_total")
    assert 0 <= max(value for key, value in found.items() if key[0] == "caravan_index_lag_seconds") < 10
    node, name = ray.nodes()[0], "ray_caravan_requests_total"
    agent = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    _wait_until(lambda: ended <= _total(_samples(http.get(agent).content), name), 30, "the arrival at Ray's agent")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_aborts_its_request(http, endpoint, stream):
    _wait_until(lambda: _totals(http)["running"] == 0, 3, "quiet")
    before = _totals(http)["generated_tokens"]
    body = {"model": MODEL, "prompt": [11, 12, 13], "max_tokens": 500, "temperature": 0, "stream": stream}
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=30 if stream else 0.15) as leaving:
        if stream:
            with leaving.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/v1/completions", json=body)
    _wait_until(lambda: _totals(http)["running"] == _totals(http)["active"] == 0, 3, "the abort")
    time.sleep(0.6)  # a heartbeat, so that the counter is the last one
    assert 0 < _totals(http)["generated_tokens"] - before < 450


def test_deploying_the_same_again_and_scaling_keep_processes_and_caches(cluster, args, endpoint, client, http):
    before, pids = _replicas(http), _pids(http)
    port = int(endpoint.url.rsplit(":", 1)[1])
    control.deploy(args, replicas=2, dashboard_url=cluster, runtime_env=control.shipped_runtime_env(), port=port)
    assert _pids(http) == pids
    with pytest.raises(ServeError, match=f"deployed at {endpoint.url} already"):
        control.check_can_deploy(cluster, port, replace=False)
    control.check_can_deploy(cluster, port, replace=True)
    with pytest.raises(PortTaken, match="Serve already listens"):
        control.deploy(args, replicas=2, dashboard_url=cluster, port=find_free_port())

    control.scale(3, dashboard_url=cluster)
    after = _replicas(http)
    assert len(after) == 3 and len(set(_pids(http).values())) == 3
    assert pids.items() <= _pids(http).items()
    for replica in before:
        assert after[replica]["cached_blocks"] == before[replica]["cached_blocks"]
    status = control.status(dashboard_url=cluster)
    assert status.state == "RUNNING" and status.endpoint == endpoint
    assert {replica.pid for replica in status.replicas} == set(_pids(http).values())

    def stream(number: int) -> str | None:
        prompt = [70 + number] * 40
        return (
            list(client.completions.create(model=MODEL, prompt=prompt, max_tokens=150, stream=True))[-1]
            .choices[0]
            .finish_reason
        )

    with ThreadPoolExecutor(9) as pool:
        streams = [pool.submit(stream, number) for number in range(9)]
        _wait_until(lambda: all(entry["active_requests"] for entry in _replicas(http).values()), 5, "streams on all")
        started = time.monotonic()
        control.scale(2, dashboard_url=cluster)
        assert time.monotonic() - started < 15  # our subscription does not hold up the draining replica
        assert {future.result() for future in streams} <= {"length", "stop"}
    assert _pids(http) == pids


def test_requests_on_a_killed_replica_are_served_by_another(client, http):
    def complete(number: int) -> str:
        prompt = [20 + number] * 200
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=200, temperature=0)
        return answer.choices[0].finish_reason

    def stream(number: int) -> str:
        prompt = [60 + number] * 200
        try:
            pieces = list(client.completions.create(model=MODEL, prompt=prompt, max_tokens=200, stream=True))
        except openai.APIError as error:
            return f"error event: {error.code}"
        return pieces[-1].choices[0].finish_reason

    with ThreadPoolExecutor(24) as pool:
        completions = [pool.submit(complete, n) for n in range(16)]
        streams = [pool.submit(stream, n) for n in range(8)]
        # Nine: more than there are streams, so completions are among them; and four run, so others wait.
        _wait_until(lambda: max(entry["active_requests"] for entry in _replicas(http).values()) >= 9, 5, "the load")
        victim = max(_replicas(http).values(), key=lambda entry: entry["active_requests"])["replica"]
        os.kill(_pids(http)[victim], signal.SIGKILL)
        done, pending = wait(completions + streams, timeout=30)
    assert not pending
    assert {future.result() for future in completions} <= {"length", "stop"}
    outcomes = Counter(future.result() for future in streams)
    assert set(outcomes) <= {"length", "stop", "error event: replica_lost"}
    assert outcomes["error event: replica_lost"] <= 4  # no more than were running there
    _wait_until(lambda: victim not in _replicas(http), 10, "the victim's departure")
    assert _totals(http)["active"] == 0


def test_numbers_and_options_change_while_processes_run(cluster, args, endpoint, http):
    _wait_until(lambda: len(_pids(http)) == 2, 30, "a replica in the place of the killed one")
    pids, port = _pids(http), int(endpoint.url.rsplit(":", 1)[1])
    options = {"ingresses": 2, "cors_origins": ("https://chat.example.org",), "min_replicas": 2, "max_replicas": 3}
    environment = control.shipped_runtime_env()
    control.deploy(args.model_copy(update=options), dashboard_url=cluster, runtime_env=environment, port=port)
    assert _pids(http) == pids and control.status(dashboard_url=cluster).autoscaling == (2, 3)
    allowed = http.get("/ready", headers={"Origin": "https://chat.example.org"}).headers
    assert allowed["access-control-allow-origin"] == "https://chat.example.org"
    # Somebody takes one away; the autoscaler, with no load at all, sees that there are as many as must be.
    control._connect(cluster).scale("caravan", "engine", 1)
    _wait_until(lambda: len(control.status(dashboard_url=cluster).replicas) == 2, 20, "the least number")
    assert control.scale(2, dashboard_url=cluster)
    assert control.status(dashboard_url=cluster).autoscaling is None
    assert not control.scale(2, dashboard_url=cluster)
    assert len(pids.items() & _pids(http).items()) == 1


def test_weights_are_exchanged_while_requests_are_answered(cluster, args, endpoint, client, http, tmp_path):
    new = str(save_tiny_model(tmp_path / "new", seed=7))
    pids, over = _pids(http), threading.Event()

    def ask() -> str:
        answer = client.completions.create(model=MODEL, prompt=[30, 31] * 20, max_tokens=20, temperature=0)
        return answer.choices[0].text

    def ask_on() -> list[str]:
        texts = []
        while not over.is_set():
            texts.append(ask())
        return texts

    old_text = ask()
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask_on) for _ in range(4)]
        try:
            control.update(new, dashboard_url=cluster)
            new_text = ask()
        finally:
            over.set()
        texts = [text for future in asking for text in future.result()]
    assert _pids(http) == pids and old_text != new_text
    assert set(texts) == {old_text, new_text}
    assert {ask() for _ in range(4)} == {new_text}
    assert control.status(dashboard_url=cluster).model == new

    os.kill(next(iter(pids.values())), signal.SIGKILL)
    _wait_until(lambda: len(set(_pids(http).values()) - set(pids.values())) == 1, 30, "a replica in its place")
    assert {entry["info"]["model"] for entry in _replicas(http).values()} == {new}
    assert {ask() for _ in range(4)} == {new_text}

    with pytest.raises(AnotherModel, match="another architecture.*without --update"):
        control.update(str(save_tiny_model(tmp_path / "wide", dim=32)), dashboard_url=cluster)
    control.update(args.model, dashboard_url=cluster)
    assert ask() == old_text


def test_while_another_model_is_deployed_no_model_answers_under_the_others_name(cluster, args, endpoint, tmp_path):
    other = args.model_copy(update={"model": str(save_tiny_model(tmp_path / "model", seed=1)), "served_name": "other"})
    answers: dict[str, set[str]] = {MODEL: set(), "other": set()}
    statuses: Counter = Counter()
    deployed = threading.Event()

    def ask(name: str) -> None:
        body = {"model": name, "prompt": [30, 31, 32], "max_tokens": 4, "temperature": 0}
        with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=30) as http:
            while not deployed.is_set():
                response = http.post("/v1/completions", json=body)
                statuses[response.status_code] += 1
                if response.status_code == 200:
                    answers[name].add(response.json()["choices"][0]["text"])
                time.sleep(0.1)

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, name) for name in answers]
        try:
            port = int(endpoint.url.rsplit(":", 1)[1])
            environment = control.shipped_runtime_env()
            control.deploy(other, replicas=2, dashboard_url=cluster, runtime_env=environment, port=port)
            _wait_until(lambda: answers["other"] or asking[1].done(), 5, "an answer")
        finally:
            deployed.set()
        for future in asking:
            future.result()
    assert len(answers[MODEL]) == len(answers["other"]) == 1 and answers[MODEL] != answers["other"]
    assert set(statuses) <= {200, 404, 503}


def test_removing_the_application_leaves_nothing(cluster, endpoint, http):
    pids = list(_pids(http).values())
    control.undeploy(dashboard_url=cluster)
    control.undeploy(dashboard_url=cluster)
    with pytest.raises(NotDeployed):
        control.status(dashboard_url=cluster)
    with pytest.raises(NotDeployed):
        control.scale(1, dashboard_url=cluster)
    port = int(endpoint.url.rsplit(":", 1)[1])
    _wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10, "the replicas' end")
    check_port_free("127.0.0.1", port)


def test_what_cannot_start_is_told_in_one_line_and_removed(cluster, args, tmp_path, monkeypatch):
    nowhere = args.model_copy(update={"model": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="nowhere"):
        control.deploy(nowhere, replicas=1, dashboard_url=cluster)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PortTaken):
            control.deploy(args, replicas=2, dashboard_url=cluster, port=other.getsockname()[1])
    # As on a cluster elsewhere, which alone can know that the model is not there.
    monkeypatch.setattr(control, "check_model", lambda uri: None)
    with pytest.raises(DeployFailed, match="nowhere is neither a Hugging Face directory") as caught:
        control.deploy(
            nowhere,
            replicas=1,
            dashboard_url=cluster,
            runtime_env=control.shipped_runtime_env(),
            port=find_free_port(),
        )
    assert "\n" not in str(caught.value)
    with pytest.raises(NotDeployed):
        control.status(dashboard_url=cluster)


def test_routing_policies_are_replayed_side_by_side(cluster):
    requests = scaled(make_trace(SyntheticTrace(requests=24, rate=12.0, concurrent=4, turn_tokens=1500)), 1.0)
    requests = [replace(request, output_tokens=5) for request in requests]
    live = Live(requests, 2, ModelledSpec(), MODELLED_WEIGHTS, TOKENS_PER_ID)
    contestants = [*variants("caravan"), *variants("prefix_affinity")[-1:]]
    replays = replay_together(contestants, live, lambda message: None)
    for replay in replays:
        figures = summary(replay, deadline_s=60.0)
        assert figures["requests"] == 24 and figures["rejects"] == 0 and figures["hit_rate"] > 0.2
        assert 0 < figures["ttft_mean"] < figures["e2e_mean"] and figures["pick_us_p50"] > 0
        assert len({outcome.replica for outcome in replay.outcomes}) == 2
    assert summary(replays[0], 60.0)["predicted_error"] < 0.05
    assert not [name for name in serve.status().applications if name.startswith("replay-")]
