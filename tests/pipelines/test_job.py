"""The main job from outside, on one cluster: commands, kills, resume, an S3 store, serving and scaling.

Every step is what a user types; what happened is read from the store, from `--json` and from the process table.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from cluster import processes
from cluster.artifact import Artifact
from cluster.storage import Store
from llama.hf import load_pretrained
from tests.conftest import find_free_port
from tests.pipelines.commands import type_here
from tests.swift import Swift

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 120
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"sources": [{"uri": ""}], "validation_fraction": 0.1, "min_document_chars": 8},
    "tokenizer": {"vocab_size": 320},
    "model": {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 256,  # the conversations of the deploy stage outgrow it
        "moe": {"num_experts": 4, "num_shared_experts": 1, "expert_hidden_dim": 16},
    },
    "train": {
        "workers": 2,
        "parallel": {"ep": 2},
        "steps": STEPS,
        "global_batch": 4,
        "micro_batch": 2,
        "seq_len": 32,
        "checkpoint_every": 30,
        "log_every": 5,
    },
    "evaluate": {"prompts": ["def "], "sample_tokens": 4},
    "serve": {"replicas": 2, "cpus_per_replica": 0.3, "engine": {"num_blocks": 64}},
}


@dataclass
class Workplace:
    """A user's folder with a recipe, and a cluster that `caravan up` started."""

    home: Path
    recipe: Path
    environment: dict[str, str]

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=REPOSITORY, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *arguments: object) -> str:
        """Runs a command that must succeed; returns its output."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        return out

    def ask(self, *arguments: object, code: int = 0) -> str:
        return type_here(self.home, *arguments, code=code)

    def head_pid(self) -> int:
        return json.loads((self.home / "cluster.json").read_text())["pid"]

    def training_workers(self) -> list[int]:
        """Processes of the cluster in which a training worker lives."""
        head = processes.find(self.head_pid())
        assert head is not None
        members = ((member.pid, " ".join(member.cmdline())) for member in processes.tree(head))
        return [pid for pid, command in members if "RayTrainWorker" in command]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, swift: Swift) -> Iterator[Workplace]:
    del swift  # its credentials are in the environment now, and so in the cluster's
    folder = tmp_path_factory.mktemp("job")
    rng = random.Random(0)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(60):
        names = [f"{rng.choice('abcdefgh')}{rng.randrange(30)}" for _ in range(12)]
        lines = (f"def {a}({b}):\n    return {b} + {number}\n" for a in names for b in names[:3])
        (corpus / f"{number}.txt").write_text("\n".join(lines))
    recipe = {**RECIPE, "data": {**RECIPE["data"], "sources": [{"uri": str(corpus)}]}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "CARAVAN_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon Ray Train sees that workers began, ended or died
    }
    place = Workplace(folder / "home", path, environment)
    place.run("up", "--num-cpus", 2, "--no-service")
    head = processes.find(place.head_pid())
    try:
        yield place
    finally:
        members = processes.tree(head)
        place.run("down")
        assert processes.await_end(members, grace=10) == 0, "the cluster left processes behind"


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail(f"waited {seconds} s for {what}")


def pretrain_folder(store: Store) -> Store:
    keys = {path.split("/")[0] for path in store.child("artifacts", "pretrain").list()}
    assert len(keys) == 1, keys
    return store.child("artifacts", "pretrain", keys.pop())


def committed_steps(store: Store) -> list[int]:
    paths = store.child("artifacts", "pretrain").list()
    return sorted(int(found[1]) for path in paths if (found := re.search(r"/step-(\d+)/manifest\.json$", path)))


def incarnations(store: Store) -> list[dict[str, Any]]:
    folder = pretrain_folder(store)
    return [folder.read_json(path) for path in folder.list("incarnations")]


def checked_curve(store: Store) -> None:
    """Every part of the metrics belongs to a run that ended at the last step, and the checkpoints are whole."""
    assert max(committed_steps(store)) == STEPS
    folder = pretrain_folder(store)
    for step in committed_steps(store):
        Artifact(folder.child("checkpoints", f"step-{step:08d}")).verify()


@pytest.fixture(scope="module")
def port() -> int:
    return find_free_port()


@pytest.fixture(scope="module")
def finished(workplace: Workplace, port: int) -> dict[str, Any]:
    """A run whose driver was killed in the middle of training, and resumed until it serves. Its summary."""
    store = Store(workplace.home / "store")
    driver = workplace.start("run", workplace.recipe, "--run-id", "killed", "--set", f"serve.port={port}")
    wait_for(lambda: committed_steps(store), "the first checkpoint")
    members = [processes.find(pid) for pid in workplace.training_workers()]
    listening = processes.listeners([member for member in members if member is not None])
    driver.kill()
    driver.communicate()
    assert max(committed_steps(store)) < STEPS, "training ended before the kill; raise STEPS"
    summary = json.loads(workplace.run("resume", "killed", "--keep", "--json"))
    return {"summary": summary, "store": store, "listening": listening}


def test_nothing_of_a_training_listens_beyond_loopback(finished: dict[str, Any]) -> None:
    listening = finished["listening"]
    assert len({found.pid for found in listening}) == 2, "both workers have sockets"
    assert [str(found) for found in listening if not found.is_loopback] == []


def test_a_killed_driver_is_resumed_from_the_last_committed_checkpoint(finished: dict[str, Any]) -> None:
    summary, store = finished["summary"], finished["store"]
    starts = incarnations(store)
    assert [start["resumed_step"] > 0 for start in starts] == [False, True]
    assert 0 < summary["resumed_step"] == starts[1]["resumed_step"] < STEPS
    assert summary["tokens"] == STEPS * 4 * 32
    assert summary["stages"]["ingest"] == summary["stages"]["shards"] == "skipped"
    checked_curve(store)
    assert json.loads((Path(store.local_path("runs/killed/status.json") or "")).read_text())["state"] == "done"
    assert all(Path(plot).stat().st_size > 5000 for plot in summary["plots"])
    assert summary["bits_per_byte"] < summary["unigram_bits_per_byte"]


def test_the_export_is_the_same_model_in_transformers(finished: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    directory = finished["summary"]["model"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = load_pretrained(directory)
    tokens = torch.randint(320, (2, 40))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-4
    chat = transformers.AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [{"role": "user", "content": "def"}], add_generation_prompt=True, return_dict=False
    )
    assert chat[-1] == 5


def test_the_same_recipe_again_skips_everything_that_is_committed(
    workplace: Workplace, finished: dict[str, Any]
) -> None:
    summary = json.loads(workplace.run("run", workplace.recipe, "--until", "export", "--json"))
    assert set(summary["stages"].values()) == {"skipped"}
    assert summary["model"] == finished["summary"]["model"]


def test_scaling_the_kept_endpoint_keeps_processes_and_caches(workplace: Workplace, finished: dict[str, Any]) -> None:
    assert finished["summary"]["cached_tokens"] == finished["summary"]["predicted_cached_tokens"] > 0
    assert 4 < finished["summary"]["requests"] < 12, "conversations end where the context does"
    before = json.loads(workplace.ask("status", "--json"))
    assert before["state"] == "RUNNING"
    pids = {replica["pid"] for replica in before["replicas"]}
    assert len(pids) == 2
    prompt = {"model": "tiny", "prompt": "def a1(b2):\n    return b2 + 7\n" * 3, "max_tokens": 4, "temperature": 0}
    with httpx.Client(base_url=f"{before['endpoint']['url']}/v1", trust_env=False, timeout=60) as http:
        first = http.post("/completions", json=prompt).json()
        workplace.ask("scale", 3)
        again = http.post("/completions", json=prompt).json()
    after = json.loads(workplace.ask("status", "--json"))
    assert len(after["replicas"]) == 3
    assert pids < {replica["pid"] for replica in after["replicas"]}
    assert first["caravan"]["cached_tokens"] == 0
    assert again["caravan"]["cached_tokens"] == again["caravan"]["predicted_cached_tokens"] > 0
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


def test_deploy_and_undeploy_a_run(workplace: Workplace, finished: dict[str, Any], port: int) -> None:
    endpoint = json.loads(workplace.run("deploy", "killed", "--replicas", 2, "--port", port, "--json"))
    assert endpoint == {"url": finished["summary"]["url"], "served_name": "tiny"}
    assert len(json.loads(workplace.ask("status", "--json"))["replicas"]) == 2

    workplace.ask("undeploy")
    assert workplace.ask("status", code=1).splitlines()[-1].startswith("error: nothing is deployed")


def test_a_killed_worker_of_a_submitted_run_on_s3(workplace: Workplace, swift: Swift) -> None:
    """A real Ray job, its store on an S3 server: it trains, checkpoints, loses a worker and goes on by itself."""
    uri = swift.uri(swift.make_bucket(), "caravan")
    submitted = json.loads(
        workplace.run("submit", workplace.recipe, "--store", uri, "--until", "pretrain", "--run-id", "onS3", "--json")
    )
    assert submitted["run_id"] == "onS3"
    store = Store(uri)
    wait_for(lambda: committed_steps(store), "the first checkpoint on S3")
    os.kill(workplace.training_workers()[0], signal.SIGKILL)
    assert max(committed_steps(store)) < STEPS, "training ended before the kill; raise STEPS"
    log = workplace.run("logs", "onS3", "--follow")
    starts = incarnations(store)
    assert [start["resumed_step"] > 0 for start in starts] == [False, True]
    assert f"resumed from the checkpoint of step {starts[1]['resumed_step']}" in log
    assert store.read_json("runs/onS3/status.json")["state"] == "done"
    checked_curve(store)


def test_a_sweep_that_is_killed_goes_on_where_it_was(workplace: Workplace) -> None:
    one_by_one = {"train.workers": 1, "train.cpus_per_worker": 2}
    changes = {**one_by_one, "train.parallel.ep": 1, "train.steps": 8, "train.validate_every": 8}
    sweep = {"name": "norms", "recipe": str(workplace.recipe), "set": changes, "seeds": [0]}
    sweep |= {"grid": {"model.norm": ["rmsnorm", "layernorm"]}}
    path = workplace.recipe.with_name("sweep.yaml")
    path.write_text(yaml.safe_dump(sweep))
    store = Store(workplace.home / "store")  # where the data is, if another test has run

    def trained() -> dict[str, Any]:
        keys = {path.split("/")[0] for path in store.child("artifacts", "pretrain").list()}
        manifests = {key: Artifact(store.child("artifacts", "pretrain", key)).manifest() for key in keys}
        return {key: manifest for key, manifest in manifests.items() if manifest is not None and key not in others}

    others: set[str] = set()
    others = set(trained())
    driver = workplace.start("sweep", path, "--run-id", "norms")
    wait_for(trained, "the first trial's end")
    driver.kill()
    driver.communicate()
    before = trained()
    figures = json.loads(workplace.run("resume", "norms", "--json"))
    after = trained()
    assert len(before) == 1 and len(after) == 2
    assert {key: after[key].attempt for key in before} == {key: each.attempt for key, each in before.items()}
    losses = {cell["cell"]: cell["measures"]["pretrain.val_loss"]["mean"] for cell in figures["cells"]}
    assert sorted(losses.values()) == sorted(manifest.metadata["val_loss"] for manifest in after.values())
    assert list(losses.values()) == sorted(losses.values()) and len(set(losses.values())) == 2
    report = (workplace.home / "store/runs/norms/sweep/report.md").read_text()
    assert all(f"| {cell} | {loss:.4f} |" in report for cell, loss in losses.items())
    settings = {**changes, "model.norm": "layernorm"}
    plain = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    plain += ["--until", "pretrain"]
    steps = json.loads(workplace.ask("run", workplace.recipe, *plain, "--dry-run", "--json"))
    assert {step["action"] for step in steps} == {"skip"}, "a plain run finds what the sweep has made"
