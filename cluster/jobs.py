"""Submitted runs: thin over Ray's Jobs API.

A job carries our packages, so no node needs them installed, and starts in a folder of its own: the folder that a
program starts in comes first on its import path, and on a node that may be a checkout with another `llama` in it.

Every function takes `address`: a dashboard (`http://host:8265`), a cluster's own `host:port`, or `auto`. None:
RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else the cluster of `caravan up`. All raise ClusterError. `JobsApi` is for whoever
asks again and again.
"""

import asyncio
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from cluster.head import JOB_ID, ClusterError, answers, prepare_environment, recorded
from cluster.session import check_reachable, find_local, is_loopback, runtime_env
from cluster.storage import Store

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_RUN = "caravan_run"
_API_ADDRESS = "RAY_API_SERVER_ADDRESS"
_CLEAR_SECONDS = 50
"""What a job that is stopped may take to end what it has begun on the cluster, before it is killed. Ray's own is 3."""
_STOP_SECONDS = 60.0
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_ANSWER_SECONDS = 30.0
_SHOWN_RUNS = 10
_SILENT_SECONDS = 1.0


class JobNotFound(ClusterError):
    """The cluster has no job of that run."""


class JobExists(ClusterError):
    """The cluster has a job of that id already."""


@dataclass(frozen=True)
class Job:
    """One try at a run on a cluster.

    `status` is PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; `message` explains it; `started` and `ended` are seconds
    since the epoch. `driver` is Ray's own id of it, by which the cluster knows the actors that it started; empty before
    it has connected.
    """

    id: str
    run_id: str
    status: str
    message: str
    entrypoint: str
    started: float | None
    ended: float | None
    metadata: dict[str, str]
    driver: str = ""

    @property
    def is_over(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


def submit(
    entrypoint: str,
    run_id: str,
    *,
    address: str | None = None,
    files: Mapping[str, bytes] | None = None,
    env_vars: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    modules: Sequence[str] = (),
) -> Job:
    """Start the shell command `entrypoint` on the cluster's head, in a folder that holds just `files`.

    Its workers import the top-level `modules` as they are here too. The job's id is `run_id`, or where
    that is taken the first free of `{run_id}-2` and so on. `env_vars` and `metadata` are shown to everybody who can see
    the cluster: no secrets in them. Raises ValueError for a bad run id or file name, and ClusterError if the run is
    still going.
    """
    _check_id(run_id)
    with _client(address) as client:
        earlier = _jobs_of(client, run_id)
        for job in earlier:
            if not job.is_over:
                raise ClusterError(
                    f"run {run_id} is {job.status} as job {job.id}; stop it first: caravan stop {run_id}"
                )
        job_id = _submit(client, entrypoint, run_id, _free_id(client, run_id), files, env_vars, metadata, modules)
        return _job(client.get_job_info(job_id))


def check(address: str | None = None) -> None:
    """Raises ClusterError unless a Jobs API answers there: a look before anything is written for a job."""
    with _client(address) as client:
        client.list_jobs()


def list_jobs(address: str | None = None) -> list[Job]:
    """Every job that `submit` started there, oldest first."""
    with _client(address) as client:
        return _jobs_of(client)


def status(run_id: str, address: str | None = None) -> Job:
    """The run's latest job. Raises JobNotFound."""
    with _client(address) as client:
        return _latest(client, run_id)


def logs(run_id: str, address: str | None = None, *, follow: bool = False) -> Iterator[str]:
    """The output of the run's latest job, in pieces; with `follow` until the job is over, an empty piece for each
    second of silence. Raises JobNotFound."""
    with _client(address) as client:
        yield from _pieces(client, _latest(client, run_id).id, follow)


def stop(run_id: str, address: str | None = None) -> Job:
    """End the run's latest job, and return it once it is over; one that is over already stays as it is.

    Raises JobNotFound, and ClusterError if the job goes on for a minute.
    """
    with _client(address) as client:
        job = _latest(client, run_id)
        if not job.is_over:
            client.stop_job(job.id)
        deadline = time.monotonic() + _STOP_SECONDS
        while not job.is_over:
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job.id} is still {job.status} after {_STOP_SECONDS:.0f} s; try again")
            time.sleep(0.2)
            job = _job(client.get_job_info(job.id))
        return job


class JobsApi:
    """Ray's Jobs API at one address, connected when it is first asked. Thread-safe.

    Every method raises ClusterError; a request that is not answered for half a minute is given up.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._connected: JobSubmissionClient | None = None
        self._lock = threading.Lock()

    def list(self) -> list[Job]:
        """Every job of a run there, oldest first."""
        with self._client() as client:
            return _jobs_of(client)

    def submit(
        self, entrypoint: str, run_id: str, job_id: str, modules: Sequence[str] = (), metadata: Mapping[str, str] = {}
    ) -> None:
        """Start the shell command `entrypoint` on the cluster's head under just this id; the rest as for `submit`.

        Raises JobExists if there is a job of that id, whatever has become of it.
        """
        for name in (run_id, job_id):
            _check_id(name)
        with self._client() as client:
            try:
                _submit(client, entrypoint, run_id, job_id, metadata=metadata, modules=modules)
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise JobExists(f"the cluster has a job {job_id!r} already") from error
                raise

    def ask_to_stop(self, job_id: str) -> None:
        """The job gets SIGTERM, and some seconds later SIGKILL. Does not wait for that."""
        with self._client() as client:
            client.stop_job(job_id)

    def logs(self, job_id: str, *, follow: bool = False) -> Generator[str, None, None]:
        """What a job has printed, in pieces; with `follow` until it is over, and an empty one for each second of
        silence, so that whoever follows can leave."""
        with self._client() as client:
            yield from _pieces(client, job_id, follow)

    @contextmanager
    def _client(self) -> "Iterator[JobSubmissionClient]":
        with self._lock:
            if self._connected is None:
                self._connected = _connect(self._address, _bounded_client())
        with _told(self._address):
            yield self._connected


# -- inside


@contextmanager
def _client(address: str | None) -> "Iterator[JobSubmissionClient]":
    """Ray's client for that address; what it raises becomes a ClusterError."""
    target = _resolve(address)
    from ray.job_submission import JobSubmissionClient

    client = _connect(target, JobSubmissionClient)
    with _told(target):
        yield client


def _bounded_client() -> "type[JobSubmissionClient]":
    """Ray's client waits for an answer without end; this one does not."""
    from ray.job_submission import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": _ANSWER_SECONDS, **options})

    return BoundedClient


_environment = threading.Lock()


def _connect(target: str, kind: "type[JobSubmissionClient]") -> "JobSubmissionClient":
    # it reports every package that it uploads
    for name in ("ray.dashboard", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _environment:
        # Ray lets its environment overrule the address that its client is given
        before = os.environ.get(_API_ADDRESS)
        os.environ[_API_ADDRESS] = target
        try:
            return kind(target)
        except Exception as error:  # Ray names no common class: ConnectionError, RuntimeError, requests' own, ...
            raise ClusterError(f"no Jobs API answers at {target} ({error}); check the address") from error
        finally:
            if before is None:
                del os.environ[_API_ADDRESS]
            else:
                os.environ[_API_ADDRESS] = before


@contextmanager
def _told(target: str) -> Iterator[None]:
    """What Ray's client raises becomes a ClusterError."""
    try:
        yield
    except (ClusterError, ValueError):
        raise
    except Exception as error:
        raise ClusterError(f"the Jobs API at {target} failed: {error}") from error


def _check_id(run_id: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", run_id):
        raise ValueError(f"run_id={run_id!r} is not usable; use letters, digits, '.', '_' and '-'")


def _submit(
    client: "JobSubmissionClient",
    entrypoint: str,
    run_id: str,
    job_id: str,
    files: Mapping[str, bytes] | None = None,
    env_vars: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    modules: Sequence[str] = (),
) -> str:
    with tempfile.TemporaryDirectory(prefix="caravan-job-") as folder:
        for name, data in (files or {}).items():
            Store(folder).write_bytes(name, data)
        environment = {_STOP_WAIT: str(_CLEAR_SECONDS), **(env_vars or {}), JOB_ID: job_id}
        return client.submit_job(
            entrypoint=entrypoint,
            submission_id=job_id,
            runtime_env={**runtime_env(modules), "working_dir": folder, "env_vars": environment},
            metadata={**(metadata or {}), _RUN: run_id},
        )


def _pieces(client: "JobSubmissionClient", job_id: str, follow: bool) -> Iterator[str]:
    if not follow:
        yield client.get_job_logs(job_id)
        return
    pieces = client.tail_job_logs(job_id)
    loop = asyncio.new_event_loop()
    coming = asyncio.ensure_future(anext(pieces), loop=loop)
    try:
        while True:
            loop.run_until_complete(asyncio.wait([coming], timeout=_SILENT_SECONDS))
            if not coming.done():
                yield ""
                continue
            try:
                piece = coming.result()
            except StopAsyncIteration:
                return
            coming = asyncio.ensure_future(anext(pieces), loop=loop)
            yield piece
    finally:
        coming.cancel()
        loop.run_until_complete(asyncio.wait([coming]))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _resolve(address: str | None) -> str:
    address = address or os.environ.get(_API_ADDRESS) or os.environ.get("RAY_ADDRESS")
    if not address:
        record = recorded()
        if record is None:
            raise ClusterError("no cluster to talk to; start one (caravan up), or name one (--address)")
        address = record.dashboard_url
    if "://" in address:
        return address
    if address == "auto":
        address = find_local()
    prepare_environment(loopback=is_loopback(address))
    check_reachable(address)
    return f"http://{address}" if answers(f"http://{address}") else address


def _jobs_of(client: "JobSubmissionClient", run_id: str | None = None) -> list[Job]:
    details = [each for each in client.list_jobs() if each.submission_id and _RUN in (each.metadata or {})]
    jobs = sorted((_job(each) for each in details), key=lambda job: job.started or 0.0)
    return [job for job in jobs if run_id in (None, job.run_id)]


def _latest(client: "JobSubmissionClient", run_id: str) -> Job:
    jobs = _jobs_of(client)
    own = [job for job in jobs if job.run_id == run_id]
    if not own:
        known = list(dict.fromkeys(job.run_id for job in reversed(jobs)))
        more = f" and {len(known) - _SHOWN_RUNS} older" if len(known) > _SHOWN_RUNS else ""
        runs = f"its runs are {', '.join(known[:_SHOWN_RUNS])}{more}" if known else "it has none at all"
        raise JobNotFound(f"the cluster has no job of run {run_id!r}; {runs}")
    return own[-1]


def _free_id(client: "JobSubmissionClient", run_id: str) -> str:
    """Another run's second job may be called what a run is called, so every job's id counts."""
    taken = {each.submission_id for each in client.list_jobs()}
    candidates = (run_id if number == 1 else f"{run_id}-{number}" for number in count(1))
    return next(candidate for candidate in candidates if candidate not in taken)


def _job(details: "JobDetails") -> Job:
    metadata = dict(details.metadata or {})
    return Job(
        id=details.submission_id or "",
        run_id=metadata.pop(_RUN, ""),
        status=details.status.value,
        message=details.message or "",
        entrypoint=details.entrypoint,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        metadata=metadata,
        driver=details.driver_info.id if details.driver_info else "",
    )
