"""One Ray and one application for all tests of serving that need them."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from cluster.serve import control
from cluster.serve.settings import AppArgs
from cluster.serve.view import Endpoint
from tests.cluster.serve.local_ray import local_ray
from tests.cluster.serve.tiny_model import save_tiny_model
from tests.conftest import find_free_port

MODEL = "tiny"


@pytest.fixture(scope="package")
def cluster(tmp_path_factory) -> Iterator[str]:
    with local_ray(tmp_path_factory.mktemp("serving")) as dashboard_url:
        yield dashboard_url


@pytest.fixture(scope="package")
def args(cluster, tmp_path_factory) -> AppArgs:
    return AppArgs(
        model=str(save_tiny_model(tmp_path_factory.mktemp("model"))),
        served_name=MODEL,
        cpus_per_replica=0.1,
        gpus_per_replica=0.5,
        accelerator_type="T4",
        engine={"num_blocks": 512, "max_batched_tokens": 64, "max_running": 4},
    )


@pytest.fixture(scope="package")
def endpoint(cluster, args) -> Endpoint:
    return control.deploy(
        args, replicas=2, dashboard_url=cluster, runtime_env=control.shipped_runtime_env(), port=find_free_port()
    )


@pytest.fixture(scope="package")
def client(endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="package")
def http(endpoint) -> Iterator[httpx.Client]:
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=30, headers=headers) as http:
        yield http
