"""Files of a run's folder, as answers."""

from __future__ import annotations

import mimetypes

from fastapi.responses import Response, StreamingResponse

from pipelines.service import views
from pipelines.service.bounded import Bounded
from pipelines.service.loop import Orchestrator


async def download(orchestrator: Orchestrator, bounded: Bounded, run_id: str, name: str) -> Response:
    """A file that is listed in the run's folder. Raises UnknownRun, Busy and StorageError."""
    await bounded.call(orchestrator.find, run_id)
    size, blocks = await bounded.call(views.open_file, orchestrator.store, run_id, name)
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    # what a run wrote is not to run as this service's own page
    headers = {
        "Content-Length": str(size),
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",
    }
    return StreamingResponse(bounded.follow(blocks), media_type=kind, headers=headers)
