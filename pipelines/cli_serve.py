"""The `caravan` commands that put a model behind an endpoint and look after it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipelines.screen import AddressOption, JsonOption, StoreOption, fail, open_store, out, print_json

if TYPE_CHECKING:
    from cluster.session import Session


def deploy(
    model: Annotated[str, typer.Argument(help="Id of a run with an export, or a Hugging Face directory.")],
    replicas: Annotated[int | None, typer.Option(min=1, help="Engine replicas [default: the run's, else 1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="On loopback [default: the run's, else 8000]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the API.")] = None,
    cpus_per_replica: Annotated[float | None, typer.Option(min=0.0, help="[default: the run's, else 1]")] = None,
    gpus_per_replica: Annotated[float | None, typer.Option(min=0.0, help="[default: the run's, else 0]")] = None,
    accelerator_type: Annotated[str | None, typer.Option(help="Ray's name of the GPU, such as H200.")] = None,
    store: StoreOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a run's exported model, or a Hugging Face directory, on a running cluster."""
    from cluster.serve import control
    from pipelines.deploy import app_args
    from pipelines.recipe import ServeConfig, validated

    run_recipe, model_uri = _find_model(model, store)
    base = run_recipe.serve if run_recipe else ServeConfig()
    given = {
        "replicas": replicas,
        "port": port,
        "cpus_per_replica": cpus_per_replica,
        "gpus_per_replica": gpus_per_replica,
        "accelerator_type": accelerator_type,
    }
    config = validated(
        ServeConfig, base.model_dump() | {key: value for key, value in given.items() if value is not None}
    )
    served_name = name or (run_recipe.name if run_recipe else Path(model).resolve().name)
    dtype = run_recipe.export.dtype if run_recipe else "float32"
    with _join(address) as connected:
        endpoint = control.deploy(
            app_args(served_name, config, model_uri, dtype),
            replicas=config.replicas,
            dashboard_url=connected.dashboard_url or "",
            runtime_env=control.shipped_runtime_env(),
            port=config.port,
        )
    if as_json:
        print_json(asdict(endpoint))
    else:
        out.print(f"serving {endpoint.served_name} at {endpoint.url}/v1", highlight=False)


def _find_model(model: str, store: str | None) -> tuple[Any, str]:
    """The run's recipe (None for a directory) and the model's URI."""
    if "/" in model or Path(model).is_dir():
        return None, str(Path(model).resolve()) if "://" not in model else model
    from cluster.artifact import Artifact
    from pipelines.recipe import Recipe
    from pipelines.runs import Run, RunError

    run = Run.open(open_store(store), model)
    stage = run.status.stages.get("export")
    artifact = Artifact(run.store.child("artifacts", "export", stage.key)) if stage else None
    if artifact is None or not artifact.committed:
        raise RunError(f"run {model!r} has no exported model yet; go on with it: caravan resume {model}")
    return Recipe.from_yaml(run.recipe_yaml), artifact.store.uri


def scale(
    replicas: Annotated[int, typer.Argument(min=1, help="Number of replicas to run.")], address: AddressOption = None
) -> None:
    """Change the number of replicas; those that stay keep their processes and caches."""
    from cluster.serve import control

    control.scale(replicas, dashboard_url=_dashboard_url(address))
    out.print(f"{replicas} replica{'s' if replicas > 1 else ''} running", highlight=False)


def status(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """Show the endpoint and its replicas."""
    from cluster.serve import control

    found = control.status(dashboard_url=_dashboard_url(address))
    if as_json:
        print_json(asdict(found))
        return
    state = f"{found.endpoint.served_name} at {found.endpoint.url}/v1: {found.state} {found.message}".rstrip()
    out.print(state, markup=False)
    routing = {entry["replica"]: entry for entry in found.routing or []}
    if found.routing is None:
        out.print("[red]the endpoint does not answer[/]")
    table = Table("replica", "state", "pid", "active", "cached blocks", "events")
    for replica in found.replicas:
        view = routing.get(replica.replica, {})
        table.add_row(
            replica.replica,
            replica.state,
            str(replica.pid or ""),
            str(view.get("active_requests", "")),
            str(view.get("cached_blocks", "")),
            {True: "live", False: "stale", None: ""}[view.get("fresh")],
        )
    out.print(table)


def undeploy(address: AddressOption = None) -> None:
    """Remove the endpoint."""
    from cluster.serve import control

    control.undeploy(dashboard_url=_dashboard_url(address))
    out.print("nothing is deployed", highlight=False)


def _join(address: str | None) -> Session:
    """A connection to a cluster that is running already."""
    from cluster import head, session

    if address in (None, "local") and not os.environ.get("RAY_ADDRESS") and head.recorded() is None:
        fail("no cluster is up here; start one with caravan up, or name a running one: --address auto")
    return session.connect(address)


def _dashboard_url(address: str | None) -> str:
    from cluster import head

    record = head.recorded()
    if address is None and not os.environ.get("RAY_ADDRESS") and record is not None:
        return record.dashboard_url  # without joining, which takes seconds
    with _join(address) as connected:
        return connected.dashboard_url or ""
