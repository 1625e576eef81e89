"""The application's settings, and what they ask of Ray."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from ray.serve.exceptions import RayServeException

from cluster.serve.app import build
from cluster.serve.settings import ENGINE_DEPLOYMENT, INGRESS_DEPLOYMENT, AppArgs, BuildArgs, IngressOptions


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def _deployments(args: BuildArgs) -> dict:
    ingress = build(args)._bound_deployment
    engine = ingress.init_args[1]._bound_deployment
    return {deployment.name: deployment for deployment in (ingress, engine)}


def test_settings_reach_the_deployments(model):
    args = BuildArgs(
        model=model,
        cpus_per_replica=0.5,
        gpus_per_replica=2,
        accelerator_type="H100",
        threads=2,
        dtype="bfloat16",
        engine={"num_blocks": 64, "max_running": 8, "max_waiting": 10},
    )
    deployments = _deployments(args)
    engine = deployments[ENGINE_DEPLOYMENT]
    options = engine.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"], options["accelerator_type"]) == (0.5, 2, "H100")
    (config,) = engine.init_args
    assert config.engine.num_blocks == 64 and config.dtype == "bfloat16" and config.threads == 2 and config.use_gpu
    assert engine.max_ongoing_requests > 18  # what the engine can hold and refuse by itself, and the subscriptions
    assert deployments[INGRESS_DEPLOYMENT].ray_actor_options["num_cpus"] == 0


def test_without_gpus_none_are_asked_for(model):
    options = _deployments(BuildArgs(model=model))[ENGINE_DEPLOYMENT].ray_actor_options
    assert options["num_gpus"] == 0 and "accelerator_type" not in options


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(RayServeException, match="serve.model="):
        build(BuildArgs(model=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"bananas": 1}, "bananas"),
        ({"engine": {"num_blcks": 1}}, "engine.num_blcks"),
        ({"engine": {"num_blocks": 0}}, "engine"),
        ({"cost": {"missing_weight": -1}}, "cost"),
        ({"threads": 0}, "threads"),
        ({"gpus_per_replica": -1}, "gpus_per_replica"),
        ({"dtype": "float8"}, "dtype"),
    ],
)
def test_bad_settings_are_named_with_their_path(fields, path):
    with pytest.raises(ValidationError) as caught:
        AppArgs(model="m", **fields)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == path


@pytest.mark.parametrize("uri", ["s3://KEY:hush@bucket/export", "s3://hush@bucket/export?region=x"])
def test_credentials_in_the_models_uri_are_refused_and_not_shown(uri):
    with pytest.raises(ValidationError, match=r"s3://\*\*\*@bucket/export carries credentials") as caught:
        AppArgs(model=uri)
    assert "hush" not in str(caught.value)
    for good in ("s3://bucket/export?region=x", "gs://anonymous@bucket/export", "/folder/with@sign"):
        AppArgs(model=good)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_replicas": 2}, "give both"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas=3 is more than max_replicas=2"),
        ({"min_replicas": 0, "max_replicas": 2}, "min_replicas"),
        ({"ingresses": 0}, "ingresses"),
        ({"max_wait_s": 0}, "max_wait_s"),
        ({"api_keys": "s3://KEY:hush@bucket/keys"}, r"api_keys=s3://\*\*\*@bucket/keys carries"),
    ],
)
def test_numbers_of_processes_and_options_are_checked(fields, words):
    with pytest.raises(ValidationError, match=words) as caught:
        AppArgs(model="m", **fields)
    assert "hush" not in str(caught.value)


def test_arguments_survive_json(model):
    args = BuildArgs(model=model, engine={"num_blocks": 7}, cost={"missing_weight": 3.0})
    assert BuildArgs.model_validate(args.model_dump(mode="json")) == args


def test_settings_and_control_leave_ray_alone_until_they_are_used():
    code = "import sys; import cluster.serve.settings, cluster.serve.control; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://a.b", "http://[::1]:80"])
def test_origins(origin):
    assert IngressOptions(cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "",
        "null",
        "https://*.a.b",
        "https://a.b/",
        "https://a.b/x",
        "a.b",
        "ftp://a.b",
        "https://A.b",
        "http://u@a.b",
    ],
)
def test_no_origins(origin):
    with pytest.raises(ValueError, match="cors_origins"):
        IngressOptions(cors_origins=(origin,))
