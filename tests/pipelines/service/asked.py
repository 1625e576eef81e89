"""A service that the `caravan` commands of this process find, as they do that of `caravan up`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from cluster.storage import Store
from pipelines.service.api import build_api
from pipelines.service.loop import Orchestrator
from tests.pipelines.service.fakes import FakeCluster, client_of

NAMED = "http://service:1"
"""What --address names it by."""


@contextmanager
def found_service(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Orchestrator, FakeCluster]]:
    """Its store is not the commands' own one in `home`."""
    monkeypatch.setenv("CARAVAN_HOME", str(home))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "CARAVAN_JOB"):
        monkeypatch.delenv(name, raising=False)
    store = Store(home / "of the service")
    cluster = FakeCluster(store)
    service = Orchestrator(store, cluster, cluster)
    service.tick()
    with TestClient(build_api(service)) as application:
        monkeypatch.setattr(
            "pipelines.service.client.find_service",
            lambda address: client_of(application) if address in (None, NAMED) else None,
        )
        yield service, cluster
