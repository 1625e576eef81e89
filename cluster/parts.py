"""What a try at an artifact has finished when it is killed, and how the next one goes on from there.

    {artifact}/parts/{name}.json    the try that finished the part, its files with their checksums, what it came to, and
                                    the checksum of all that

A record is written when its files are durable, so whatever it names was whole once. The next try copies the files into
its own folder, each byte against its checksum, and so never depends on a folder that another try may still write to.
Records of rivals replace each other: each names files of its own writer, and either will do.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from cluster.artifact import Artifact, Attempt
from cluster.filesystem import TEMPORARY_PREFIX
from cluster.location import checked
from cluster.storage import JSON, FileEntry, NotFound

_FOLDER = "parts"
_SUFFIX = ".json"


def keep_part(attempt: Attempt, name: str, entries: Iterable[FileEntry], result: JSON) -> None:
    """Record that the part `name` comes to `result` and these files of the attempt, which are written already."""
    record: dict[str, Any] = {
        "attempt": attempt.name,
        "files": [asdict(entry) for entry in entries],
        "result": result,
    }
    attempt.artifact.store.write_json(_path(name), record | {"checksum": _checksum(record)})


def finished_parts(artifact: Artifact) -> set[str]:
    """Names of the parts on record."""
    return {path[len(_FOLDER) + 1 : -len(_SUFFIX)] for path in artifact.store.list(_FOLDER) if path.endswith(_SUFFIX)}


def adopt_part(attempt: Attempt, name: str) -> tuple[tuple[FileEntry, ...], JSON] | None:
    """A finished part's files, now in this attempt, and its result. None if it is not there, or not what it was."""
    try:
        record = dict(attempt.artifact.store.read_json(_path(name)))
        if record.pop("checksum") != _checksum(record):
            return None
        files, result = record["files"], record["result"]
        entries = tuple(FileEntry(checked(at["path"]), int(at["size"]), str(at["checksum"])) for at in files)
        source = attempt.artifact.attempt_store(checked(record["attempt"]))
        own = source == attempt.store
        for expected in entries:
            path = expected.path
            found = source.entry(path) if own else source.copy(path, attempt.store, path)
            if found != expected:
                return None
    except (NotFound, ValueError, TypeError, KeyError):
        return None
    if not own:
        keep_part(attempt, name, entries, result)
    return entries, result


def discard(attempt: Attempt) -> None:
    """Remove what a failed try wrote, unless a part of it is on record: the next try goes on from that."""
    if attempt.name not in _writers(attempt.artifact):
        attempt.artifact.store.delete(f"attempts/{attempt.name}")


def clear_parts(attempt: Attempt) -> None:
    """After the try's commit, won or lost: remove the records, and on a disk what the losers wrote.

    On a disk no other try can win any more; one that is still at it misses its files, and finds the manifest. On an
    object store, or a disk without hard links, a rival that found no manifest may still replace it by its own, so its
    files stay (`Attempt.commit`). Without records only this try is known to be at its end, and the others are left
    alone. A failure is no matter: nothing that counts is touched.
    """
    artifact = attempt.artifact
    with suppress(OSError):
        manifest = artifact.manifest()
        if manifest is None:
            return
        folder = artifact.store.local_path()
        if folder is not None and _has_links(folder):
            tries = os.listdir(folder / "attempts") if finished_parts(artifact) else [attempt.name]
            if (
                artifact.manifest() != manifest
            ):  # somebody deleted it meanwhile, and what is there may be another's work
                return
            for name in set(tries) - {manifest.attempt}:
                artifact.store.delete(f"attempts/{name}")
        artifact.store.delete(_FOLDER)


def _path(name: str) -> str:
    return f"{_FOLDER}/{name}{_SUFFIX}"


def _checksum(record: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def _writers(artifact: Artifact) -> Iterator[str]:
    return (str(artifact.store.read_json(_path(name))["attempt"]) for name in finished_parts(artifact))


def _has_links(folder: Path) -> bool:
    probe = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        os.link(folder / "manifest.json", probe)
    except OSError:
        return False
    probe.unlink()
    return True
