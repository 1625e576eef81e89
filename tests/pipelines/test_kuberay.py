"""The manifests against KubeRay's fields, Ray's own reading of them, and what a shell makes of the script."""

import copy
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from cluster.placement import NodeResources, WorkerNeeds, WorldSizes, largest_plan
from cluster.serve.declaration import declared_args, declared_engine
from cluster.serve.settings import AppArgs
from pipelines import kuberay
from pipelines.cli import app
from pipelines.kuberay import KEYS_URI, ManifestError, Target
from pipelines.recipe import Recipe
from tests.pipelines.kuberay_schema import schema_of
from tests.pipelines.test_cli import RECIPE, run_cli

TARGET = Target(
    "tiny",
    "registry/caravan:1",
    "2.60.0",
    "ml",
    "store-keys",
    "ray-token",
    {"cloud/gpu": "h200"},
    worker_memory_gib=100,
)
NEEDS = WorkerNeeds(cpus=12, gpus=1, accelerator_type="H200")
STORE = "s3://bucket/a b?endpoint_override=minio:9000&scheme=http"
ARGS = AppArgs(model="s3://bucket/model", gpus_per_replica=1, api_keys=KEYS_URI, min_replicas=1, max_replicas=6)
GROUP = kuberay.training_group(WorldSizes.exactly(16, ep=4), NEEDS)
MADE = {
    "RayCluster": kuberay.ray_cluster(TARGET, GROUP),
    "RayJob": kuberay.ray_job(TARGET, GROUP, yaml.safe_dump(RECIPE), STORE, "export", 2),
    "RayService": kuberay.ray_service(TARGET, ARGS, 1, 8000, "api-keys"),
}


def spec_of(kind: str) -> dict[str, Any]:
    spec = MADE[kind][-1]["spec"]
    return spec if kind == "RayCluster" else spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def validator_of(kind: str) -> jsonschema.Draft202012Validator:
    """Once for all manifests: `jsonschema.validate` would check the schema itself again for each."""
    schema = schema_of(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


VALIDATORS = {kind: validator_of(kind) for kind in (*MADE, "ConfigMap")}


def check(manifest: dict[str, Any], kind: str | None = None) -> None:
    VALIDATORS[kind or manifest["kind"]].validate(manifest)


@pytest.mark.parametrize("kind", MADE)
def test_every_field_is_one_of_kuberays(kind: str) -> None:
    assert MADE[kind][-1]["kind"] == kind
    for manifest in MADE[kind]:
        check(manifest)
    assert list(yaml.safe_load_all(kuberay.to_yaml(MADE[kind]))) == MADE[kind]


@pytest.mark.parametrize("kind", MADE)
def test_any_field_that_is_spelt_otherwise_is_seen(kind: str) -> None:
    """So the test above can fail: Kubernetes itself would drop the field and say nothing."""
    free = {"labels", "rayStartParams", "resources", "nodeSelector", "limits", "requests", "data"}
    tried = 0
    for manifest in MADE[kind]:
        for path in _fields(manifest, free):
            wrong = copy.deepcopy(manifest)
            parent: Any = wrong
            for part in path[:-1]:
                parent = parent[part]
            parent[path[-1] + "x"] = parent.pop(path[-1])
            with pytest.raises(jsonschema.ValidationError):
                check(wrong, manifest["kind"])
            tried += 1
    assert tried > 60


def _fields(value: Any, free: set[str], path: tuple = ()) -> Iterator[tuple]:
    """Every field of a manifest but the keys of mappings that may hold any."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        is_container_resources = key == "resources" and "limits" in item if isinstance(item, dict) else False
        if isinstance(key, str):
            yield (*path, key)
        if key not in free or is_container_resources:
            yield from _fields(item, free, (*path, key))


@pytest.mark.parametrize("kind", MADE)
def test_ray_reads_of_them_what_pods_will_have(kind: str) -> None:
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "x", "namespace": "y"}, "spec": spec_of(kind)}
    )
    types = config["available_node_types"]
    assert "GPU" not in types["headgroup"]["resources"] and types["headgroup"]["resources"]["CPU"] == 8
    assert config["idle_timeout_minutes"] == 10
    (worker,) = [each for name, each in types.items() if name != "headgroup"]
    assert worker["min_workers"] == 0
    if kind == "RayService":
        assert worker["max_workers"] == 6 and worker["resources"] == {"CPU": 1, "GPU": 1, "memory": 100 << 30}
        return
    has = worker["resources"]
    assert has == {"CPU": 96, "GPU": 8, "memory": 800 << 30, "accelerator_type:H200": 1}
    pods = [NodeResources(str(n), has["CPU"], has["GPU"], "H200") for n in range(worker["max_workers"])]
    plan = largest_plan(pods, WorldSizes.exactly(16, ep=4), NEEDS)
    assert plan.workers == 16 and [count for _, count in plan.workers_by_node] == [8, 8]


@pytest.mark.parametrize("kind", MADE)
def test_what_kuberay_would_refuse_is_not_there(kind: str) -> None:
    """Rules of its validation.go: of the spec for token authentication and autoscaler v2."""
    spec = spec_of(kind)
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"} and spec["rayVersion"] == "2.60.0"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        params, pod = group["rayStartParams"], group["template"]["spec"]
        assert not {"labels", "num-cpus", "num-gpus", "memory", "resources"} & set(params)
        assert pod.get("restartPolicy") in (None, "Never")
    assert spec["headGroupSpec"]["enableIngress"] is False and spec["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("kind", MADE)
def test_secrets_are_named_and_nothing_else(kind: str) -> None:
    spec = spec_of(kind)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "store-keys"}}]
        assert [each["name"] for each in container["env"]] == ["RAY_USAGE_STATS_ENABLED"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
    (pod,) = [group["template"]["spec"] for group in spec["workerGroupSpecs"]]
    assert pod["nodeSelector"] == {"cloud/gpu": "h200"} and pod["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_pods_hold_whole_groups_of_experts_and_are_as_few_as_can_be() -> None:
    tried = 0
    for ep in (1, 2, 3, 4, 8):
        for gpus in (0.0, 0.5, 1.0, 2.0, 4.0):
            for most in range(1, 34):
                sizes = WorldSizes(1, most, ep, lambda count, ep=ep: count % ep == 0)
                needs = WorkerNeeds(1, gpus)
                room = int(8 / gpus) if gpus else ep
                largest = most - most % ep
                if largest == 0 or room < ep:
                    with pytest.raises(ManifestError):
                        kuberay.training_group(sizes, needs)
                    continue
                group = kuberay.training_group(sizes, needs)
                assert group.workers % ep == 0 and group.workers <= room
                assert largest_plan(group.nodes(), sizes, needs).workers == largest
                # brute force: no other size of a pod needs fewer of them
                fewest = min(-(-largest // each) for each in range(ep, room + 1, ep))
                assert group.pods == fewest, (ep, gpus, most)
                tried += 1
    assert tried > 300


def test_workers_per_pod() -> None:
    group = kuberay.training_group(WorldSizes.exactly(16, ep=4), NEEDS, workers_per_pod=4)
    assert (group.workers, group.pods) == (4, 4)
    with pytest.raises(ManifestError, match="workers_per_pod=6 is no multiple of train.parallel.ep=4"):
        kuberay.training_group(WorldSizes.exactly(16, ep=4), NEEDS, workers_per_pod=6)
    with pytest.raises(ManifestError, match="--workers-per-pod"):
        kuberay.training_group(WorldSizes.exactly(16, ep=16), NEEDS)
    assert kuberay.training_group(WorldSizes.exactly(16, ep=16), NEEDS, workers_per_pod=16).pods == 1


def test_a_shell_runs_the_script_as_it_is_meant(tmp_path: Path) -> None:
    config, job = MADE["RayJob"]
    (mount,) = spec_of("RayJob")["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert job["spec"]["entrypoint"] == f"bash {mount['mountPath']}/run.sh"
    (volume,) = spec_of("RayJob")["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volume == {"name": mount["name"], "configMap": {"name": config["metadata"]["name"]}}
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "run.sh").write_text(config["data"]["run.sh"])
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", tmp_path / "run.sh"], env={"PATH": path}, capture_output=True, text=True, check=True, timeout=30
    )
    given = done.stdout.splitlines()
    assert given[:2] == ["-m", "pipelines.cli"]
    run = parse_cli(given[2:])
    assert run["store"] == STORE and run["until"] == "export"
    assert str(run["recipe"]) == f"{mount['mountPath']}/recipe.yaml"
    assert Recipe.from_yaml(config["data"]["recipe.yaml"]) == Recipe.from_yaml(yaml.safe_dump(RECIPE))


def parse_cli(arguments: list[str]) -> dict[str, Any]:
    """What the command would be called with."""
    import typer

    group = typer.main.get_command(app)
    with group.make_context("caravan", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])  # type: ignore
        return command.make_context(name, rest, parent=context).params


def test_serve_takes_the_service_and_it_is_what_deploy_would_declare() -> None:
    config = yaml.safe_load(MADE["RayService"][0]["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert declared_args(application) == ARGS and declared_engine(application).model == ARGS.model
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
    for group in (spec_of("RayService")["headGroupSpec"], *spec_of("RayService")["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert f"file://{mount['mountPath']}/keys.json" == KEYS_URI
        assert pod["volumes"] == [{"name": mount["name"], "secret": {"secretName": "api-keys"}}]
    with pytest.raises(ManifestError, match="api_keys"):
        kuberay.ray_service(TARGET, ARGS.model_copy(update={"api_keys": None}), 1, 8000, "api-keys")


@pytest.mark.parametrize(
    ("name", "label"), [("Tiny_7B.v2", "tiny-7b-v2"), ("7b", "run-7b"), ("-", "run"), ("x" * 80, "x" * 40)]
)
def test_names(name: str, label: str) -> None:
    assert kuberay.dns_label(name) == label
    assert Target(label, "image", "2.60.0").name == label
    if name != label:
        with pytest.raises(ManifestError, match="no name in Kubernetes"):
            Target(name, "image", "2.60.0")


def test_sizes_and_images_that_are_none() -> None:
    for wrong in ({"image": ""}, {"image": "a b"}, {"head_cpus": 0}, {"worker_memory_gib": 0}, {"env_secret": "A_b"}):
        with pytest.raises(ManifestError, match=next(iter(wrong))):
            Target(**{"name": "tiny", "image": "image", "ray_version": "2.60.0", **wrong})  # type: ignore[arg-type]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    values = copy.deepcopy(RECIPE)
    values["train"] |= {"wait_for_nodes": 900}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_the_command_prints_or_writes_whole_files(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given = ["render", "kuberay", recipe, "--image", "registry/caravan:1", "--store", "s3://bucket/prefix"]
    assert run_cli(monkeypatch, *given) == 0
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    for manifest in printed:
        check(manifest)
    assert [each["kind"] for each in printed] == ["ConfigMap", "RayJob"]
    assert shlex.split(printed[0]["data"]["run.sh"])[-4:] == ["--store", "s3://bucket/prefix", "--until", "export"]
    assert run_cli(monkeypatch, *given, "--out", recipe.parent / "out") == 0
    written = sorted(path.name for path in (recipe.parent / "out").iterdir())
    assert written == ["configmap-tiny-run.yaml", "rayjob-tiny.yaml"]
    assert yaml.safe_load((recipe.parent / "out" / "rayjob-tiny.yaml").read_text()) == printed[1]
    capsys.readouterr()
    for kind, more in (
        ("raycluster", []),
        ("rayservice", ["--model", "s3://bucket/model", "--api-key-secret", "api-keys", "--min", "1", "--max", "3"]),
    ):
        assert run_cli(monkeypatch, *given[:5], "--kind", kind, *more) == 0
        (made,) = yaml.safe_load_all(capsys.readouterr().out)
        check(made)
        assert made["kind"].lower() == kind


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--store", "s3://key:secret@bucket/x"], ["--store carries credentials"]),
        ([], ["--store=None", "s3://bucket/prefix"]),
        (["--store", "/a/folder"], ["--store=/a/folder", "one machine's disk"]),
        (["--store", "s3://b/p", "--set", "train.wait_for_nodes=0"], ["train.wait_for_nodes=0", "900"]),
        (["--store", "s3://b/p", "--until", "exprot"], ["exprot"]),
        (["--store", "s3://b/p", "--name", "Tiny"], ["name='Tiny'", "tiny"]),
        (["--store", "s3://b/p", "--node-selector", "gpu"], ["node_selector=gpu", "key=value"]),
        (["--store", "s3://b/p", "--model", "s3://b/m"], ["--model is for --kind rayservice"]),
        (["--kind", "rayservice", "--model", "s3://b/m"], ["--api-key-secret"]),
        (["--kind", "rayservice", "--retries", "1"], ["--retries is for --kind rayjob"]),
        (["--kind", "rayservice", "--model", "/a/b", "--api-key-secret", "k"], ["--model=/a/b", "one machine's disk"]),
        (
            ["--kind", "rayservice", "--model", "s3://b/m", "--api-key-secret", "k", "--min", "3"],
            ["min_replicas=3", "give both"],
        ),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_what_cannot_be_rendered_is_one_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list, words: list
) -> None:
    assert run_cli(monkeypatch, "render", "kuberay", recipe, "--image", "image", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert all(word in captured.err for word in words), captured.err
    assert "secret@" not in captured.err
