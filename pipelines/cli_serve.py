"""The `caravan` commands that put a model behind an endpoint and look after it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.screen import AddressOption, JsonOption, StoreOption, err, fail, open_store, out, print_json

if TYPE_CHECKING:
    from cluster.serve.errors import ServeError
    from cluster.serve.view import Endpoint
    from cluster.session import Session
    from pipelines.serve_status import Look

OperatorKeyOption = Annotated[
    str | None, typer.Option(envvar="CARAVAN_API_KEY", help="An operator's key, where the endpoint asks for one.")
]


def deploy(
    model: Annotated[str, typer.Argument(help="Id of a run with an export, or a Hugging Face directory.")],
    replicas: Annotated[int | None, typer.Option(min=1, help="Engine replicas [default: the run's, else 1]")] = None,
    least: Annotated[
        int | None, typer.Option("--min", min=1, help="With --max: the number of replicas follows the load.")
    ] = None,
    largest: Annotated[int | None, typer.Option("--max", min=1, help="See --min.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback asks for keys.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="[default: the run's, else 8000]")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the API.")] = None,
    cpus_per_replica: Annotated[float | None, typer.Option(min=0.0, help="[default: the run's, else 1]")] = None,
    gpus_per_replica: Annotated[float | None, typer.Option(min=0.0, help="[default: the run's, else 0]")] = None,
    accelerator_type: Annotated[str | None, typer.Option(help="Ray's name of the GPU, such as H200.")] = None,
    ingresses: Annotated[int, typer.Option(min=1, help="Processes that answer HTTP.")] = 1,
    api_key_file: Annotated[
        str | None, typer.Option(help="File or URI of the keys that may call; see caravan keys.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Web origin that may call, such as https://chat.example.org.")
    ] = None,
    max_wait_s: Annotated[
        float | None, typer.Option(help="Refuse (429) what would wait longer for its first token [default: never]")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Only exchange the weights, one running replica after the other.")
    ] = False,
    store: StoreOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a run's exported model, or a Hugging Face directory, on a running cluster.

    What is deployed already keeps its processes and caches where only numbers of processes, --min and --max, keys,
    origins or --max-wait-s differ; else it is restarted, unless --update says to keep everything but the weights.
    """
    from cluster.serve import control
    from cluster.serve.keys import check_keys
    from cluster.serve.settings import IngressOptions
    from pipelines.deploy import app_args
    from pipelines.recipe import ServeConfig, validated

    given = {
        "replicas": replicas,
        "port": port,
        "cpus_per_replica": cpus_per_replica,
        "gpus_per_replica": gpus_per_replica,
        "accelerator_type": accelerator_type,
    }
    run_recipe, model_uri = find_model(model, store)
    if update:
        others = (*given.values(), least, largest, name, api_key_file, cors_origin, max_wait_s)
        if any(value is not None for value in others) or ingresses != 1 or host != "127.0.0.1":
            fail("--update exchanges the weights and changes nothing else; leave the other options out")
        endpoint = control.update(model_uri, dashboard_url=dashboard_url(address))
        _print_endpoint(endpoint, as_json)
        return
    if replicas is not None and (least, largest) != (None, None):
        fail(f"--replicas={replicas} fixes what --min and --max let follow the load; give the one or the others")
    base = run_recipe.serve if run_recipe else ServeConfig()
    config = validated(
        ServeConfig, base.model_dump() | {key: value for key, value in given.items() if value is not None}
    )
    served_name = name or (run_recipe.name if run_recipe else Path(model).resolve().name)
    args = app_args(
        served_name,
        config,
        model_uri,
        run_recipe.export.dtype if run_recipe else "float32",
        validated(
            IngressOptions,
            {
                "api_keys": None if api_key_file is None else check_keys(api_key_file),
                "cors_origins": tuple(cors_origin or ()),
                "max_wait_s": max_wait_s,
                "min_replicas": least,
                "max_replicas": largest,
            },
        ),
        ingresses,
    )
    with _join(address) as connected:
        endpoint = control.deploy(
            args,
            replicas=None if least is not None else config.replicas,
            dashboard_url=connected.dashboard_url or "",
            runtime_env=control.shipped_runtime_env(),
            nodes=control.cluster_nodes(),
            host=host,
            port=config.port,
        )
    _print_endpoint(endpoint, as_json)


def _print_endpoint(endpoint: Endpoint, as_json: bool) -> None:
    if as_json:
        print_json(asdict(endpoint))
    else:
        out.print(f"serving {endpoint.served_name} at {endpoint.url}/v1", highlight=False)


def find_model(model: str, store: str | None) -> tuple[Any, str]:
    """The run's recipe (None for a directory) and the model's URI."""
    if "/" in model or Path(model).is_dir():
        return None, str(Path(model).resolve()) if "://" not in model else model
    from cluster.artifact import Artifact
    from pipelines.recipe import Recipe
    from pipelines.recipe_text import check_decoders
    from pipelines.runs import Run, RunError

    run = Run.open(open_store(store), model)
    check_decoders(run.id, run.recipe_yaml)
    stage = run.status.stages.get("export")
    artifact = Artifact(run.store.child("artifacts", "export", stage.key)) if stage else None
    if artifact is None or not artifact.committed:
        raise RunError(f"run {model!r} has no exported model yet; go on with it: caravan resume {model}")
    return Recipe.from_yaml(run.recipe_yaml), artifact.store.uri


def scale(
    replicas: Annotated[int, typer.Argument(min=1, help="Number of replicas to run.")], address: AddressOption = None
) -> None:
    """Change the number of replicas; those that stay keep their processes and caches.

    It ends autoscaling: deploy with --min and --max begins it again.
    """
    from cluster.serve import control

    autoscaled = control.scale(replicas, dashboard_url=dashboard_url(address))
    ended = "; autoscaling is off" if autoscaled else ""
    out.print(f"{replicas} replica{'s' if replicas > 1 else ''} running{ended}", highlight=False)


def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    address: AddressOption = None,
    api_key: OperatorKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the endpoint and its replicas: load, cache, hit rate, speed."""
    from pipelines.serve_status import Look

    looks = _looks(dashboard_url(address), api_key, every)
    found = next(looks)
    if not isinstance(found, Look):
        raise found
    if not watch:
        # Speed is told from two looks; where nothing answers there is nothing to wait for.
        later = next(looks) if found.reported else found
        _show_look(later if isinstance(later, Look) else found, as_json)
    elif as_json or not out.is_terminal:
        for each in chain([found], looks):
            _print_look(each, as_json)
    else:
        _watch(chain([found], looks))


def _looks(dashboard_url: str, api_key: str | None, every: float) -> Iterator[Look | ServeError]:
    """The application now, and again after so many seconds each time; an error when it cannot be seen."""
    from cluster.serve import control
    from cluster.serve.errors import ServeError
    from pipelines.serve_status import look

    before: Look | None = None
    while True:
        try:
            before = look(control.status(dashboard_url=dashboard_url, api_key=api_key), time.monotonic(), before)
            yield before
        except ServeError as error:
            yield error
        time.sleep(every)


def _show_look(found: Look, as_json: bool) -> None:
    from pipelines.serve_status import headline, table

    if as_json:
        print_json(found.as_json())
    else:
        out.print(headline(found), markup=False, highlight=False, soft_wrap=True)
        out.print(table(found, out.width))


def _print_look(found: Look | ServeError, as_json: bool) -> None:
    """Plain lines, or one line of JSON."""
    from pipelines.serve_status import Look, lines

    if not isinstance(found, Look):
        err.print(str(found), markup=False, highlight=False, soft_wrap=True)
    elif as_json:
        print(json.dumps(found.as_json()), flush=True)
    else:
        print("\n".join(lines(found, time.localtime())), flush=True)


def _watch(looks: Iterable[Look | ServeError]) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from pipelines.serve_status import Look, headline, table

    with Live(console=out, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        for found in looks:
            if isinstance(found, Look):
                live.update(Group(Text(headline(found)), table(found, out.width)), refresh=True)
            else:
                live.update(Text(str(found), "red"), refresh=True)


def trace(
    request_id: Annotated[str, typer.Argument(help="The id in an answer, or its X-Request-Id.")],
    address: AddressOption = None,
    api_key: OperatorKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one request's way: what it would have cost on each replica, what was chosen, and how it fared there."""
    from cluster.serve import control
    from cluster.serve.records_client import find_request
    from pipelines.serve_trace import attempt_line, scores, summary

    found = find_request(control.status(dashboard_url=dashboard_url(address)).endpoint.url, request_id, api_key)
    if as_json:
        print_json({"requests": found})
        return
    for record in found:
        for line in summary(record):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
        for number, attempt in enumerate(record["attempts"], start=1):
            out.print(attempt_line(number, attempt), markup=False, highlight=False, soft_wrap=True)
            out.print(scores(attempt, out.width))


def undeploy(address: AddressOption = None) -> None:
    """Remove the endpoint."""
    from cluster.serve import control

    control.undeploy(dashboard_url=dashboard_url(address))
    out.print("nothing is deployed", highlight=False)


def _join(address: str | None) -> Session:
    """A connection to a cluster that is running already."""
    from cluster import head, session

    if address in (None, "local") and not os.environ.get("RAY_ADDRESS") and head.recorded() is None:
        fail("no cluster is up here; start one with caravan up, or name a running one: --address auto")
    return session.connect(address)


def dashboard_url(address: str | None) -> str:
    from cluster import head

    record = head.recorded()
    if address is None and not os.environ.get("RAY_ADDRESS") and record is not None:
        return record.dashboard_url  # without joining, which takes seconds
    with _join(address) as connected:
        return connected.dashboard_url or ""
