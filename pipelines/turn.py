"""Whose turn it is to make an artifact, so that of several runs that need it one computes it (cluster/lease.py), and
none takes for granted what is about to be removed (cluster/condemn.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.artifact import Artifact, Manifest
from cluster.condemn import settled
from cluster.lease import PAUSES_S, Claim
from cluster.storage import StorageError
from llama.retry import retried

_log = logging.getLogger(__name__)


@contextmanager
def claimed(artifact: Artifact, holder: str) -> Iterator[Claim | None]:
    """A place in the queue while the block runs; None where the store takes no claims just now."""
    try:
        claim = Claim.enter(artifact.store, holder)
    except StorageError as error:  # it would save work, no more
        _log.warning("%s is made without a lease: %s", artifact.store.uri, error)
        yield None
        return
    with claim:
        yield claim


def await_turn(artifact: Artifact, claim: Claim | None, wait: Callable[[str], None]) -> Manifest | None:
    """Waits while others make the artifact, or remove it. Returns what is committed, None: it is our turn to make it.

    `wait` is called with who that is; it waits for about a second, or raises. Call it once the need for the artifact
    is on record. Raises StorageError, and CorruptArtifact for a manifest that is none.
    """

    def settle() -> Manifest | None:
        return settled(artifact, wait, sleep=lambda seconds: None)

    if (manifest := settle()) is not None:
        return manifest
    while claim is not None and (blocker := _blocker(claim, artifact)) is not None and artifact.manifest() is None:
        wait(blocker)
    return settle()


def _blocker(claim: Claim, artifact: Artifact) -> str | None:
    try:
        return retried(claim.blocker, f"a look at {artifact.store.uri}", on=(StorageError,), pauses=PAUSES_S)
    except StorageError as error:
        _log.warning("%s is made without waiting for others: %s", artifact.store.uri, error)
        return None
