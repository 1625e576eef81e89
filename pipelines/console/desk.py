"""What the pages ask, and of whom. A page waits for nothing in the event loop: whatever touches the store, the Jobs API
or Serve runs in a thread and is waited for only so long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from cluster.head import ClusterError
from cluster.serve.api_error import log_defect
from cluster.serve.errors import ServeError
from cluster.storage import StorageError, Store
from pipelines.console.endpoint import Endpoints
from pipelines.drive import foresee
from pipelines.export import training_folder
from pipelines.metrics import MetricsReader
from pipelines.plan import Step
from pipelines.pretrain import METRICS
from pipelines.runs import Run, RunError, one_line
from pipelines.service.bounded import Bounded
from pipelines.service.errors import Busy, RequestRefused, UnknownRun, WrongState
from pipelines.service.intake import RunRequest
from pipelines.service.loop import Orchestrator
from pipelines.stage import GraphError

P = ParamSpec("P")
T = TypeVar("T")

EXPECTED = (
    RequestRefused, UnknownRun, WrongState, RunError, GraphError, Busy, StorageError, ClusterError, ServeError
)  # fmt: skip
"""What a page shows as one line; anything else is a defect."""

_THREADS, _SECONDS = 32, 30.0
_SCALE_SECONDS = 150.0


class Desk:
    """One for all pages."""

    def __init__(self, orchestrator: Orchestrator, endpoints: Endpoints) -> None:
        self.orchestrator = orchestrator
        self.endpoints = endpoints
        self.bounded = Bounded(_THREADS, _SECONDS)
        self._patient = Bounded(4, _SCALE_SECONDS)

    @property
    def store(self) -> Store:
        return self.orchestrator.store

    async def ask(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Raises what the function raises, and Busy if it takes too long."""
        return await self.bounded.call(lambda: function(*arguments, **options))

    async def scale(self, replicas: int) -> bool:
        """Once they are there; whether autoscaling was on. Raises ServeError, ValueError and Busy."""
        return await self._patient.call(self.endpoints.scale, replicas)

    def foresee(self, request: RunRequest) -> list[Step]:
        """What a run would do, and why. Raises RequestRefused, GraphError and StorageError."""
        accepted = self.orchestrator.check(request)
        asked = accepted.submission
        return foresee(accepted.graph, self.store, accepted.name, asked.until, asked.from_stage, asked.force)


class Curve:
    """A training's reports as they come; each part of them is read once."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._reader: MetricsReader | None = None

    def poll(self) -> list[dict[str, Any]] | None:
        """All reports, in order of their steps, or None where nothing is new. Raises RunError and StorageError."""
        if self._reader is None:
            folder = training_folder(Run.open(self._store, self._run_id))
            if folder is None:
                return None
            self._reader = MetricsReader(folder.child(METRICS))
        return self._reader.steps() if self._reader.poll() else None


@contextmanager
def told(tell: Callable[[str], object]) -> Iterator[None]:
    """A failure of the block is told, in one line, and is over with that; what of a defect is told is in the log."""
    try:
        yield
    except EXPECTED as error:
        tell(one_line(error))
    except Exception as error:
        log_defect("of the console", error)
        tell("the console failed on this; the service's log says where")
