"""What lies below a store: errors in words, reading in blocks, writing of objects."""

import os
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from cluster.filesystem import HELD_BYTES, BlockCachedFile, ObjectFiles, explain, may_have_gone


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("When putting x: AWS Error NO_SUCH_BUCKET during PutObject operation", "the bucket does not exist"),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body.", "access is denied"),
        ("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7", "cannot be reached"),
    ],
)
def test_errors_of_object_stores_are_explained(text: str, problem: str) -> None:
    assert problem in explain(OSError(text))[0]


def test_only_a_read_that_was_answered_may_have_met_a_deleted_object() -> None:
    assert may_have_gone(OSError("AWS Error NO_SUCH_KEY during GetObject operation: The specified key does not exist."))
    assert may_have_gone(OSError("AWS Error INTERNAL_FAILURE during GetObject operation: Failed to flush response"))
    assert not may_have_gone(OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7"))
    assert not may_have_gone(OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: no such bucket"))


def test_the_remedy_fits_what_the_client_was_told() -> None:
    refused = OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body.")
    assert "are not set: set them" in explain(refused, keyless=True)[1]
    assert explain(refused)[0] == "the store refused the request"
    assert explain(OSError("Odd.\nMore.")) == ("Odd", "check the URI and the store, then run again")
    lost = OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7")
    assert "check the URI's endpoint_override" in explain(lost)[1]
    assert "check the network" in explain(lost, cloud=True)[1]


class _CountingSource:
    def __init__(self, data: bytes) -> None:
        self.data, self.requests = data, 0

    def size(self) -> int:
        return len(self.data)

    def read_at(self, nbytes: int, offset: int) -> bytes:
        self.requests += 1
        return self.data[offset : offset + nbytes]

    def close(self) -> None:
        pass


def test_block_cached_file_reads_like_a_file_with_few_requests(tmp_path: Path) -> None:
    data = os.urandom(1000)
    (tmp_path / "x").write_bytes(data)
    source = _CountingSource(data)
    cached = BlockCachedFile(source, block_bytes=64, num_blocks=2)
    moves = [(0, 3), (3, 200), (990, 50), (5, 1), (64, 64), (64, 128), (63, 130), (999, 1), (1000, 1), (2000, 5)]
    moves.append((0, -1))
    with open(tmp_path / "x", "rb", buffering=0) as plain:
        for offset, count in moves:
            assert cached.seek(offset) == plain.seek(offset)
            assert cached.read(count) == plain.read(count), (offset, count)
            assert cached.tell() == plain.tell()
    before = source.requests
    for offset in range(128, 192):
        cached.seek(offset)
        assert cached.read(1) == data[offset : offset + 1]
    assert source.requests - before <= 1
    cached.seek(0)
    whole = source.requests
    assert cached.read() == data and source.requests - whole <= 2
    with pytest.raises(ValueError, match="before the start"):
        cached.seek(-1)


def test_source_that_shrinks_is_an_error_not_short_data() -> None:
    source = _CountingSource(bytes(100))
    cached = BlockCachedFile(source, block_bytes=64)
    source.data = bytes(10)
    with pytest.raises(OSError, match="changed under the reader"):
        cached.read(20)


@pytest.mark.parametrize("exclusive", [True, False])
def test_an_object_write_that_fails_leaves_nothing_of_its_own_and_all_of_a_rivals(tmp_path, exclusive):
    files = ObjectFiles(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))
    sink = files.create("manifest", exclusive)
    sink.write(memoryview(bytes(HELD_BYTES + 1)))
    assert files.is_file("manifest") != exclusive  # an exclusive write is held back, whatever its size
    if exclusive:
        (tmp_path / "manifest").write_bytes(b"a rival's")
    sink.abort()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"a rival's"] if exclusive else [])


class _FailingClose:
    """A stream of an object store whose upload is refused when it ends."""

    def write(self, data):
        return len(data)

    def close(self):
        raise OSError("AWS Error SLOW_DOWN during PutObject operation")


def test_an_object_whose_replacement_is_refused_stays(tmp_path):
    class Refusing(pafs.SubTreeFileSystem):
        def open_output_stream(self, key, **options):
            return _FailingClose()

    (tmp_path / "status.json").write_bytes(b"older")
    sink = ObjectFiles(Refusing(str(tmp_path), pafs.LocalFileSystem())).create("status.json", False)
    sink.write(memoryview(b"newer"))
    with pytest.raises(OSError):
        sink.commit()
    sink.abort()
    assert (tmp_path / "status.json").read_bytes() == b"older"
