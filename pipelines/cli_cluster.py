"""The `caravan` commands around the local cluster, which has a service for submitted runs: `up` and `down`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.screen import JsonOption, StoreOption, fail, open_store, out, print_json

if TYPE_CHECKING:
    from pipelines.service.settings import ServiceSettings


def up(
    num_cpus: Annotated[int | None, typer.Option(help="CPUs to offer [default: all]")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="GPUs to offer [default: all]")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the head [default: a free one]")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Port of the dashboard [default: a free one]")] = None,
    service: Annotated[bool, typer.Option(help="With a service that queues submitted runs.")] = True,
    service_port: Annotated[int | None, typer.Option(help="Port of the service [default: a free one]")] = None,
    store: StoreOption = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or URI whose files submitted recipes may name; may be repeated. [default: this folder]"
        ),
    ] = None,
    allow_module: Annotated[
        list[str] | None, typer.Option(help="Python module whose functions may be stages; may be repeated.")
    ] = None,
    cap: Annotated[
        list[str] | None,
        typer.Option(help="user=2: at most two runs at once with the same tag `user`; may be repeated."),
    ] = None,
    token_file: Annotated[
        str | None, typer.Option(help="File with a token that the service asks for; readable for you alone.")
    ] = None,
    webhook: Annotated[
        list[str] | None, typer.Option(help="https URL that is told what happens to submitted runs; may be repeated.")
    ] = None,
    webhook_secret_file: Annotated[
        str | None, typer.Option(help="File with the secret that deliveries are signed with; readable for you alone.")
    ] = None,
    webhook_allow: Annotated[
        list[str] | None,
        typer.Option(help="Network that webhooks may reach besides public addresses: 10.1.0.0/16; may be repeated."),
    ] = None,
    webhook_loopback_http: Annotated[
        bool, typer.Option("--webhook-loopback-http", help="Webhooks may be plain http to this machine's loopback.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a Ray head on this machine that stays until `caravan down`, and a service for runs on it."""
    from cluster import head

    if not service:
        _refuse_webhooks(webhook, webhook_secret_file, webhook_allow, webhook_loopback_http)
        record = head.up(num_cpus=num_cpus, num_gpus=num_gpus, port=port, dashboard_port=dashboard_port)
    else:
        from pipelines.service import actor

        settings = _settings(
            open_store(store).uri,
            allow or [str(Path.cwd())],
            modules=tuple(allow_module or ()),
            caps=_caps(cap),
            token_file=_absolute(token_file),
            webhooks=tuple(webhook or ()),
            webhook_secret_file=_absolute(webhook_secret_file),
            webhook_allow=tuple(webhook_allow or ()),
            webhook_loopback_http=webhook_loopback_http,
        )
        settings.check_files()
        chosen = actor.choose_port(service_port)
        record = head.up(num_cpus=num_cpus, num_gpus=num_gpus, port=port, dashboard_port=dashboard_port)
        try:
            record = head.note_service(record, actor.start(record.address, settings, chosen), settings.token_file)
        except BaseException:
            head.down()
            raise
    if as_json:
        print_json(asdict(record))
        return
    out.print(f"Ray is up at {record.address}, dashboard {record.dashboard_url}", highlight=False)
    if record.service_url is not None:
        out.print(
            f"runs are queued at {record.service_url}; in a browser: {record.service_url}/console/", highlight=False
        )


def down(as_json: JsonOption = False) -> None:
    """End the Ray head that `caravan up` started, and all that runs on it."""
    from cluster import head

    record = head.down()
    if as_json:
        print_json(asdict(record))
    else:
        out.print(f"Ray at {record.address} is down", highlight=False)


def _settings(store: str, allow: list[str], **others: Any) -> ServiceSettings:
    """`others` are fields of ServiceSettings."""
    from pydantic import ValidationError

    from pipelines.section import lasting_uri
    from pipelines.service.settings import ServiceSettings

    try:
        return ServiceSettings(store=store, allow=tuple(lasting_uri(place) for place in allow), **others)
    except ValidationError as error:  # its text has more than the one line
        fail(error.errors()[0]["msg"].removeprefix("Value error, "))
    except ValueError as error:
        fail(f"--allow: {error}")


def _refuse_webhooks(*options: object) -> None:
    if any(options):
        fail("--webhook and its options are for the service, and --no-service leaves that out; leave one of them out")


def _caps(given: list[str] | None) -> dict[str, int]:
    caps: dict[str, int] = {}
    for cap in given or []:
        name, _, number = cap.partition("=")
        if not name or not number.isdigit() or int(number) < 1:
            fail(f"--cap={cap} is not of the form tag=number, such as user=2")
        caps[name] = int(number)
    return caps


def _absolute(file: str | None) -> str | None:
    return None if file is None else str(Path(file).expanduser().absolute())
