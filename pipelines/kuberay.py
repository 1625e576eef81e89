"""Manifests for KubeRay: a recipe, and a few words about the Kubernetes cluster, in; dictionaries out.

Kinds are of `ray.io/v1` and need KubeRay 1.5.1 or newer (`authOptions`). What holds for all of them:

- The head has CPUs and no GPU; worker pods come when something asks for them and go when they are idle.
- A pod of a training holds whole expert-parallel groups, since a group stays on one node (cluster/placement.py).
- Ray asks for a token. KubeRay makes one, unless a Secret is named that has it.
- There is no ingress, and the head's service has an address in the cluster only.
- Secrets are named and never written out.

Readiness and liveness probes are left to KubeRay, which puts those that fit Ray's version and the kind.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import yaml

from cluster.placement import NodeResources, PlacementError, WorkerNeeds, WorldSizes, capacity, refit
from cluster.serve.declaration import declaration
from cluster.serve.settings import AppArgs, EngineOptions

API_VERSION = "ray.io/v1"
KEYS_FOLDER, KEYS_FILE = "/etc/caravan/keys", "keys.json"
KEYS_URI = f"file://{KEYS_FOLDER}/{KEYS_FILE}"
_RUN_FOLDER, _RECIPE, _SCRIPT = "/etc/caravan/run", "recipe.yaml", "run.sh"
_GPU = "nvidia.com/gpu"
_NODE_GPUS = 8  # of the usual machine, one NVLink domain
_LONGEST_NAME = 40  # KubeRay adds to it, and a label has 63 characters
_LABEL_VALUE = "[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL_VALUE}"
_CONFIG_MAP_BYTES = 1_000_000

Manifest = dict[str, Any]


class ManifestError(ValueError):
    """A recipe or an option that no manifest can be made of; the message is one line."""


@dataclass(frozen=True)
class Target:
    """The Kubernetes side. `image` has Ray of `ray_version` and Caravan in it. `env_secret`: a Secret whose entries
    become environment variables of the pods, such as AWS_ACCESS_KEY_ID; `token_secret`: one with Ray's token under
    `auth_token`. `node_selector` and `worker_memory_gib` (for each worker or replica) are for the worker pods."""

    name: str
    image: str
    ray_version: str
    namespace: str | None = None
    env_secret: str | None = None
    token_secret: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    head_cpus: int = 8
    head_memory_gib: int = 32
    worker_memory_gib: int | None = None

    def __post_init__(self) -> None:
        for what in ("name", "namespace", "env_secret", "token_secret"):
            value = getattr(self, what)
            if value is not None and (value != dns_label(value) or len(value) > _LONGEST_NAME):
                raise ManifestError(
                    f"{what}={value!r} is no name in Kubernetes; use at most {_LONGEST_NAME} lower-case letters, "
                    f"digits and '-', a letter first, such as {dns_label(value)}"
                )
        if not re.fullmatch(r"[^\s]+", self.image):
            raise ManifestError(f"image={self.image!r} names none; write REGISTRY/NAME:TAG")
        for what in ("head_cpus", "head_memory_gib", "worker_memory_gib"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise ManifestError(f"{what}={value} must be at least 1")


@dataclass(frozen=True)
class Group:
    """Worker pods: at most `pods` of them, each with room for `workers` of `needs`."""

    name: str
    needs: WorkerNeeds
    workers: int
    pods: int

    def nodes(self) -> list[NodeResources]:
        """The pods as the placement sees them."""
        needs, count = self.needs, self.workers
        cpus, gpus = max(1, ceil(needs.cpus * count)), ceil(needs.gpus * count)
        return [NodeResources(f"pod-{n}", cpus, gpus, needs.accelerator_type) for n in range(self.pods)]


def dns_label(name: str) -> str:
    """The nearest name that Kubernetes takes (RFC 1035), of at most 40 characters."""
    plain = re.sub("[^a-z0-9-]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"run-{plain}")[:_LONGEST_NAME].rstrip("-")


def selector(given: Sequence[str]) -> dict[str, str]:
    """Labels of nodes from `key=value` each. Raises ManifestError."""
    parts = [each.partition("=") for each in given]
    for key, _, value in parts:
        if not re.fullmatch(_LABEL_KEY, key) or not re.fullmatch(_LABEL_VALUE, value):
            raise ManifestError(f"node_selector={key}={value} is no label; write it key=value, as kubectl shows it")
    return {key: value for key, _, value in parts}


def training_group(sizes: WorldSizes, needs: WorkerNeeds, workers_per_pod: int | None = None) -> Group:
    """Pods for the most workers that a training can use, in whole expert-parallel groups, on as few pods as possible.

    `workers_per_pod`: None fills a node of 8 GPUs, and without GPUs holds one group. Raises ManifestError.
    """
    largest = sizes.usable(sizes.largest)
    if largest is None:
        raise ManifestError(f"train.workers={sizes} fit the training in no number")
    if workers_per_pod is None:
        room = int(_NODE_GPUS / needs.gpus + 1e-9) if needs.gpus > 0 else sizes.ep
        workers_per_pod = refit(min(largest, room), sizes.ep)
        if workers_per_pod == 0:
            raise ManifestError(
                f"train.parallel.ep={sizes.ep} workers of {needs.gpus:g} GPUs are more than a node of {_NODE_GPUS}; "
                "lower it, or say how many a node of yours holds: --workers-per-pod"
            )
    if workers_per_pod < 1 or workers_per_pod % sizes.ep:
        raise ManifestError(
            f"workers_per_pod={workers_per_pod} is no multiple of train.parallel.ep={sizes.ep}, and a group of experts "
            "stays on one pod; choose one"
        )
    group = Group("train", needs, workers_per_pod, ceil(largest / workers_per_pod))
    if capacity(group.nodes(), sizes.ep, needs) < largest:
        raise PlacementError(f"{group.pods} pods of {workers_per_pod} workers do not hold {largest}")
    return group


def serving_group(args: AppArgs, replicas: int) -> Group:
    """A pod for every replica, and as many as there may be of them."""
    needs = WorkerNeeds(args.cpus_per_replica, args.gpus_per_replica, args.accelerator_type)
    return Group("serve", needs, 1, args.max_replicas or replicas)


def ray_cluster(target: Target, group: Group) -> list[Manifest]:
    """A cluster that stays, for `caravan submit`."""
    return [_manifest("RayCluster", target, cluster_spec(target, [group]))]


def ray_job(target: Target, group: Group, recipe_yaml: str, store_uri: str, until: str, retries: int) -> list[Manifest]:
    """The recipe's run on a cluster of its own, which ends with it.

    A retry gets another cluster and begins another run, which skips what is committed and trains from the last
    checkpoint. Raises ManifestError for a recipe that a ConfigMap cannot hold.
    """
    if len(recipe_yaml.encode()) > _CONFIG_MAP_BYTES:
        raise ManifestError("the recipe is longer than the 1 MB that a ConfigMap holds; shorten its lists")
    files = f"{target.name}-run"
    command = ["python", "-m", "pipelines.cli", "run", f"{_RUN_FOLDER}/{_RECIPE}"]
    spec = {
        # A script, because two shells and `ray job submit` would read a command line here, each with quotes of its own.
        "entrypoint": f"bash {_RUN_FOLDER}/{_SCRIPT}",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,
        "backoffLimit": retries,
        "submitterConfig": {"backoffLimit": 2},
        "rayClusterSpec": cluster_spec(
            target, [group], head_mounts=[_Mount("run", _RUN_FOLDER, {"configMap": {"name": files}})]
        ),
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(target, files),
        "data": {
            _SCRIPT: f"exec {shlex.join([*command, '--store', store_uri, '--until', until])}\n",
            _RECIPE: recipe_yaml,
        },
    }
    return [config, _manifest("RayJob", target, spec)]


def ray_service(target: Target, args: AppArgs, replicas: int, port: int, key_secret: str) -> list[Manifest]:
    """The endpoint, which KubeRay watches and replaces. `key_secret`: a Secret with the key file as `keys.json`; it is
    mounted where `args.api_keys` must say, `KEYS_URI`."""
    if args.api_keys != KEYS_URI:
        raise ManifestError(f"api_keys={args.api_keys!r} is not {KEYS_URI}, where the Secret is mounted")
    app = declaration(args, EngineOptions(model=args.model), replicas=replicas)
    config = {
        "proxy_location": "EveryNode",  # that has a replica: KubeRay's service leads to all of them
        "http_options": {"host": "0.0.0.0", "port": port},
        "applications": [app],
    }
    keys = _Mount("keys", KEYS_FOLDER, {"secret": {"secretName": key_secret}})
    group = serving_group(args, replicas)
    spec = {
        "serveConfigV2": yaml.safe_dump(config, sort_keys=False),
        "rayClusterConfig": cluster_spec(target, [group], [keys], [keys], port),
    }
    return [_manifest("RayService", target, spec)]


@dataclass(frozen=True)
class _Mount:
    name: str
    path: str
    source: dict[str, Any]


def cluster_spec(
    target: Target,
    groups: Sequence[Group],
    head_mounts: Sequence[_Mount] = (),
    worker_mounts: Sequence[_Mount] = (),
    serve_port: int = 8000,
) -> Manifest:
    """The `RayClusterSpec` that all three kinds share."""
    auth = {"mode": "token", **({"secretName": target.token_secret} if target.token_secret else {})}
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": serve_port}
    head = _container("ray-head", target, target.head_cpus, 0, target.head_memory_gib, ports, head_mounts)
    small = {"cpu": "500m", "memory": "1Gi"}
    return {
        "rayVersion": target.ray_version,
        "authOptions": auth,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 600,
            "resources": {"requests": small, "limits": small},
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "enableIngress": False,
            # the operator and the submitter are in other pods; the service above leads nobody else here
            "rayStartParams": {"dashboard-host": "0.0.0.0"},
            "labels": {"caravan-pool": "head"},
            "template": _pod(head, head_mounts),
        },
        "workerGroupSpecs": [_worker_group(target, group, worker_mounts, serve_port) for group in groups],
    }


def _worker_group(target: Target, group: Group, mounts: Sequence[_Mount], serve_port: int) -> Manifest:
    node, kind = group.nodes()[0], group.needs.accelerator_type
    cpus, gpus = int(node.cpus), int(node.gpus)
    each = target.worker_memory_gib or (64 if gpus else 4)
    # By these the autoscaler knows what a pod would have before there is one: workers ask for the GPU by its name.
    resources = {"CPU": str(cpus), **({"GPU": str(gpus)} if gpus else {})}
    resources |= {f"accelerator_type:{kind}": "1"} if kind else {}
    container = _container("ray-worker", target, cpus, gpus, each * group.workers, {"serve": serve_port}, mounts)
    template = _pod(container, mounts)
    template["spec"] |= {
        # SIGTERM is a notice that the pod will go: the training writes a checkpoint in that time
        "terminationGracePeriodSeconds": 120,
        "automountServiceAccountToken": False,
    }
    if target.node_selector:
        template["spec"]["nodeSelector"] = dict(target.node_selector)
    if gpus:
        template["spec"]["tolerations"] = [{"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "groupName": group.name,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": group.pods,
        "rayStartParams": {},
        "resources": resources,
        "labels": {"caravan-pool": group.name},
        "template": template,
    }


def _container(
    name: str, target: Target, cpus: int, gpus: int, memory_gib: int, ports: Mapping[str, int], mounts: Sequence[_Mount]
) -> Manifest:
    """What it asks for is also its limit: nobody else's pod takes memory that Ray counts on."""
    amounts = {"cpu": str(cpus), "memory": f"{memory_gib}Gi", **({_GPU: str(gpus)} if gpus else {})}
    container: Manifest = {
        "name": name,
        "image": target.image,
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "ports": [{"name": each, "containerPort": port} for each, port in ports.items()],
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if target.env_secret:
        container["envFrom"] = [{"secretRef": {"name": target.env_secret}}]
    if mounts:
        container["volumeMounts"] = [
            {"name": mount.name, "mountPath": mount.path, "readOnly": True} for mount in mounts
        ]
    return container


def _pod(container: Manifest, mounts: Sequence[_Mount]) -> Manifest:
    spec: Manifest = {
        "containers": [container],
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
    }
    if mounts:
        spec["volumes"] = [{"name": mount.name, **mount.source} for mount in mounts]
    return {"spec": spec}


def _manifest(kind: str, target: Target, spec: Manifest) -> Manifest:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": _metadata(target, target.name), "spec": spec}


def _metadata(target: Target, name: str) -> Manifest:
    labels = {"app.kubernetes.io/name": "caravan", "app.kubernetes.io/instance": target.name}
    return {"name": name, **({"namespace": target.namespace} if target.namespace else {}), "labels": labels}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no `&id001`: people read manifests and change them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def to_yaml(manifests: Sequence[Manifest]) -> str:
    """One document each, as `kubectl apply -f -` takes them."""
    return "".join(f"---\n{yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=120)}" for each in manifests)
