"""Holds on artifacts: what an endpoint serves stays in the store, whatever becomes of the run that made it.

    {artifact}/holds/{endpoint}.json    who serves it, and since when

A replica that starts reads its weights from the store, so a hold lasts until the endpoint serves something else or is
removed. One that a cluster has left behind when it ended is removed by hand.
"""

from __future__ import annotations

import logging
import socket
from datetime import UTC, datetime
from urllib.parse import urlsplit

import xxhash

from cluster.artifact import Artifact
from cluster.condemn import settled
from cluster.storage import StorageError, Store

FOLDER = "holds"

_log = logging.getLogger(__name__)


def take(uri: str, dashboard_url: str) -> None:
    """The endpoint of the cluster with this dashboard serves what lies at `uri`, from now on.

    Of what is no committed artifact nobody removes anything. A store that takes no hold is logged: it may be one that
    nobody here can remove anything from. Returns once nobody who had not seen the hold may be removing the artifact.
    """
    artifact = Artifact(Store(uri))
    who = f"the endpoint of the cluster at {dashboard_url}, deployed from {socket.gethostname()}"
    try:
        if artifact.committed:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            artifact.store.write_json(_path(dashboard_url), {"holder": who, "since": since})
            settled(artifact, lambda blocker: _log.warning("%s waits for %s", artifact.store.uri, blocker))
    except StorageError as error:
        _log.warning("%s is served without a hold, and may be removed as unused: %s", artifact.store.uri, error)


def release(uri: str, dashboard_url: str) -> None:
    """The endpoint serves it no more."""
    store = Store(uri)
    try:
        if store.exists(_path(dashboard_url)):
            store.delete(_path(dashboard_url))
    except StorageError as error:
        _log.warning("%s is still held, though it is served no more: %s", store.uri, error)


def _path(dashboard_url: str) -> str:
    """Every machine has a loopback of its own."""
    host = urlsplit(dashboard_url).hostname or ""
    here = socket.gethostname() if host in ("localhost", "::1") or host.startswith("127.") else ""
    return f"{FOLDER}/{xxhash.xxh3_64_hexdigest(f'{here} {dashboard_url}'.encode())}.json"
