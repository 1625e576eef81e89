"""The cluster launcher's file, against Ray's own schema and preparation. Nothing is started and nobody is asked."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli, start
from ray.util.accelerators import accelerators
from ray.util.placement_group import NODE_ID_LABEL_KEY

from cluster.placement import NODE_ID_LABEL, NodeResources, PlacementError, WorkerNeeds, WorldSizes, largest_plan

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())


def test_it_is_valid_before_and_after_ray_fills_it_in(config: dict) -> None:
    jsonschema.validate(config, SCHEMA)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == set(config["available_node_types"])
    with pytest.raises(jsonschema.ValidationError, match="no_such_key"):
        jsonschema.validate(config | {"no_such_key": 1}, SCHEMA)


def test_the_head_has_no_gpu_and_gpu_nodes_scale_from_none(config: dict) -> None:
    types = config["available_node_types"]
    assert "GPU" not in types[config["head_node_type"]]["resources"]
    pools = {name: each for name, each in types.items() if each["resources"].get("GPU")}
    assert {each["labels"]["caravan-market"] for each in pools.values()} == {"on-demand", "spot"}
    for name, each in pools.items():
        assert each["min_workers"] == 0 < each["max_workers"] <= config["max_workers"], name
        assert any(key.startswith("accelerator_type:") for key in each["resources"]), name
        spot = each["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == (each["labels"]["caravan-market"] == "spot")


def test_the_placement_finds_room_on_its_nodes(config: dict) -> None:
    """By the very names that it asks for."""
    assert NODE_ID_LABEL == NODE_ID_LABEL_KEY
    for name in ("gpu", "gpu_spot"):
        each = config["available_node_types"][name]
        has = each["resources"]
        needs = WorkerNeeds(cpus=24, gpus=1, accelerator_type=accelerators.NVIDIA_H200)
        assert set(needs.resources()) <= set(has), "an autoscaler would start no such node"
        kind = next(key.partition(":")[2] for key in has if key.startswith("accelerator_type:"))
        nodes = [NodeResources(str(n), has["CPU"], has["GPU"], kind) for n in range(each["max_workers"])]
        for ep in (1, 2, 4, 8):
            assert largest_plan(nodes, WorldSizes.exactly(32, ep), needs).workers == 32
        with pytest.raises(PlacementError):
            largest_plan(nodes, WorldSizes.exactly(32, 16), needs)
    assert not {key for each in config["available_node_types"].values() for key in each["labels"] if "ray.io" in key}


def test_every_node_may_reach_the_store(config: dict) -> None:
    """Ray gives the head a role where none is named, and the workers none."""
    profiles = [each["node_config"]["IamInstanceProfile"] for each in config["available_node_types"].values()]
    assert profiles == [{"Name": "caravan-node"}] * 3


def test_the_commands_of_its_head_comment_exist() -> None:
    comment = (REPOSITORY / "ray_cluster.yaml").read_text().partition("cluster_name:")[0]
    named = re.findall(r"^#   ray (\S+)((?: --\S+)*)", comment, re.MULTILINE)
    assert [name for name, _ in named] == ["get-auth-token", "up", "dashboard", "down"]
    for name, given in named:
        options = {option for parameter in cli.commands[name].params for option in parameter.opts}
        assert set(given.split()) <= options, name


def test_nodes_run_what_constraints_pin(config: dict) -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    for image in (config["docker"]["head_image"], config["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{pins['ray']}-py311"), image
    installs = [command for command in config["setup_commands"] if "pip install" in command]
    assert installs and all("-c ~/caravan/constraints.txt" in command for command in installs)
    assert config["file_mounts"]["~/caravan/constraints.txt"] == "./constraints.txt"


def test_every_ray_start_is_authenticated_and_its_options_exist(config: dict) -> None:
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    options = {name for parameter in start.params for name in parameter.opts}
    for option in re.findall(r"--[a-z-]+", " ".join(starts)):
        assert option in options, option
