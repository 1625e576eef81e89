import errno
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import xxhash

from cluster.artifact import Artifact
from cluster.filesystem import AlreadyExists
from cluster.location import Location
from cluster.storage import FileEntry, FileStat, LocationError, NotFound, StorageError, Store, has_credentials


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


def _files_on_disk(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# -- URIs


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "empty"),
        ("a\0b", "zero byte"),
        ("s3://[bucket", "no URI"),
        ("s3://bucket:80/x", "no ':'"),
        ("ftp://host/dir", "unknown scheme 'ftp'"),
        ("file://relative/dir", "file:///dir"),
        ("file:///a/../b", "'..'"),
        ("s3://", "bucket is missing"),
        ("s3:///prefix", "bucket is missing"),
        ("s3://bucket/a#b", "%23"),
        ("s3://bucket/a?endpoint=host", "'endpoint'.*endpoint_override, region, scheme"),
        ("s3:/bucket/a", "one slash.*write s3://bucket/prefix"),
        ("file:/dir", "one slash.*write file:///prefix"),
        ("gs://user:password@bucket/a", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_bad_uri_is_refused_with_the_remedy(uri: str, message: str) -> None:
    with pytest.raises(LocationError, match=message):
        Store(uri)


def test_credentials_are_recognised_before_anything_is_sent_or_stored() -> None:
    for uri in (
        "s3://key:secret@bucket/x",
        "s3://key@bucket",
        "S3://key:sec/ret@bucket/x",
        "s3://key:sec#ret@bucket/x",
        "gs://user:secret@bucket",
        "ftp://user:secret@host/x",
    ):
        assert has_credentials(uri), uri
    for uri in ("", "some/dir", "/a:b/c@d", "file:///a@b:c", "s3://bucket/a@b:c?region=x", "gs://anonymous@bucket/x"):
        assert not has_credentials(uri), uri


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hun/ter2@bucket/x",
        "s3://key:hun#ter2@bucket/x",
        "s3://key:hun?ter2@bucket/x",
        "s3://key:hunter2@[bucket/x",
        "s3://key:hunter2\u2100@bucket/x",
        "s3://bucket/x?endpoint_override=key:hunter2@host:1",
        "s3://key:hunter2@bucket/x?bogus=1",
        "ftp://key:hun/ter2@host/x",
    ],
)
def test_refusal_shows_no_secret(uri: str) -> None:
    with pytest.raises(LocationError) as refused:
        Store(uri)
    assert "hun" not in str(refused.value) and "ter2" not in str(refused.value)


def test_bare_path_is_the_same_store_as_its_file_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("some dir") == Store(tmp_path / "some dir") == Store(f"file://{tmp_path}/some%20dir/")
    assert Store("some dir").local_path("a/b") == tmp_path / "some dir" / "a" / "b"
    assert Store("s3://bucket/x").local_path("a") is None


def test_child_keeps_the_options_and_nothing_leaves_the_store(store: Store) -> None:
    remote = Store("s3://bucket/runs?endpoint_override=127.0.0.1:9&scheme=http")
    assert remote.child("a", "b/c").uri == "s3://bucket/runs/a/b/c?endpoint_override=127.0.0.1:9&scheme=http"
    assert Store("s3://bucket").child("a").uri == "s3://bucket/a"
    for path in ("..", "a/../b", "/etc/passwd", "a//b", "./a", "a/", "a\0b", ".caravan-tmp-x"):
        for call in (
            store.child,
            store.exists,
            store.read_bytes,
            store.list,
            store.delete,
            store.local_path,
            lambda path: store.write_bytes(path, b""),
            lambda path: store.upload(__file__, path),
            lambda path: store.download(path, "/dev/null"),
        ):
            with pytest.raises(LocationError, match="not a plain relative path|files being written"):
                call(path)
    with pytest.raises(ValueError, match="not a plain relative path"):
        store.delete("")


def test_secrets_are_shown_nowhere_and_still_travel_to_workers() -> None:
    store = Store("s3://some-user:pass%2Fword@bucket/x?endpoint_override=127.0.0.1:1&scheme=http").child("y")
    with pytest.raises(StorageError) as failure:
        store.read_bytes("z")
    for text in (store.uri, str(store), repr(store), str(failure.value), repr(Artifact(store))):
        assert "some-user" not in text and "word" not in text and "***@bucket" in text
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store and copy._location.password == "pass/word"
    with pytest.raises(ValueError) as refused:
        Store("s3://bucket/x?secret_key=hunter2")
    assert "hunter2" not in str(refused.value)


# -- files on disk


def test_files_round_trip(store: Store, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    entry = store.write_bytes("a/b.bin", data)
    assert entry == FileEntry("a/b.bin", len(data), f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}")
    assert store.read_bytes("a/b.bin") == data and store.entry("a/b.bin") == entry
    assert store.exists("a/b.bin") and not store.exists("a") and not store.exists("a/c")
    store.write_json("status.json", {"step": 3})
    assert store.read_json("status.json") == {"step": 3}
    (tmp_path / "in").write_bytes(data)
    assert store.upload(tmp_path / "in", "c/up").checksum == entry.checksum
    assert store.download("c/up", tmp_path / "out/put") == FileEntry("c/up", len(data), entry.checksum)
    assert (tmp_path / "out/put").read_bytes() == data
    with store.open_input("a/b.bin") as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]


def test_list_is_recursive_sorted_and_relative_to_the_store(store: Store) -> None:
    for path in ("b/2", "b/1/x", "a", "bb/3"):
        store.write_bytes(path, b"1234")
    assert store.list() == ["a", "b/1/x", "b/2", "bb/3"]
    assert store.list("b") == ["b/1/x", "b/2"] and store.child("b").list() == ["1/x", "2"]
    assert store.list("nowhere") == [] and store.sizes("b") == {"b/1/x": 4, "b/2": 4}
    store.delete("b")
    store.delete("b")
    assert store.list() == ["a", "bb/3"]


def test_stats_tell_a_replaced_file_of_the_same_size(store: Store, tmp_path: Path) -> None:
    store.write_bytes("a/x", b"old")
    os.utime(tmp_path / "store/a/x", ns=(1, 1_000_000_007))
    assert store.stats() == {"a/x": FileStat(3, 1_000_000_007)} == store.stats("a")
    store.write_bytes("a/x", b"new")
    assert store.stats()["a/x"].size == 3 and store.stats()["a/x"].mtime_ns > 1_000_000_007


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_json_is_not_written(store: Store, value: float) -> None:
    with pytest.raises(ValueError, match=r"store: status\.json cannot be JSON"):
        store.write_json("status.json", {"loss": [1.0, value]})
    assert store.list() == []


@pytest.mark.parametrize("links", [True, False])
def test_exclusive_write_leaves_the_earlier_file(
    store: Store, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    store.write_bytes("x", b"first", exclusive=True)
    with pytest.raises(AlreadyExists, match="store/x: there is such a file"):
        store.write_bytes("x", b"second", exclusive=True)
    assert store.read_bytes("x") == b"first" and _files_on_disk(tmp_path / "store") == ["x"]


def test_write_that_fails_leaves_the_older_file_and_no_trace(store: Store, tmp_path: Path) -> None:
    store.write_bytes("x", b"old")
    with pytest.raises(RuntimeError), store.open_output("x") as output:
        output.write(b"half of the new")
        assert store.list() == ["x"], "a file in the making is not listed"
        raise RuntimeError
    assert store.read_bytes("x") == b"old" and _files_on_disk(tmp_path / "store") == ["x"]
    assert not hasattr(output, "entry")


def test_writer_killed_in_the_middle_leaves_nothing_that_is_listed(store: Store) -> None:
    script = (
        "import os, sys; from cluster.storage import Store\n"
        "with Store(sys.argv[1]).open_output('x') as output:\n"
        "    output.write(b'half'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, store.uri]).returncode == -9
    assert store.list() == [] and not store.exists("x")


def test_full_disk_is_one_clear_error(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"store: cannot write 'x': the disk is full; free some space"):
        store.write_bytes("x", b"data")
    assert _files_on_disk(tmp_path) == []


def test_missing_file_unusable_folder_and_bad_json_name_what_and_where(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"file://.*/store: cannot read 'nothing': there is no such file"):
        store.read_bytes("nothing")
    with pytest.raises(FileNotFoundError):
        store.open_input("nothing")
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(StorageError, match="a parent of the path is a file"):
        Store(tmp_path / "plain" / "store").check_writable()
    with pytest.raises(
        StorageError, match=r"^file:///proc/x: cannot write .*: no file can be made there; choose another"
    ):
        Store("/proc/x").check_writable()
    store.write_bytes("x.json", b"{")
    with pytest.raises(ValueError, match="x.json is not valid JSON"):
        store.read_json("x.json")
    store.check_writable()
    assert store.list() == ["x.json"]


def test_no_permission_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = Path("/sys/kernel")  # not even root may make files there
    else:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
    with pytest.raises(StorageError, match="no permission|read-only"):
        Store(folder / "store").check_writable()


def test_what_a_client_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert Location.parse("s3://bucket/a").keyless and Location.parse("s3://bucket/a").cloud
    assert not Location.parse("s3://key:secret@bucket/a?endpoint_override=host:1").keyless
    assert not Location.parse("s3://bucket/a?endpoint_override=host:1").cloud
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    assert not Location.parse("s3://bucket/a").keyless


def test_a_glob_is_shown_as_it_was_written() -> None:
    store = Store("s3://bucket/web/**/[!a] b%25.txt?endpoint_override=127.0.0.1:1&scheme=http")
    with pytest.raises(
        StorageError, match=re.escape("s3://bucket/web/**/[!a]%20b%25.txt?endpoint_override=127.0.0.1:1")
    ):
        store.list()


def test_arrow_can_write_its_files_through_a_store(store: Store) -> None:
    table = pa.table({"tokens": list(range(1000))})
    with store.open_output("shard.arrow") as output, pa.ipc.new_file(output, table.schema) as writer:
        writer.write_table(table)
    with store.open_input("shard.arrow") as file:
        assert pa.ipc.open_file(file).read_all() == table
    assert store.entry("shard.arrow") == output.entry


def test_folders_are_those_right_below(store: Store) -> None:
    for path in ("a/x", "b/c/y", "b/z", "top"):
        store.write_bytes(path, b"")
    assert (store.folders(), store.folders("b"), store.folders("no")) == (("a", "b"), ("c",), ())
