"""A run: one execution of a recipe, as a folder that anybody can read.

    {store}/runs/{run_id}/recipe.yaml     the resolved recipe, written once
    {store}/runs/{run_id}/status.json     state of the run and of each stage, replaced whole at each change
    {store}/runs/{run_id}/errors/         tracebacks of the stages that failed
    {store}/summaries/{run_id}.json       what a list of runs shows of the status; see `Run.save`

The driver renews the `heartbeat` in the status every few seconds. A run that says `running` with an old heartbeat has
lost its driver (killed, or its machine is gone) and can be resumed.
"""

import difflib
import logging
import os
import re
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cluster.head import JOB_ID
from cluster.storage import NotFound, StorageError, Store

HEARTBEAT_SECONDS = 5.0
LOST_AFTER_SECONDS = 60.0
SUMMARIES = "summaries"
RUN_ID_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
INTERRUPTED = "interrupted"
"""The error of a stage that a signal ended."""

T = TypeVar("T")
State = Literal["pending", "running", "done", "skipped", "failed"]

_SUMMARY = ("state", "created", "started", "ended", "error", "until", "job")
_log = logging.getLogger(__name__)


class RunError(ValueError):
    """A run that does not exist, exists already, or is not in the state that was asked for."""


@dataclass
class StageStatus:
    """Times are seconds since the epoch, UTC; `key` is the artifact's key, empty for a stage without an artifact."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", json_schema_serialization_defaults_required=True
    )

    state: State = "pending"
    key: str = ""
    started: float | None = None
    ended: float | None = None
    progress: str = ""
    error: str = ""


@dataclass
class RunStatus:
    """The run goes from the stage `from_stage` to the stage `until`, None for all on that side. `pid` on `host` is the
    driver; `heartbeat` is when it last said that it lives (seconds since the epoch). `job` is the id of the submitted
    job that it is, if it is one. `inputs`: the keys of artifacts that it starts from and does not make, by their
    stage."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    state: State = "pending"
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    heartbeat: float = 0.0
    host: str = ""
    pid: int = 0
    error: str = ""
    until: str | None = None
    from_stage: str | None = None
    job: str = ""
    stages: dict[str, StageStatus] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RunStatus":
        """Raises TypeError or KeyError for anything but a status."""
        return typed(cls, {**value, "stages": value["stages"]})

    def is_lost(self, now: float | None = None) -> bool:
        """True for a run that calls itself running while its driver is dead or silent for LOST_AFTER_SECONDS."""
        if self.state != "running":
            return False
        if self.host == socket.gethostname() and not _is_alive(self.pid):
            return True
        return (time.time() if now is None else now) - self.heartbeat > LOST_AFTER_SECONDS


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process, but a process
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state != "Z"  # killed, and not yet waited for by its parent


def new_run_id() -> str:
    """Sorts by time of creation (UTC, to the second), then random: `20260131-235959-1f4a9c`."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


class Run:
    """A run's folder. `store` is the project's store, `directory` the run's own folder in it."""

    def __init__(self, store: Store, run_id: str, recipe_yaml: str, status: RunStatus) -> None:
        self.store = store
        self.id = run_id
        self.recipe_yaml = recipe_yaml
        self.status = status
        self.directory = _directory(store, run_id)
        self._lock = threading.Lock()
        self._warned = False
        self._summary: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """What the recipe calls itself; empty if it does not."""
        return recipe_name(self.recipe_yaml)

    @classmethod
    def create(
        cls,
        store: Store,
        recipe_yaml: str,
        run_id: str | None = None,
        until: str | None = None,
        from_stage: str | None = None,
    ) -> "Run":
        """Begin the folder of a new run, which goes from one stage to another. Raises RunError if the id is malformed
        or taken."""
        run_id = new_run_id() if run_id is None else run_id
        directory = _directory(store, run_id)
        if directory.exists("status.json"):
            raise RunError(f"run {run_id!r} exists already; resume it, or choose another --run-id")
        directory.write_bytes("recipe.yaml", recipe_yaml.encode())
        run = cls(store, run_id, recipe_yaml, RunStatus(created=time.time(), until=until, from_stage=from_stage))
        run.save()
        return run

    @classmethod
    def open(cls, store: Store, run_id: str) -> "Run":
        """Read an existing run. Raises RunError, naming ids like it, if there is none."""
        directory = _directory(store, run_id)
        try:
            status = RunStatus.from_json(directory.read_json("status.json"))
            recipe_yaml = directory.read_bytes("recipe.yaml").decode()
        except NotFound:
            near = difflib.get_close_matches(run_id, known := list_runs(store), n=3, cutoff=0.5) or known[-3:]
            hint = f"did you mean {', '.join(near)}?" if near else "the store holds no runs"
            raise RunError(f"there is no run {run_id!r} in {store.uri}; {hint}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"run {run_id!r}: status.json or recipe.yaml is damaged ({error}); start anew") from error
        return cls(store, run_id, recipe_yaml, status)

    def save(self) -> None:
        """Write the status, whole; and when the run begins or ends its summary.

        The summary of a run that is over is written after the status, every other one before it: one that says that a
        run is over is always right, and of the others the status is to be read.
        """
        with self._lock:
            summary = {name: getattr(self.status, name) for name in _SUMMARY} | {"name": self.name}
            changed, is_over = summary != self._summary, self.status.state in ("done", "failed")
            if changed and not is_over:
                self.store.write_json(f"{SUMMARIES}/{self.id}.json", summary)
            self.directory.write_json("status.json", asdict(self.status))
            if changed and is_over:
                self.store.write_json(f"{SUMMARIES}/{self.id}.json", summary)
            self._summary = summary
            self._warned = False

    def replace_recipe(self, recipe_yaml: str) -> None:
        """The run goes on with another recipe than it began with."""
        self.recipe_yaml = recipe_yaml
        self.directory.write_bytes("recipe.yaml", recipe_yaml.encode())

    def delete(self) -> None:
        """Remove the run's folder and its summary; its artifacts stay."""
        self.store.delete(f"runs/{self.id}")
        self.store.delete(f"{SUMMARIES}/{self.id}.json")

    def keep_traceback(self, stage: str, error: BaseException) -> str | None:
        """Write what failed, at length, to `errors/{stage}.txt`; the status has the one line. Returns the file's URI,
        or None if the store does not take it."""
        text = "".join(traceback.format_exception(error))
        path = f"errors/{stage}.txt"
        try:
            self.directory.write_bytes(path, text.encode(errors="backslashreplace"))
        except StorageError as failure:  # the stage's own error is the one to report
            self._warn(failure)
            return None
        return self.directory.child(path).uri

    @contextmanager
    def driving(self) -> Iterator[None]:
        """This process drives the run: marks it running, keeps the heartbeat, and records how it ended.

        Raises RunError if another live process drives it.
        """
        self.check_undriven()
        now = time.time()
        self.status.state, self.status.error, self.status.ended = "running", "", None
        self.status.started, self.status.heartbeat = now, now
        self.status.host, self.status.pid = socket.gethostname(), os.getpid()
        self.status.job = os.environ.get(JOB_ID, "")
        self.save()
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(stop,), name=f"heartbeat-{self.id}", daemon=True)
        beat.start()
        try:
            yield
            self.status.state = "done"
        except BaseException as error:
            self.status.state, self.status.error = "failed", one_line(error)
            raise
        finally:
            stop.set()
            beat.join()
            self.status.ended = time.time()
            self.save_or_warn()

    def check_undriven(self) -> None:
        """Raises RunError if another live process drives the run."""
        try:
            current = RunStatus.from_json(self.directory.read_json("status.json"))
        except NotFound:
            return
        if current.state == "running" and not current.is_lost():
            driver = f"process {current.pid} on {current.host}"
            raise RunError(f"run {self.id!r} is still driven by {driver}; stop that first")

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            self.status.heartbeat = time.time()
            self.save_or_warn()

    def save_or_warn(self) -> None:
        """`save` for a status that is written again soon: a store that fails is warned of, once."""
        try:
            self.save()
        except StorageError as error:  # the work itself may go on, or ended with a more telling error
            self._warn(error)

    def _warn(self, failure: StorageError) -> None:
        """Once for each time that the store fails, however much is not written until it works again."""
        if not self._warned:
            _log.warning("the status of run %s was not written: %s", self.id, failure)
        self._warned = True


def list_runs(store: Store) -> list[str]:
    """Ids of all runs of a store, oldest first for ids made by `new_run_id`."""
    return sorted({path.split("/", 1)[0] for path in store.child("runs").list() if path.endswith("/status.json")})


def typed(kind: Callable[..., T], value: Any) -> T:
    """The dataclass of what was read as JSON. Raises TypeError that names the first field that does not fit."""
    try:
        made: T = _adapter(kind).validate_python(value)
        return made
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise TypeError(f"{where}: {first['msg']}" if where else first["msg"]) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def recipe_name(recipe_yaml: str) -> str:
    """The name that a recipe, as it is stored with a run, gives itself; empty if it gives none."""
    found = re.search(r"^name: *(['\"]?)([A-Za-z0-9][A-Za-z0-9._-]*)\1 *$", recipe_yaml, re.MULTILINE)
    return found[2] if found else ""


def one_line(error: BaseException) -> str:
    """What went wrong, in one line: of an error that carries a remote traceback, its last line."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return INTERRUPTED
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if any(line.startswith("Traceback") or line.startswith("ray::") for line in lines) else lines[0]


def _directory(store: Store, run_id: str) -> Store:
    if not re.fullmatch(RUN_ID_PATTERN, run_id):
        raise RunError(f"run id {run_id!r} is malformed; use up to 64 letters, digits, '.', '_' and '-'")
    return store.child("runs", run_id)
