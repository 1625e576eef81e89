import gzip
import io
import os
import random
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import StorageError
from pipelines.formats import read_piece
from pipelines.sources import DataError, Piece, Source, SourceFile
from pipelines.streams import Damaged, Decompressed
from tests.pipelines.reading import LIMITS, corpus_of, read_all


def compress(codec, data):
    return (
        gzip.compress(data, 1) if codec == "gzip" else zstandard.ZstdCompressor(1, write_checksum=True).compress(data)
    )


def read_compressed(codec, data, max_bytes=1 << 30, step=100_000):
    """The text, and what it ended with."""
    stream = Decompressed(io.BytesIO(data), codec, max_bytes)
    text = []
    try:
        while block := stream.read(step):
            assert len(block) <= step
            text.append(block)
    except Damaged as damage:
        return b"".join(text), str(damage)
    return b"".join(text), None


def some_text(size=300_000, seed=0):
    return bytes(random.Random(seed).choices(b"abcdef \n", k=size))


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@given(parts=st.lists(st.binary(max_size=3000), min_size=1, max_size=5), step=st.integers(1, 5000))
def test_members_and_frames_follow_each_other(codec, parts, step):
    data = b"".join(compress(codec, part) for part in parts)
    assert read_compressed(codec, data, step=step) == (b"".join(parts), None)


def test_skippable_frames_and_padding_are_no_text():
    skippable = b"\x51\x2a\x4d\x18\x03\0\0\0abc"
    frame = compress("zstd", b"text")
    assert read_compressed("zstd", skippable + frame + skippable + frame) == (b"texttext", None)
    assert read_compressed("gzip", compress("gzip", b"text") + bytes(100_000)) == (b"text", None)


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_what_comes_before_damage_is_read(codec):
    text = some_text()
    data = compress(codec, text)
    for cut in (1, 3, 10, len(data) // 2, len(data) - 1):
        found, damage = read_compressed(codec, data[:cut])
        assert text.startswith(found) and damage is not None
        assert "too early" in damage or damage == f"no {codec} data"
    half = data[: len(data) // 2]
    decoder = zlib.decompressobj(31) if codec == "gzip" else zstandard.ZstdDecompressor().decompressobj()
    assert read_compressed(codec, half)[0] == decoder.decompress(half)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0x55
    found, damage = read_compressed(codec, bytes(flipped))
    assert damage is not None and len(found) <= len(text)
    found, damage = read_compressed(codec, data + b"and then something else")
    assert found == text and damage.startswith(f"what follows the {codec} data")
    assert read_compressed(codec, b"plain text") == (b"", f"no {codec} data")


@pytest.mark.parametrize(
    ("window_log", "found"),
    [(27, (b"hello", None)), (28, (b"", "a zstd window above 128 MiB; compress it without --long, or with --long=27"))],
)
def test_a_zstd_window_is_bounded(window_log, found):
    header, block = bytes([0, window_log - 10 << 3]), (len(b"hello") << 3 | 1).to_bytes(3, "little") + b"hello"
    assert read_compressed("zstd", b"\x28\xb5\x2f\xfd" + header + block) == found


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_bomb_is_read_up_to_its_bound(codec):
    data = compress(codec, bytes(50 << 20))
    found, damage = read_compressed(codec, data, max_bytes=1_000_000)
    assert found == bytes(1_000_000) and damage == "more text than data.max_decompressed_bytes=1000000"
    assert read_compressed(codec, compress(codec, bytes(1000)), max_bytes=1000) == (bytes(1000), None)


def test_a_file_that_is_not_the_one_that_was_listed_stops_the_reading(tmp_path):
    (tmp_path / "a.txt").write_text("something")
    corpus = corpus_of(tmp_path)
    (tmp_path / "a.txt").write_text("something else")
    with pytest.raises(DataError, match="has 14 bytes on .*, 9 where it was listed; put the source on storage"):
        read_all(corpus)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="is not there on .*, but was when it was listed"):
        read_all(corpus)


class _BrokenStore:
    """A store of one file, of which the disk gives the first 60 bytes."""

    uri = "file:///broken"

    def __init__(self, data):
        self.data = data

    def local_path(self):
        return None

    def child(self, path):
        return self

    def open_input(self, path):
        class Broken(io.BytesIO):
            def read(self, size=-1):
                if self.tell() + size > 60:
                    raise OSError(5, "Input/output error")
                return super().read(size)

        return Broken(self.data)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.arrow", "a.txt.gz", "a.txt.zst"])
def test_a_store_that_fails_is_no_bad_input(name, tmp_path):
    """In no format: the next try may read all of it."""
    table = pa.table({"text": ["some text"] * 100})
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    elif name.endswith("arrow"):
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    else:
        codec = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(name)[1])
        text = b"text,x\n" * 1000
        (tmp_path / name).write_bytes(compress(codec, random.Random(0).randbytes(1000)) if codec else text)
    (source,) = corpus_of(tmp_path).sources
    data = (tmp_path / name).read_bytes()
    broken = Source(0, source.config, source.format, _BrokenStore(data))
    with pytest.raises(StorageError, match="cannot read it at byte .*Input/output error"):
        list(read_piece(broken, Piece(SourceFile(0, name, len(data)), 0, len(data)), LIMITS))
