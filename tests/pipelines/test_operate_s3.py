"""Leases and the removal of artifacts on a real S3 service: OpenStack Swift, started by the fixture."""

import time

import pytest

from cluster.artifact import Artifact
from cluster.condemn import settled
from cluster.lease import Claim
from cluster.storage import Store
from pipelines.garbage import collect
from pipelines.retention import Policy
from tests.swift import Swift

pytestmark = pytest.mark.integration


@pytest.fixture
def store(swift: Swift, request: pytest.FixtureRequest) -> Store:
    return Store(swift.uri(swift.make_bucket(), request.node.name))


def test_claims_queue_and_are_given_up(store: Store) -> None:
    with Claim.enter(store, "run 1") as first, Claim.enter(store, "run 2") as second:
        assert (second.blocker(), first.blocker()) == ("run 1", None)
        first.renew()
        assert second.blocker() == "run 1"
        first.close()
        assert second.blocker() is None
    assert store.list() == []


def test_what_nobody_needs_is_removed_and_what_is_needed_stays(store: Store) -> None:
    for key in ("kept", "gone"):
        attempt = Artifact(store.child("artifacts", "stage", key)).begin()
        attempt.store.write_bytes("x", b"1")
        attempt.commit({})
    stages = {"stage": {"key": "kept"}}
    store.write_json("runs/r/status.json", {"state": "done", "created": time.time(), "stages": stages})
    assert [plan.address for plan in collect(store, Policy()).removed] == [("stage", "gone")]
    assert [path.split("/")[2] for path in store.list("artifacts")] == ["kept", "kept"]
    assert settled(Artifact(store.child("artifacts", "stage", "kept"))) is not None
    assert collect(store, Policy(keep_last=0)).left == [] and store.list("artifacts") == []
