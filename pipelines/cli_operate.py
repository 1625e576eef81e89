"""The `caravan` commands for whoever runs the machines: what is wrong here, what of a store can go, and
manifests for Kubernetes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.screen import AddressOption, JsonOption, StoreOption, err, fail, named_store, out, print_json

if TYPE_CHECKING:
    from pipelines.kuberay import Group, Manifest, Target
    from pipelines.recipe import Recipe

render = typer.Typer(help="Manifests for a cluster, from a recipe; nothing is started.", no_args_is_help=True)

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(store: StoreOption = None, address: AddressOption = None, as_json: JsonOption = False) -> None:
    """Look whether this machine, the store and the cluster are fit for use; exit code 1 if something is not."""
    from cluster.head import caravan_home, temporary_folder
    from pipelines import doctor as machine
    from pipelines import doctor_cluster
    from pipelines.recipe import ServeConfig

    port = ServeConfig.model_fields["port"].default
    checks = machine.checks(caravan_home(), temporary_folder(), port)
    checks += doctor_cluster.checks(named_store(store), address)
    findings = []
    for finding in machine.examine(checks):
        findings.append(finding)
        if not as_json:
            out.print(f"[{_COLOURS[finding.state]}]{finding.state:4}[/] {finding.name:13}", end=" ")
            out.print(finding.found, markup=False, highlight=False, soft_wrap=True)
            if finding.remedy:
                out.print(f"{'':18} → {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
    failed = any(finding.state == "fail" for finding in findings)
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    if machine.hangs():
        sys.stdout.flush()
        os._exit(1)
    if failed:
        raise typer.Exit(1)


def gc(
    store: StoreOption = None,
    keep_last: Annotated[
        int | None, typer.Option(min=0, help="Keep the last so many runs that have ended [default: all]")
    ] = None,
    keep_days: Annotated[
        float | None, typer.Option(min=0, help="Keep runs that ended in the last so many days [default: all]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove artifacts, checkpoints and abandoned tries that no kept run and no deployment needs.

    A run is kept if it has not ended, or if --keep-last or --keep-days says so; without either all runs are. Runs that
    are not kept stay on record: to resume one makes its stages again.
    """
    from pipelines.garbage import collect, lines
    from pipelines.retention import Policy

    report = collect(named_store(store), Policy(keep_last, keep_days), dry_run)
    if as_json:
        print_json({"dry_run": dry_run, **report.as_json()})
    else:
        for line in lines(report, dry_run):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    if report.failed:
        raise typer.Exit(1)


class Kind(StrEnum):
    rayjob = "rayjob"
    rayservice = "rayservice"
    raycluster = "raycluster"


_ONLY_OF = {
    "--until": (Kind.rayjob,),
    "--retries": (Kind.rayjob,),
    "--workers-per-pod": (Kind.rayjob, Kind.raycluster),
    "--model": (Kind.rayservice,),
    "--api-key-secret": (Kind.rayservice,),
    "--min": (Kind.rayservice,),
    "--max": (Kind.rayservice,),
}


@render.command()
def kuberay(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    image: Annotated[str, typer.Option(help="Container image with this Ray and Caravan; see docs/cluster.md.")],
    kind: Annotated[Kind, typer.Option(help="A run, an endpoint, or a cluster that stays.")] = Kind.rayjob,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key.")] = None,
    store: Annotated[str | None, typer.Option(help="s3:// or gs:// URI for artifacts and runs.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the resources [default: the recipe's]")] = None,
    namespace: Annotated[str | None, typer.Option(help="[default: kubectl's]")] = None,
    env_secret: Annotated[str | None, typer.Option(help="Secret with the store's credentials, as variables.")] = None,
    token_secret: Annotated[
        str | None, typer.Option(help="Secret with Ray's token as auth_token [default: KubeRay makes one]")
    ] = None,
    node_selector: Annotated[list[str] | None, typer.Option(help="key=value that a worker's node must have.")] = None,
    worker_memory: Annotated[
        int | None, typer.Option(min=1, help="GiB for each worker or replica [default: 64, without GPUs 4]")
    ] = None,
    head_cpus: Annotated[int, typer.Option(min=1, help="CPUs of the head pod.")] = 8,
    head_memory: Annotated[int, typer.Option(min=1, help="GiB of the head pod.")] = 32,
    workers_per_pod: Annotated[
        int | None, typer.Option(min=1, help="Training workers of a pod [default: those of 8 GPUs]")
    ] = None,
    until: Annotated[str | None, typer.Option(help="rayjob: the last stage [default: export]")] = None,
    retries: Annotated[
        int | None, typer.Option(min=0, help="rayjob: new clusters after a failure [default: 2]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="rayservice: a run with an export, or a model's URI.")] = None,
    api_key_secret: Annotated[
        str | None, typer.Option(help="rayservice: Secret with the key file as keys.json; see caravan keys.")
    ] = None,
    least: Annotated[int | None, typer.Option("--min", min=1, help="rayservice: with --max, follow the load.")] = None,
    largest: Annotated[int | None, typer.Option("--max", min=1, help="rayservice: see --min.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for a file each [default: stdout]")] = None,
) -> None:
    """Manifests for KubeRay: the recipe as a job, a model as a service, or the cluster for the recipe's training."""
    from importlib.metadata import version

    from pipelines import kuberay as manifests
    from pipelines.recipe import Recipe

    _refuse_others(
        kind,
        {
            "--until": until,
            "--retries": retries,
            "--workers-per-pod": workers_per_pod,
            "--model": model,
            "--api-key-secret": api_key_secret,
            "--min": least,
            "--max": largest,
        },
    )
    parsed = Recipe.load(recipe, overrides or [], named_store(store))
    target = manifests.Target(
        name=name or manifests.dns_label(parsed.name),
        image=image,
        ray_version=version("ray"),
        namespace=namespace,
        env_secret=env_secret,
        token_secret=token_secret,
        node_selector=manifests.selector(node_selector or []),
        head_cpus=head_cpus,
        head_memory_gib=head_memory,
        worker_memory_gib=worker_memory,
    )
    if kind is Kind.rayservice:
        if model is None or api_key_secret is None:
            fail("--kind=rayservice needs --model, and --api-key-secret, for it listens beyond loopback")
        made = _service(target, parsed, model, api_key_secret, store, least, largest)
    else:
        if parsed.train.wait_for_nodes == 0:
            fail("train.wait_for_nodes=0 waits for no pod to come; give the seconds: --set train.wait_for_nodes=900")
        sizes = parsed.train.world_sizes(parsed.model)
        group = manifests.training_group(sizes, parsed.train.worker_needs, workers_per_pod)
        if kind is Kind.raycluster:
            made = manifests.ray_cluster(target, group)
        else:
            retries = 2 if retries is None else retries
            made = _job(target, group, parsed, store, until or "export", retries)
    _write(made, manifests.to_yaml, to)


def _refuse_others(kind: Kind, given: dict[str, object]) -> None:
    for option, value in given.items():
        if value is not None and kind not in _ONLY_OF[option]:
            fail(f"{option} is for --kind {' or '.join(_ONLY_OF[option])}, not {kind}; leave it out")


def _job(target: Target, group: Group, recipe: Recipe, store: str | None, until: str, retries: int) -> list[Manifest]:
    from pipelines import kuberay as manifests
    from pipelines.stages import build_graph

    build_graph(recipe, dashboard_url="", keep=False).selected(until)  # what is wrong is said now, not in a pod's log
    opened = named_store(store)
    if store is None or opened.local_path() is not None:
        fail(
            f"--store={store} is on one machine's disk, and pods are many; give s3://bucket/prefix or gs://bucket/prefix"
        )
    for number, source in enumerate(recipe.data.sources):
        if source.uri.startswith(("/", "file:")):
            err.print(f"note: data.sources[{number}].uri={source.uri} must be in the image", markup=False)
    return manifests.ray_job(target, group, recipe.to_yaml(), opened.uri, until, retries)


def _service(
    target: Target,
    recipe: Recipe,
    model: str,
    api_key_secret: str,
    store: str | None,
    least: int | None,
    largest: int | None,
) -> list[Manifest]:
    from cluster.serve.settings import IngressOptions
    from pipelines import kuberay as manifests
    from pipelines.cli_serve import find_model
    from pipelines.deploy import app_args
    from pipelines.recipe import validated

    _, uri = find_model(model, store)
    if "://" not in uri or uri.startswith("file:"):
        fail(
            f"--model={uri} is on one machine's disk, and pods are many; give s3://bucket/prefix or gs://bucket/prefix"
        )
    options = validated(
        IngressOptions, {"api_keys": manifests.KEYS_URI, "min_replicas": least, "max_replicas": largest}
    )
    args = app_args(recipe.name, recipe.serve, uri, recipe.export.dtype, options)
    replicas = recipe.serve.replicas if least is None or largest is None else least
    return manifests.ray_service(target, args, replicas, recipe.serve.port, api_key_secret)


def _write(made: Sequence[Manifest], to_yaml: Callable[[Sequence[Manifest]], str], folder: Path | None) -> None:
    if folder is None:
        sys.stdout.write(to_yaml(made))
        return
    for manifest in made:
        file = f"{manifest['kind'].lower()}-{manifest['metadata']['name']}.yaml"
        named_store(str(folder)).write_bytes(file, to_yaml([manifest]).encode())  # whole, or not at all
        out.print(f"wrote {folder / file}", highlight=False, markup=False, soft_wrap=True)
