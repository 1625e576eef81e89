"""The store on a real S3 service: OpenStack Swift, started by the fixture."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from cluster.artifact import Artifact, CorruptArtifact
from cluster.filesystem import BLOCK_BYTES, AlreadyExists
from cluster.storage import NotFound, StorageError, Store
from tests.swift import Swift

pytestmark = pytest.mark.integration

LONG = 20 * 2**20  # more than one block, so it travels as a multipart upload


@pytest.fixture(scope="module")
def bucket(swift: Swift) -> str:
    return swift.make_bucket()


@pytest.fixture
def store(swift: Swift, bucket: str, request: pytest.FixtureRequest) -> Store:
    return Store(swift.uri(bucket, request.node.name))


def test_files_round_trip(store: Store, tmp_path: Path) -> None:
    small, long = b"small", os.urandom(LONG)
    entries = [store.write_bytes("a/small", small), store.write_bytes("a/long", long), store.write_bytes("empty", b"")]
    assert store.list() == ["a/long", "a/small", "empty"] and store.list("a") == ["a/long", "a/small"]
    assert store.sizes() == {"a/long": LONG, "a/small": 5, "empty": 0} and store.list("nowhere") == []
    assert [store.entry(entry.path) for entry in entries] == entries
    assert store.read_bytes("a/long") == long and store.read_bytes("empty") == b""
    assert {path: stat.size for path, stat in store.stats("a").items()} == {"a/long": LONG, "a/small": 5}
    assert all(abs(stat.mtime_ns / 1e9 - time.time()) < 600 for stat in store.stats().values())
    with pytest.raises(AlreadyExists):
        store.write_bytes("a/small", b"other", exclusive=True)
    assert store.exists("a/small") and not store.exists("a") and not store.exists("b")
    with store.open_input("a/long") as file:
        assert file.seek(-7, os.SEEK_END) == LONG - 7 and file.read(100) == long[-7:]
        file.seek(BLOCK_BYTES - 3)
        assert file.read(10) == long[BLOCK_BYTES - 3 :][:10]
    assert store.download("a/long", tmp_path / "x") == entries[1] and (tmp_path / "x").read_bytes() == long
    copy = pickle.loads(pickle.dumps(store))
    assert copy.upload(tmp_path / "x", "b/copy").checksum == entries[1].checksum
    store.delete("a")
    store.delete("a")
    assert store.list() == ["b/copy", "empty"]


@pytest.mark.parametrize("size", [100, LONG])
def test_write_that_fails_leaves_nothing(store: Store, size: int) -> None:
    with pytest.raises(RuntimeError), store.open_output("x") as output:
        output.write(bytes(size))
        raise RuntimeError
    assert store.list() == [] and not hasattr(output, "entry")


def test_short_write_that_fails_leaves_the_older_object(store: Store) -> None:
    store.write_bytes("x", b"old")
    with pytest.raises(RuntimeError), store.open_output("x") as output:
        output.write(b"new")
        raise RuntimeError
    assert store.read_bytes("x") == b"old"


def test_writer_killed_in_the_middle_leaves_nothing(store: Store) -> None:
    script = (
        "import os, sys; from cluster.storage import Store\n"
        "with Store(sys.argv[1]).open_output('x') as output:\n"
        f"    output.write(bytes({LONG})); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, store.uri]).returncode == -9
    assert store.list() == []


def test_artifact_is_fetched_once_and_verified(store: Store, tmp_path: Path) -> None:
    artifact = Artifact(store)
    attempt, zombie = artifact.begin(), artifact.begin()
    data = os.urandom(LONG)
    attempt.store.write_bytes("deep/long", data)
    attempt.store.write_bytes("small", b"small")
    zombie.store.write_bytes("small", b"other")
    manifest = attempt.commit({"steps": 3})
    assert zombie.commit({}) == manifest == artifact.verify()

    cache, folders = tmp_path / "cache", []
    threads = [threading.Thread(target=lambda: folders.append(artifact.fetch(cache))) for _ in range(3)]
    (cache / f"{manifest.attempt}.partial").mkdir(parents=True)  # what a killed fetcher left
    (cache / f"{manifest.attempt}.partial" / "small").write_bytes(b"smell")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache / manifest.attempt] * 3
    assert (folders[0] / "deep/long").read_bytes() == data and (folders[0] / "small").read_bytes() == b"small"
    assert sorted(path.name for path in cache.iterdir()) == [manifest.attempt, f"{manifest.attempt}.lock"]

    (folders[0] / "small").write_bytes(b"cut")
    assert (artifact.fetch(cache) / "small").read_bytes() == b"small", "a damaged copy is fetched anew"
    artifact.files.write_bytes("small", b"smelt")
    with pytest.raises(CorruptArtifact, match="small is 5 bytes"):
        artifact.fetch(tmp_path / "other")
    assert not (tmp_path / "other" / manifest.attempt).exists()
    artifact.delete()
    assert not artifact.committed and store.list() == []


def test_missing_object_bucket_permission_and_service_are_told_apart(
    swift: Swift, bucket: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound, match="cannot read 'nothing': there is no such file"):
        store.read_bytes("nothing")
    with pytest.raises(StorageError, match="the bucket does not exist; create it"):
        Store(swift.uri("no-such-bucket", "x")).check_writable()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StorageError, match="access is denied; check AWS_ACCESS_KEY_ID") as denied:
        Store(swift.uri(bucket, "x")).check_writable()
    assert "wrong-secret" not in str(denied.value)
    with pytest.raises(StorageError, match="access is denied"):
        Store(swift.uri(bucket, "x")).exists("anything")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StorageError, match="access is denied; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"):
        Store(swift.uri(bucket, "x")).exists("anything")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", swift.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", swift.secret_key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    unreachable = Store(f"s3://bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http")
    with pytest.raises(StorageError, match="cannot be reached; check the URI's endpoint_override"):
        unreachable.write_bytes("y", b"data")


def test_an_object_that_goes_between_opening_and_reading_is_not_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Store.open_input

    def open_and_lose(self: Store, path: str) -> BinaryIO:
        file = opened(self, path)
        self.delete(path)
        return file

    store.write_bytes("claim", b"x")
    monkeypatch.setattr(Store, "open_input", open_and_lose)
    with pytest.raises(NotFound, match="there is no such file"):
        store.read_bytes("claim")


def test_store_that_fails_during_a_write_never_yields_an_entry(swift: Swift, store: Store) -> None:
    artifact = Artifact(store)
    attempt = artifact.begin()
    try:
        with pytest.raises(StorageError, match="cannot write 'x'"), attempt.store.open_output("x") as output:
            output.write(bytes(LONG))
            swift.kill("object")
            output.write(bytes(LONG))
        with pytest.raises(StorageError, match="the store's service failed"):
            artifact.manifest()
    finally:
        swift.start("object")
    assert not hasattr(output, "entry") and not artifact.committed and store.list() == []
