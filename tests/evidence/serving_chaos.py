"""Evidence that serving survives what ends its parts, under steady load of streams and whole answers.

    python tests/evidence/serving_chaos.py [--part replica --part ...] [--seed N] [--clients 10]

A real Serve, a tiny random model, the `openai` client: without its retries, but with them where an ingress or the proxy
is what dies. One after the other:

    replica      kill -9 of the busiest engine replica
    controller   kill -9 of Serve's controller; after that, scaling still works
    scale        2 → 4 → 1 → 2 replicas
    swap         other weights in place, twelve times, and then; a replica killed afterwards comes back with the new
                 ones; Serve's controller killed in the middle of a swap; a replica killed in the middle of a swap
    one          a swap with a single replica: requests wait
    ingress      kill -9 of one of two ingress processes
    proxy        kill -9 of Serve's HTTP proxy

Every answer is compared with what one engine alone gives (greedy, for the weights of either generation). No request
that is not a stream may be lost. Streams may break only where the process that was killed served them, after their
first token, and with an error event, unless it is the ingress or the proxy that dies: then nobody is left to send one.
After each part the router's index must hold just what the replicas' caches hold. Prints the counts; exits with 1 when a
claim fails.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import httpx  # noqa: E402
import openai  # noqa: E402
import torch  # noqa: E402
from ray.util.state import list_actors  # noqa: E402

from cluster.serve import control  # noqa: E402
from cluster.serve.errors import ServeError  # noqa: E402
from cluster.serve.settings import AppArgs  # noqa: E402
from llama.engine import Engine, EngineConfig, SamplingParams  # noqa: E402
from llama.hf import load_pretrained  # noqa: E402
from llama.tokenizer import Tokenizer  # noqa: E402
from tests.cluster.serve.local_ray import local_ray  # noqa: E402
from tests.cluster.serve.tiny_model import save_tiny_model  # noqa: E402
from tests.conftest import find_free_port  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402

MODEL, MAX_TOKENS, PROMPTS = "tiny", 80, 16
ENGINE = EngineConfig(num_blocks=512, max_batched_tokens=128, max_running=8)


@dataclass
class Outcome:
    """One request. `answer`: None when it failed; `error`: how; `pieces`: of a stream, before it broke."""

    stream: bool
    began: float
    prompt: int
    ended: float = 0.0
    answer: str | None = None
    error: str | None = None
    event: bool = False
    pieces: int = 0
    replica: str | None = None


@dataclass
class Load:
    """Clients that ask one question after the other until they are told to stop."""

    url: str
    prompts: list[list[int]]
    clients: int
    retries: int
    outcomes: list[Outcome] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        for number in range(self.clients):
            thread = threading.Thread(target=self._ask_on, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)

    @property
    def hanging(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def _ask_on(self, number: int) -> None:
        draw = random.Random(number)
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=self.retries) as client:
            while not self._stop.is_set():
                outcome = Outcome(number % 2 == 0, time.monotonic(), draw.randrange(len(self.prompts)))
                try:
                    (self._stream if outcome.stream else self._whole)(client, outcome)
                except openai.APIError as error:
                    outcome.answer, outcome.error = None, f"{type(error).__name__} {error.code or ''}".strip()
                    outcome.event = type(error) is openai.APIError  # what the client raises for an error in a stream
                except httpx.HTTPError as error:
                    outcome.answer, outcome.error = None, type(error).__name__
                outcome.ended = time.monotonic()
                self.outcomes.append(outcome)

    def _whole(self, client: openai.OpenAI, outcome: Outcome) -> None:
        prompt = self.prompts[outcome.prompt]
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0)
        outcome.answer, outcome.replica = answer.choices[0].text, answer.caravan["replica"]  # type: ignore[attr-defined]

    def _stream(self, client: openai.OpenAI, outcome: Outcome) -> None:
        prompt = self.prompts[outcome.prompt]
        with client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, stream=True
        ) as stream:
            outcome.replica = stream.response.headers["x-caravan-replica"]
            texts, finished = [], False
            for piece in stream:
                outcome.pieces += 1
                texts.append(piece.choices[0].text)
                finished = finished or piece.choices[0].finish_reason is not None
        if finished:
            outcome.answer = "".join(texts)
        else:
            outcome.error = "ended early"


@dataclass
class Ground:
    """A deployment, its load's expected answers, and what kills its parts."""

    dashboard_url: str
    endpoint: control.Endpoint
    models: list[str]
    prompts: list[list[int]]
    expected: dict[str, list[str]]
    claims: Claims
    clients: int

    def replicas(self) -> dict[str, dict[str, Any]]:
        with httpx.Client(trust_env=False, timeout=10) as http:
            answer = http.get(f"{self.endpoint.url}/caravan/replicas").raise_for_status().json()
        return {entry["replica"]: entry for entry in answer["replicas"]}

    def details(self) -> dict[str, Any]:
        return control._connect(self.dashboard_url).details()

    def wait_for(self, replicas: int, timeout_s: float = 60.0) -> float:
        """Until as many are followed, and Serve says the application runs; returns the seconds."""
        began = time.monotonic()
        while True:
            try:
                seen = self.replicas()
                app = self.details()["applications"]["caravan"]
                states = [replica.state for replica in control.replicas_of(app)]
                followed = len(seen) == replicas and all(entry["fresh"] for entry in seen.values())
                if followed and app["status"] == "RUNNING" and states == ["RUNNING"] * replicas:
                    return time.monotonic() - began
            except (httpx.HTTPError, ServeError, KeyError):
                pass
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"not {replicas} replicas after {timeout_s:.0f} s: {states}")
            time.sleep(0.1)

    def kill_replica(self) -> str:
        victim = max(self.replicas().values(), key=lambda entry: entry["active_requests"])
        os.kill(victim["info"]["pid"], signal.SIGKILL)
        return victim["replica"]

    def kill_controller(self) -> None:
        (actor,) = list_actors(
            address=self.dashboard_url, filters=[("class_name", "=", "ServeController"), ("state", "=", "ALIVE")]
        )
        os.kill(actor.pid, signal.SIGKILL)

    def kill_ingress(self) -> None:
        ingresses = self.details()["applications"]["caravan"]["deployments"]["ingress"]["replicas"]
        os.kill(ingresses[0]["pid"], signal.SIGKILL)

    def kill_proxy(self) -> None:
        (actor,) = list_actors(
            address=self.dashboard_url, filters=[("class_name", "=", "ProxyActor"), ("state", "=", "ALIVE")]
        )
        os.kill(actor.pid, signal.SIGKILL)

    @contextmanager
    def under_load(self, part: str, generations: list[str], *, headless: bool = False) -> Iterator[Phase]:
        """Runs the body under load and judges what came of it. `headless`: what is killed is what would tell, and the
        clients ask again."""
        phase = Phase()
        retries = openai.DEFAULT_MAX_RETRIES if headless else 0
        with Load(self.endpoint.url, self.prompts, self.clients, retries) as load:
            time.sleep(2)
            yield phase
            time.sleep(2)
        self._judge(part, load, phase, generations, headless)

    def _judge(self, part: str, load: Load, phase: Phase, generations: list[str], headless: bool) -> None:
        outcomes, check = load.outcomes, self.claims.check
        whole = [outcome for outcome in outcomes if not outcome.stream]
        streams = [outcome for outcome in outcomes if outcome.stream]
        lost = Counter(outcome.error for outcome in whole if outcome.answer is None)
        broken = [outcome for outcome in streams if outcome.answer is None]
        stray = [o for o in broken if not headless and (o.replica not in phase.victims or not o.pieces or not o.event)]
        late = [o for o in broken if headless and not any(abs(o.ended - at) < 5 for at in phase.kills)]
        wrong = [
            o
            for o in outcomes
            if o.answer is not None and o.answer not in {self.expected[model][o.prompt] for model in generations}
        ]
        slowest = max((outcome.ended - outcome.began for outcome in outcomes), default=0.0)
        check(f"{part}: whole answers lost", f"{dict(lost) or 0} of {len(whole)}", not lost and bool(whole))
        how = dict(Counter(outcome.error for outcome in broken))
        check(f"{part}: streams broken where they should not be", f"{len(stray) + len(late)}", not stray and not late)
        check(f"{part}: answers unlike a single engine's", f"{len(wrong)} of {len(outcomes)}", not wrong)
        check(f"{part}: clients that hang", load.hanging, not load.hanging)
        print(f"      {part}: {len(broken)} of {len(streams)} streams broken {how or ''}; slowest {slowest:.1f} s")
        if phase.updated_at is not None:
            old = [
                o
                for o in outcomes
                if o.began > phase.updated_at and o.answer not in (None, self.expected[generations[-1]][o.prompt])
            ]
            check(f"{part}: old answers after the update", len(old), not old)
        for outcome in (stray + late)[:5]:
            print(f"      {outcome}")


@dataclass
class Phase:
    """What the body of a part did: the replicas it killed, when it killed, when the last update was over."""

    victims: set[str] = field(default_factory=set)
    kills: list[float] = field(default_factory=list)
    updated_at: float | None = None


def replica(ground: Ground) -> None:
    with ground.under_load("replica", ground.models[:1]) as phase:
        for _ in range(2):
            phase.victims.add(ground.kill_replica())
            time.sleep(1)
            print(f"      replica: two again after {1 + ground.wait_for(2):.1f} s", flush=True)


def controller(ground: Ground) -> None:
    before = {entry["info"]["pid"] for entry in ground.replicas().values()}
    with ground.under_load("controller", ground.models[:1]):
        ground.kill_controller()
        time.sleep(1)
        print(f"      controller: back after {1 + ground.wait_for(2):.1f} s", flush=True)
        after = {entry["info"]["pid"] for entry in ground.replicas().values()}
        ground.claims.check("controller: the replicas are the same processes", len(after & before), after == before)
        control.scale(3, dashboard_url=ground.dashboard_url)
        ground.kill_controller()
        time.sleep(1)
        ground.wait_for(3)
        ground.claims.check("controller: the number that was scaled to outlives it", 3, True)
        control.scale(2, dashboard_url=ground.dashboard_url)


def scale(ground: Ground) -> None:
    with ground.under_load("scale", ground.models[:1]):
        for replicas in (4, 1, 2):
            began = time.monotonic()
            control.scale(replicas, dashboard_url=ground.dashboard_url)
            print(f"      scale: {replicas} after {time.monotonic() - began:.1f} s", flush=True)


def swap(ground: Ground) -> None:
    old, new = ground.models
    with ground.under_load("twelve swaps", [old, new, old]) as phase:
        for _ in range(6):
            _update(ground, phase, new)
            _update(ground, phase, old)
    with ground.under_load("swap", [old, new]) as phase:
        before = {entry["info"]["pid"] for entry in ground.replicas().values()}
        _update(ground, phase, new)
        after = {entry["info"]["pid"] for entry in ground.replicas().values()}
        ground.claims.check("swap: the replicas are the same processes", len(after & before), after == before)
    with ground.under_load("swapped, a replica killed, then three", [new]) as phase:
        phase.victims.add(ground.kill_replica())
        time.sleep(1)
        ground.wait_for(2)
        control.scale(3, dashboard_url=ground.dashboard_url)
    with ground.under_load("swap, the controller killed", [new, old]) as phase:
        _update(ground, phase, old, ground.kill_controller)
    with ground.under_load("swap, a replica killed", [old, new]) as phase:
        _update(ground, phase, new, lambda: phase.victims.add(ground.kill_replica()))
    with ground.under_load("swap back", [new, old]) as phase:
        _update(ground, phase, old)
    control.scale(2, dashboard_url=ground.dashboard_url)


def one(ground: Ground) -> None:
    old, new = ground.models
    control.scale(1, dashboard_url=ground.dashboard_url)
    with ground.under_load("one replica, swap", [old, new]) as phase:
        _update(ground, phase, new)
    with ground.under_load("one replica, swap back", [new, old]) as phase:
        _update(ground, phase, old)
    control.scale(2, dashboard_url=ground.dashboard_url)


def _update(ground: Ground, phase: Phase, model: str, disturb: Callable[[], object] | None = None) -> None:
    began = time.monotonic()
    if disturb is not None:
        threading.Timer(0.6, disturb).start()
    while True:
        try:
            control.update(model, dashboard_url=ground.dashboard_url, timeout_s=90)
            break
        except ServeError as error:
            if disturb is None or time.monotonic() - began > 90:
                raise
            print(f"      update: {error}; once more", flush=True)
            time.sleep(1)
    phase.updated_at = time.monotonic()
    print(f"      update: {phase.updated_at - began:.1f} s", flush=True)


def ingress(ground: Ground) -> None:
    with ground.under_load("ingress", ground.models[:1], headless=True) as phase:
        for _ in range(2):
            phase.kills.append(time.monotonic())
            ground.kill_ingress()
            time.sleep(6)
        ground.wait_for(2)


def proxy(ground: Ground) -> None:
    with ground.under_load("proxy", ground.models[:1], headless=True) as phase:
        phase.kills.append(time.monotonic())
        ground.kill_proxy()
        time.sleep(6)
        print(f"      proxy: back after {6 + ground.wait_for(2):.1f} s", flush=True)


def index(ground: Ground) -> None:
    """Every ingress process's index beside what the replicas have cached; several looks, for it is not said who
    answers."""
    time.sleep(1)
    blocks, wrong, looks = 0, 0, 0
    with httpx.Client(trust_env=False, timeout=10) as http:
        for name in ground.replicas():
            for _ in range(6):
                url = f"{ground.endpoint.url}/caravan/replicas/{name}/cache"
                found = http.get(url, headers={"Connection": "close"}).raise_for_status().json()
                looks, blocks = looks + 1, max(blocks, found["blocks"])
                wrong += found["missing"] + found["stale"]
    ground.claims.check("index: blocks missing or stale", f"{wrong} in {looks} looks, up to {blocks} blocks", not wrong)


PARTS: dict[str, Callable[[Ground], None]] = {
    "replica": replica,
    "controller": controller,
    "scale": scale,
    "swap": swap,
    "one": one,
    "ingress": ingress,
    "proxy": proxy,
}


def expected_answers(model: str, prompts: list[list[int]]) -> list[str]:
    """By one engine alone, one prompt at a time."""
    torch.set_num_threads(1)
    engine = Engine(load_pretrained(model), Tokenizer.load(model), ENGINE)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    return [engine.generate([prompt], params)[0].text for prompt in prompts]


def prepared(
    folder: Path, draw: random.Random, claims: Claims
) -> tuple[list[str], list[list[int]], dict[str, list[str]]]:
    """Two models, prompts, and what each model answers to them."""
    # Some begin alike, so that caches are of use, and a stale block would show in an answer.
    shared = [draw.randrange(10, 300) for _ in range(48)]
    prompts = [
        shared[: draw.choice([0, 16, 48])] + [draw.randrange(10, 300) for _ in range(draw.randrange(5, 60))]
        for _ in range(PROMPTS)
    ]
    models = [str(save_tiny_model(folder / name, seed)) for seed, name in enumerate(("old", "new"))]
    expected = {model: expected_answers(model, prompts) for model in models}
    differing = sum(old != new for old, new in zip(*expected.values(), strict=True))
    claims.check("prompts that the two generations answer differently", differing, differing >= PROMPTS - 2)
    return models, prompts, expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    claims = Claims()
    with tempfile.TemporaryDirectory(prefix="caravan-chaos-") as folder:
        models, prompts, expected = prepared(Path(folder), random.Random(arguments.seed), claims)
        (Path(folder) / "cwd").mkdir()
        with local_ray(Path(folder) / "cwd", num_cpus=4) as dashboard_url:
            args = AppArgs(model=models[0], served_name=MODEL, cpus_per_replica=0.25, engine=ENGINE, ingresses=2)
            endpoint = control.deploy(
                args,
                replicas=2,
                dashboard_url=dashboard_url,
                runtime_env=control.shipped_runtime_env(),
                port=find_free_port(),
            )
            ground = Ground(dashboard_url, endpoint, models, prompts, expected, claims, arguments.clients)
            for name in arguments.part or PARTS:
                began = time.monotonic()
                PARTS[name](ground)
                index(ground)
                print(f"      {name}: {time.monotonic() - began:.0f} s in all", flush=True)
            control.undeploy(dashboard_url=dashboard_url)
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
