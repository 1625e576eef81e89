"""The web console on the service's own application, below `/console`.

Made with NiceGUI, which carries all that a browser needs in its package: nothing is built, and nothing is fetched from
elsewhere. It keeps its state by process, so a process has one console.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response

from pipelines.console.login import login_routes
from pipelines.service.door import CONSOLE
from pipelines.service.download import download
from pipelines.service.loop import Orchestrator

_FAVICON = "🐪"
_RECONNECT_SECONDS = 10.0


def mount(api: FastAPI, orchestrator: Orchestrator, dashboard_url: str, token: str | None) -> None:
    """Puts the pages on the application that `build_api` made of the same orchestrator and token. `dashboard_url`: of
    the Ray cluster whose endpoint is shown."""
    # nothing is stored there; without it a file of the working directory would be read
    os.environ.setdefault("NICEGUI_STORAGE_PATH", str(Path(os.devnull)))
    from nicegui import app, ui

    from pipelines.console import endpoint_page, new_page, run_page, runs_page
    from pipelines.console.desk import Desk
    from pipelines.console.endpoint import Endpoints

    desk = Desk(orchestrator, Endpoints(dashboard_url))

    @api.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse(f"{CONSOLE}/", 303)

    @api.get(CONSOLE, include_in_schema=False)
    async def bare() -> Response:
        return RedirectResponse(f"{CONSOLE}/", 303)

    @api.get(f"{CONSOLE}/files/{{run_id}}/{{name:path}}", include_in_schema=False)
    async def file(run_id: str, name: str) -> Response:
        return await download(orchestrator, desk.bounded, run_id, name)

    @ui.page("/")
    async def runs() -> None:
        await runs_page.show(desk)

    @ui.page("/runs/{run_id}")
    async def run(run_id: str) -> None:
        await run_page.show(desk, run_id)

    @ui.page("/new")
    async def new() -> None:
        await new_page.show(desk)

    @ui.page("/endpoint")
    async def endpoint() -> None:
        await endpoint_page.show(desk)

    api.include_router(login_routes(token))
    app.on_shutdown(desk.bounded.close)
    ui.run_with(
        api,
        mount_path=CONSOLE,
        title="Caravan",
        favicon=_FAVICON,
        dark=None,
        language="en-US",
        tailwind=False,
        reconnect_timeout=_RECONNECT_SECONDS,
        binding_refresh_interval=None,
        show_welcome_message=False,
    )
