"""The checks of `caravan doctor` that ask somebody else: the store, and the Ray cluster."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from cluster import head, session
from cluster.head import ClusterError, ClusterRecord
from cluster.storage import StorageError, Store
from pipelines.doctor import Check, Finding, disk, timed

_SKEW_SECONDS = 60.0
"""S3 refuses requests of a clock that is 15 minutes off; a lease or a log is confused by less."""
_SLOW_MS = 2000.0
_CREDENTIALS = "check its URI, and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the cloud's own) in the environment"


def checks(store: Store, address: str | None) -> list[Check]:
    """`address` as for `caravan submit`; None: the environment's, else the cluster of `caravan up`."""
    local = store.local_path()
    return [
        Check("store", lambda: round_trip(store), 30),
        *([] if local is None else [Check("disk", lambda: disk("the store", local))]),
        Check("token", lambda: token(os.environ, Path.home() / ".ray" / "auth_token")),
        Check("ray", lambda: cluster(address), 30),
    ]


def round_trip(store: Store) -> Iterator[Finding]:
    """A file written, read, listed and deleted, each with its time; and the store's clock against ours."""
    folder, data = f"doctor-{uuid.uuid4().hex}", os.urandom(1 << 10)
    times: dict[str, float] = {}
    try:
        before = time.time()
        times["write"] = timed(lambda: store.write_bytes(f"{folder}/probe", data))
        after = time.time()
        read: list[bytes] = []
        times["read"] = timed(lambda: read.append(store.read_bytes(f"{folder}/probe")))
        listed: list[dict[str, int]] = []
        times["list"] = timed(lambda: listed.append(store.sizes(folder)))
        stats = store.stats(folder).get(f"{folder}/probe")
    except StorageError as error:
        yield Finding("store", "fail", str(error), _CREDENTIALS)
        return
    finally:
        try:
            times["delete"] = timed(lambda: store.delete(folder))
            remains = store.exists(f"{folder}/probe")
        except StorageError:
            remains = True
    told = f"{store.uri}: " + ", ".join(f"{name} {taken:.0f} ms" for name, taken in times.items())
    if read != [data]:
        yield Finding("store", "fail", f"{store.uri} gives back other bytes than were written", "use another store")
    elif remains:
        yield Finding("store", "fail", f"{store.uri}/{folder} cannot be deleted", "allow deleting, then remove it")
    elif listed != [{f"{folder}/probe": len(data)}]:
        remedy = "wait before you ask for what was just written; runs read by name and are not misled"
        yield Finding("store", "warn", f"{told}; its listing lags behind what is written", remedy)
    elif max(times.values()) > _SLOW_MS:
        yield Finding("store", "warn", told, "every checkpoint and manifest takes this; use one nearer to the cluster")
    else:
        yield Finding("store", "ok", told)
    if stats is not None:
        yield clock(stats.mtime_ns / 1e9, before, after)


def clock(written: float, before: float, after: float) -> Finding:
    """The store's time of a file that was written between `before` and `after` of our clock, all in seconds."""
    skew = max(before - written, written - after, 0.0)
    if skew > _SKEW_SECONDS:
        told = f"the store's clock and this machine's are {skew:.0f} s apart"
        return Finding("clock", "fail", told, "synchronise the clocks (chrony, systemd-timesyncd)")
    return Finding("clock", "ok", f"within {skew:.1f} s of the store's")


def token(environment: Mapping[str, str], default: Path) -> Iterator[Finding]:
    """How this process would authenticate with Ray, and who else may read its token. `default`: Ray's own file."""
    mode = environment.get("RAY_AUTH_MODE")
    file = Path(environment["RAY_AUTH_TOKEN_PATH"]) if environment.get("RAY_AUTH_TOKEN_PATH") else default
    if environment.get("RAY_AUTH_TOKEN"):
        held = "the token is RAY_AUTH_TOKEN's"
    elif file.exists():
        status = file.stat()
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            allowed = f"{file} may be used by others (mode {stat.S_IMODE(status.st_mode):03o})"
            yield Finding("token", "fail", allowed, f"chmod 600 {file}")
            return
        held = f"the token is in {file}"
    else:
        held = ""
    if mode == "token" and not held:
        remedy = "ray get-auth-token --generate, or copy the cluster's"
        yield Finding("token", "fail", f"RAY_AUTH_MODE=token and there is no token (no RAY_AUTH_TOKEN, {file})", remedy)
    elif mode is None and held:
        remedy = "set RAY_AUTH_MODE=token for clusters that ask for it, or disabled"
        yield Finding("token", "warn", f"{held}, and RAY_AUTH_MODE is not set: Ray decides by itself", remedy)
    else:
        yield Finding("token", "ok", f"RAY_AUTH_MODE={mode or '(not set)'}{', ' if held else ''}{held}")


def cluster(address: str | None) -> Iterator[Finding]:
    """Whether a cluster is there, of our Ray's version, and whether others could use it. It is not joined."""
    ended = head.left_behind()
    if ended is not None:
        yield Finding("cluster", "fail", f"the head of `caravan up` at {ended.address} has ended", "caravan down")
    try:
        url = _dashboard(address, None if ended else head.recorded())
    except ClusterError as error:
        yield Finding("ray", "fail", str(error), "check --address and RAY_ADDRESS")
        return
    if url is None:
        yield Finding("ray", "ok", "no cluster is named or up here; a run starts its own")
    else:
        yield from dashboard(url)


def _dashboard(address: str | None, record: ClusterRecord | None) -> str | None:
    """The URL of the cluster's dashboard; None without a cluster. Raises ClusterError."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return None if record is None or address == "local" else record.dashboard_url
    if "://" in address:
        return address.rstrip("/")
    if address == "auto":
        address = session.find_local()
    session.check_reachable(address)
    if head.answers(f"http://{address}"):
        return f"http://{address}"
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        return ray_address_to_api_server_url(address)  # which asks the cluster
    except Exception as error:  # Ray names no common class
        told = " ".join(str(error).split())[:200]
        raise ClusterError(f"{address} accepts connections and does not answer as a cluster: {told}") from error


def dashboard(url: str) -> Iterator[Finding]:
    """Ray's version behind a dashboard, and whether its Jobs API, which runs any command, asks for a token."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    ours = metadata.version("ray")
    status, body = _get(f"{url}/api/version", get_auth_headers_if_auth_enabled({}))
    open_to_all = _get(f"{url}/api/jobs/", {})[0] == 200
    if status is None:
        yield Finding("ray", "fail", f"no dashboard answers at {url}: {body}", "check --address, or: caravan up")
        return
    try:
        theirs = json.loads(body)["ray_version"] if status == 200 else None
    except (ValueError, KeyError, TypeError):
        theirs = None
    if status in (401, 403):
        remedy = "RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        yield Finding("ray", "fail", f"the dashboard at {url} refuses us ({status})", remedy)
    elif theirs is None:
        yield Finding("ray", "fail", f"what answers at {url} ({status}) is no Ray dashboard", "check --address")
    elif theirs != ours:
        yield Finding("ray", "fail", f"{url} runs Ray {theirs}, here is {ours}", f"pip install 'ray=={theirs}' here")
    else:
        yield Finding("ray", "ok", f"Ray {theirs} at {url}")
    if not open_to_all:
        yield Finding("dashboard", "ok", "its Jobs API asks for a token")
    elif (outside := _seen_from_outside(url)) is None:
        yield Finding("dashboard", "ok", "no token asked, and reached over loopback only")
    else:
        remedy = "start Ray with RAY_AUTH_MODE=token and --dashboard-host=127.0.0.1, and reach it by a tunnel"
        yield Finding("dashboard", "fail", f"whoever reaches {outside} may run commands: no token is asked", remedy)


def _seen_from_outside(url: str) -> str | None:
    """Where an open dashboard is reached beyond loopback: at `url`, or at this machine's own address."""
    parts = urlsplit(url)
    if not session.is_loopback(f"{parts.hostname}:0"):
        return parts.netloc
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of nobody's; nothing is sent, but the way there is chosen
        except OSError:
            return None
        own = probe.getsockname()[0]
    if session.is_loopback(f"{own}:0"):
        return None
    return f"{own}:{parts.port}" if _get(f"http://{own}:{parts.port}/api/jobs/", {})[0] == 200 else None


def _get(url: str, headers: dict[str, str]) -> tuple[int | None, str]:
    """Status and body of an answer; None and the reason without one."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between us and a cluster
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as reply:
            return reply.status, reply.read(1 << 20).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        return None, str(error)
