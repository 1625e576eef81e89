"""The life of an application on a local cluster: scaled, killed, given other weights, removed."""

import os
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from ray import serve

from cluster.serve import control
from cluster.serve.checks import check_port_free
from cluster.serve.errors import DeployFailed, NotDeployed, PortTaken, ServeError
from cluster.serve.replay.engines import ModelledSpec
from cluster.serve.replay.measure import summary
from cluster.serve.replay.modelled_engine import MODELLED_WEIGHTS
from cluster.serve.replay.on_serve import Live, replay_together
from cluster.serve.replay.policies import variants
from cluster.serve.replay.trace import TOKENS_PER_ID, SyntheticTrace, make_trace, scaled
from cluster.serve.weights import AnotherModel
from tests.cluster.serve.served import pids_of, replicas_of, totals_of, wait_until
from tests.cluster.serve.tiny_model import save_tiny_model
from tests.conftest import find_free_port

pytestmark = pytest.mark.integration

MODEL = "tiny"


def test_deploying_the_same_again_and_scaling_keep_processes_and_caches(cluster, args, endpoint, client, http):
    before, pids = replicas_of(http), pids_of(http)
    port = int(endpoint.url.rsplit(":", 1)[1])
    control.deploy(args, replicas=2, dashboard_url=cluster, runtime_env=control.shipped_runtime_env(), port=port)
    assert pids_of(http) == pids
    with pytest.raises(ServeError, match=f"deployed at {endpoint.url} already"):
        control.check_can_deploy(cluster, port, replace=False)
    control.check_can_deploy(cluster, port, replace=True)
    with pytest.raises(PortTaken, match="Serve already listens"):
        control.deploy(args, replicas=2, dashboard_url=cluster, port=find_free_port())

    control.scale(3, dashboard_url=cluster)
    after = replicas_of(http)
    assert len(after) == 3 and len(set(pids_of(http).values())) == 3
    assert pids.items() <= pids_of(http).items()
    for replica in before:
        assert after[replica]["cached_blocks"] == before[replica]["cached_blocks"]
    status = control.status(dashboard_url=cluster)
    assert status.state == "RUNNING" and status.endpoint == endpoint
    assert {replica.pid for replica in status.replicas} == set(pids_of(http).values())

    def stream(number: int) -> str | None:
        prompt = [70 + number] * 40
        return (
            list(client.completions.create(model=MODEL, prompt=prompt, max_tokens=150, stream=True))[-1]
            .choices[0]
            .finish_reason
        )

    with ThreadPoolExecutor(9) as pool:
        streams = [pool.submit(stream, number) for number in range(9)]
        wait_until(lambda: all(entry["active_requests"] for entry in replicas_of(http).values()), 5, "streams on all")
        started = time.monotonic()
        control.scale(2, dashboard_url=cluster)
        assert time.monotonic() - started < 15  # our subscription does not hold up the draining replica
        assert {future.result() for future in streams} <= {"length", "stop"}
    assert pids_of(http) == pids


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
        wait_until(lambda: max(entry["active_requests"] for entry in replicas_of(http).values()) >= 9, 5, "the load")
        victim = max(replicas_of(http).values(), key=lambda entry: entry["active_requests"])["replica"]
        os.kill(pids_of(http)[victim], signal.SIGKILL)
        done, pending = wait(completions + streams, timeout=30)
    assert not pending
    assert {future.result() for future in completions} <= {"length", "stop"}
    outcomes = Counter(future.result() for future in streams)
    assert set(outcomes) <= {"length", "stop", "error event: replica_lost"}
    assert outcomes["error event: replica_lost"] <= 4  # no more than were running there
    wait_until(lambda: victim not in replicas_of(http), 10, "the victim's departure")
    assert totals_of(http)["active"] == 0


def test_numbers_and_options_change_while_processes_run(cluster, args, endpoint, http):
    wait_until(lambda: len(pids_of(http)) == 2, 30, "a replica in the place of the killed one")
    pids, port = pids_of(http), int(endpoint.url.rsplit(":", 1)[1])
    options = {"ingresses": 2, "cors_origins": ("https://chat.example.org",), "min_replicas": 2, "max_replicas": 3}
    environment = control.shipped_runtime_env()
    control.deploy(args.model_copy(update=options), dashboard_url=cluster, runtime_env=environment, port=port)
    assert pids_of(http) == pids and control.status(dashboard_url=cluster).autoscaling == (2, 3)
    allowed = http.get("/ready", headers={"Origin": "https://chat.example.org"}).headers
    assert allowed["access-control-allow-origin"] == "https://chat.example.org"

    def running() -> set[int | None]:
        return {replica.pid for replica in control.status(dashboard_url=cluster).replicas if replica.state == "RUNNING"}

    def one_is_taken_away() -> bool:
        control._connect(cluster).scale("caravan", "engine", 1)
        return not set(pids.values()) <= running()

    # Asked until it happens: the autoscaler may put the number back before Serve has seen it.
    wait_until(one_is_taken_away, 20, "a replica's departure")
    # With no load at all, the autoscaler sees that there are as many as must be.
    wait_until(lambda: len(running()) == 2, 20, "the least number")
    assert control.scale(2, dashboard_url=cluster)
    assert control.status(dashboard_url=cluster).autoscaling is None
    assert not control.scale(2, dashboard_url=cluster)
    assert len(pids.items() & pids_of(http).items()) == 1


def test_weights_are_exchanged_while_requests_are_answered(cluster, args, endpoint, client, http, tmp_path):
    new = str(save_tiny_model(tmp_path / "new", seed=7))
    pids, over = pids_of(http), threading.Event()

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
    assert pids_of(http) == pids and old_text != new_text
    assert set(texts) == {old_text, new_text}
    assert {ask() for _ in range(4)} == {new_text}
    assert control.status(dashboard_url=cluster).model == new

    os.kill(next(iter(pids.values())), signal.SIGKILL)
    wait_until(lambda: len(set(pids_of(http).values()) - set(pids.values())) == 1, 30, "a replica in its place")
    assert {entry["info"]["model"] for entry in replicas_of(http).values()} == {new}
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
            wait_until(lambda: answers["other"] or asking[1].done(), 5, "an answer")
        finally:
            deployed.set()
        for future in asking:
            future.result()
    assert len(answers[MODEL]) == len(answers["other"]) == 1 and answers[MODEL] != answers["other"]
    assert set(statuses) <= {200, 404, 503}


def test_removing_the_application_leaves_nothing(cluster, endpoint, http):
    pids = list(pids_of(http).values())
    control.undeploy(dashboard_url=cluster)
    control.undeploy(dashboard_url=cluster)
    with pytest.raises(NotDeployed):
        control.status(dashboard_url=cluster)
    with pytest.raises(NotDeployed):
        control.scale(1, dashboard_url=cluster)
    port = int(endpoint.url.rsplit(":", 1)[1])
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10, "the replicas' end")
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
