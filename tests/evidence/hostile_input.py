"""Evidence that nothing in a folder of data stops `ingest`, fills its memory, or is lost in silence.

    python -m tests.evidence.hostile_input [CASE ...]

Writes hostile inputs of full size, and runs the stage over each in a process of its own, its tasks one after the
other, as a worker has them. Prints what became of every input and the process's peak memory; exits non-zero if a file
is neither read nor quarantined nor left out, if an outcome is not the expected one, or memory is above the bar. Needs
no cluster, 1 GB of disk, and about two minutes.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from cluster.storage import Store
from pipelines.data_config import DataConfig, SourceConfig
from pipelines.documents import ingest_parts, read_table
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.ingest import ingest_stage
from pipelines.runs import Run
from tests.pipelines.data_stages import in_this_process

MB, GB = 10**6, 10**9
BOUND = 256 * MB
MOST_MIB = 400
"""Above what the process needs for a folder with nothing hostile in it: a worker holds a part file for each split and
the record at hand, each in a few copies."""
NOBODY = 65534


@dataclass(frozen=True)
class Outcome:
    """What became of a folder: documents and bytes as read, files by the reason for which they were not, and what is
    in none of the three."""

    documents: int
    bytes: int
    largest: int
    quarantined: int
    reasons: dict[str, int]
    lost: list[str]
    mib: int
    seconds: float

    def has(self, *words: str) -> bool:
        return all(any(word in reason for reason in self.reasons) for word in words)


@dataclass(frozen=True)
class Case:
    name: str
    write: Callable[[Path], None]
    holds: Callable[[Outcome], bool]
    source: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    as_nobody: bool = False


# -- what is written


def _single_line(folder: Path) -> None:
    (folder / "line.txt").write_bytes(b"one line without an end " * (200 * MB // 24))


def _single_record(folder: Path) -> None:
    with open(folder / "line.jsonl", "wb") as file:
        file.writelines(_records(1000))
        file.write(b'{"text": "' + b"one record without an end " * (200 * MB // 26) + b'"}\n')
        file.writelines(_records(1000))


def _records(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield json.dumps({"text": f"record number {number} of a good and useful kind"}).encode() + b"\n"


def _no_text(folder: Path) -> None:
    (folder / "nul.txt").write_bytes(b"text with a NUL \0 in it, and enough of it to be a document")
    (folder / "latin1.txt").write_bytes("a café in latin-1, and enough of it to be a document".encode("latin-1"))
    (folder / "binary.txt").write_bytes(os.urandom(20 * MB))
    (folder / "utf16.txt").write_text("a text of sixteen bits for each of its characters", encoding="utf-16")


def _no_records(folder: Path) -> None:
    bad = [
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": null}',
        b'{"text": "a\\u0000b"}',
        b'{"other": 1}',
        b"{",
    ]
    (folder / "bad.jsonl").write_bytes(b"\n".join([*bad, b"[" * MB, b""]) + b"".join(_records(10)))
    (folder / "garbage.jsonl").write_bytes(b"x\n" * MB)


def _empty(folder: Path) -> None:
    for number in range(100):
        (folder / f"{number}.txt").touch()
    _good(folder)


def _bomb(folder: Path) -> None:
    member = gzip.compress(b"a line that comes again and again, and expands\n" * (100 * MB // 47), 9)
    with open(folder / "bomb.txt.gz", "wb") as file:
        for _ in range(100):
            file.write(member)


def _record_bombs(folder: Path) -> None:
    member = gzip.compress(b'{"text": "' + bytes(100 * MB), 9)
    with open(folder / "bomb.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b"".join(_records(1000))))
        for _ in range(100):
            file.write(member)
    with zstandard.open(folder / "bomb.jsonl.zst", "wb") as file:
        for _ in range(100):
            file.write(bytes(100 * MB))


def _truncated(folder: Path) -> None:
    text = b"".join(_records(200_000))
    for name, data in (
        ("a.jsonl.gz", gzip.compress(text, 1)),
        ("b.jsonl.zst", zstandard.ZstdCompressor().compress(text)),
    ):
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "c.jsonl.gz").write_bytes(b"no gzip data at all")


def _links(folder: Path) -> None:
    _good(folder / "sub")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "gone.txt").symlink_to(folder / "nothing")
    (folder / ".hidden").write_text("hidden, and enough of it to be a document")
    os.mkfifo(folder / "pipe.txt")
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.txt"), "w") as file:
        file.write("a file whose name is no text, and which is read")


def _tiny(folder: Path) -> None:
    for number in range(50_000):
        sub = folder / f"{number % 50}"
        if number < 50:
            sub.mkdir()
        (sub / f"{number}.txt").write_text(f"a tiny file with the number {number}, and little else")


def _long(folder: Path) -> None:
    with open(folder / "long.jsonl", "wb") as file:
        file.writelines(_records(1000))
        file.write(json.dumps({"text": "a document longer than a shard " * (40 * MB // 31)}).encode() + b"\n")
        file.writelines(_records(1000))


def _unreadable(folder: Path) -> None:
    _good(folder)
    (folder / "secret.txt").write_text("a file that nobody may read, long enough to be a document")
    (folder / "secret.txt").chmod(0)
    (folder / "closed").mkdir(mode=0)


def _never_closed(folder: Path) -> None:
    with open(folder / "open.csv", "w") as file:
        file.write("id,text\n")
        file.writelines(f"{number},row {number} of a table with good and useful text\n" for number in range(1000))
        file.write('1000,"a quote that is never closed\n')
        file.writelines(f"{number},row {number} that is swallowed by the quote above it\n" for number in range(4 * MB))


def _tables(folder: Path) -> None:
    values = pa.array(["x" * (4 << 20)])
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), values)})
    pq.write_table(table, folder / "bomb.parquet", dictionary_pagesize_limit=GB)
    pq.write_table(
        pa.table({"text": ["some text of a table, long enough to be a document"] * 1000}), folder / "whole.parquet"
    )
    data = (folder / "whole.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(data[:-100])
    (folder / "none.parquet").write_bytes(os.urandom(MB))


def _good(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(100):
        (folder / f"good{number}.txt").write_text(f"good text with the number {number}, long enough to be a document")


_LINE = 200 * MB // 24 * 24
_BOUNDED = {"max_decompressed_bytes": BOUND}
CASES = (
    Case("nothing hostile", _good, lambda out: out.documents == 100 and not out.reasons),
    Case(
        "200 MB of text on a single line",
        _single_line,
        lambda out: out.bytes == _LINE and out.largest <= 1 << 15 and not out.quarantined,
    ),
    Case(
        "200 MB in a single line of JSONL",
        _single_record,
        lambda out: out.documents == 2000 and out.quarantined == 1 and out.has("data.max_document_bytes"),
    ),
    Case(
        "NUL, latin-1, UTF-16, 20 MB of random bytes",
        _no_text,
        lambda out: not out.documents and out.has("NUL", "not UTF-8"),
    ),
    Case(
        "JSONL of wrong records, a million lines of garbage",
        _no_records,
        lambda out: out.documents == 10 and out.has("surrogate", "not UTF-8", "null", "NUL", "no key"),
    ),
    Case("100 empty files", _empty, lambda out: out.documents == 100 and out.reasons == {"empty": 100}),
    Case(
        "gzip bomb of 10 GB, bound 256 MB",
        _bomb,
        lambda out: BOUND - 2**15 <= out.bytes <= BOUND and out.quarantined == 1 and out.has("max_decompressed_bytes"),
        data=_BOUNDED,
    ),
    Case(
        "JSONL bombs of 10 GB without a line's end, gzip and zstd",
        _record_bombs,
        lambda out: out.documents == 1000 and out.quarantined == 2 and out.has("max_decompressed_bytes"),
        data=_BOUNDED,
    ),
    Case(
        "gzip and zstd cut off, and none",
        _truncated,
        lambda out: 100_000 < out.documents < 300_000 and out.quarantined == 3 and out.has("too early", "no gzip"),
    ),
    Case(
        "directory loop, broken links, a pipe, a hidden file",
        _links,
        lambda out: out.documents == 101 and out.has("a link to a folder", "to itself", "to nothing", "pipe", "hidden"),
    ),
    Case("50,000 tiny files", _tiny, lambda out: out.documents == 50_000 and not out.reasons),
    Case(
        "a document of 40 MB, longer than a shard",
        _long,
        lambda out: out.documents == 2001 and out.largest == 40 * MB // 31 * 31 and not out.quarantined,
        data={"max_document_bytes": 64 << 20},
    ),
    Case(
        "a file and a folder that may not be read",
        _unreadable,
        lambda out: out.documents == 100 and out.quarantined == 2 and out.has("no permission"),
        as_nobody=True,
    ),
    Case(
        "200 MB of CSV behind a quote that is never closed",
        _never_closed,
        lambda out: out.documents == 1000 and out.quarantined == 1 and out.has("data.max_document_bytes"),
    ),
    Case(
        "Parquet: 21 GB of text in a few kB, cut off, none",
        _tables,
        lambda out: (
            1000 < out.documents < 1100 and out.quarantined == 3 and out.has("max_decompressed_bytes", "Parquet")
        ),
        data=_BOUNDED,
    ),
)


# -- what becomes of it


def ingest(case: Case, folder: Path, store: Store) -> Outcome:
    """Run the stage in this process, beside a source of good text."""
    config = DataConfig(
        sources=(SourceConfig(uri=str(folder / "input"), **case.source), SourceConfig(uri=str(folder / "good"))),
        validation_fraction=0.1,
        **case.data,
    )
    started = time.monotonic()
    with in_this_process():
        graph = Graph([ingest_stage(config)])
        artifact = drive(graph, store, Run.create(store, "name: evidence\n"))["ingest"].artifact
    seconds = time.monotonic() - started
    assert artifact is not None
    mib = peak_mib()
    manifest = artifact.manifest()
    assert manifest is not None
    totals: Any = manifest.metadata["sources"]
    prefix = f"file://{quote(str(folder / 'input'))}"
    accounted, largest = set(), 0
    for part in ingest_parts(artifact):
        if part.source == 0:
            table = read_table(artifact.files, part.path, ("path", "bytes"))
            accounted.update(table["path"].to_pylist())
            largest = max(largest, *table["bytes"].to_pylist())
    lines = [file.path for file in manifest.files if file.path.endswith(".jsonl")]
    items = [json.loads(line) for path in lines for line in artifact.files.read_bytes(path).splitlines()]
    reasons = Counter(item["reason"] for item in items)
    accounted.update(item["path"] for item in items)
    there = [f"file://{quote(os.fsencode(path))}" for path in _everything(folder / "input")]
    return Outcome(
        documents=totals[0]["documents_in"],
        bytes=totals[0]["bytes_in"],
        largest=largest,
        quarantined=sum("offset" in item for item in items),
        reasons=dict(reasons),
        lost=sorted(path for path in there if path.startswith(prefix) and path not in accounted),
        mib=mib,
        seconds=seconds,
    )


def peak_mib() -> int:
    """Of this program alone: `ru_maxrss` begins with that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) >> 10


def _everything(folder: Path) -> Iterator[str]:
    """Every file, link and whatever else has a name, and folders that nobody may enter."""
    for root, folders, names in os.walk(folder):
        yield from (os.path.join(root, name) for name in names)
        for name in folders:
            path = os.path.join(root, name)
            if os.path.islink(path) or not os.access(path, os.R_OK, effective_ids=True):
                yield path


def run_child(case: Case, folder: Path) -> Outcome:
    """The case in a process of its own, for its peak memory is the process's."""
    command = [sys.executable, "-m", "tests.evidence.hostile_input", "--child", case.name, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{case.name} failed:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return Outcome(**json.loads(result.stdout.splitlines()[-1]))


def child(name: str, folder: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    if case.as_nobody and not os.geteuid():  # root may read everything
        with tempfile.TemporaryDirectory() as scratch:  # what is imported late might be root's alone
            shutil.copytree(folder / "good", Path(scratch) / "input")
            shutil.copytree(folder / "good", Path(scratch) / "good")
            ingest(CASES[0], Path(scratch), Store(Path(scratch) / "store"))
        os.seteuid(NOBODY)
    found = ingest(case, folder, Store(folder / "store"))
    if case.as_nobody:
        os.seteuid(os.getuid())
    print(json.dumps(found.__dict__))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], Path(sys.argv[3]))
    chosen = [case for case in CASES if not sys.argv[1:] or any(word in case.name for word in sys.argv[1:])]
    failed, least = 0, None
    print(f"{'':4}  {'input':<58}{'documents':>10}{'MB read':>9}{'quarantined':>13}{'MiB':>6}{'s':>6}  not read")
    for case in (CASES[0], *(case for case in chosen if case is not CASES[0])):
        with tempfile.TemporaryDirectory(prefix="caravan-hostile-") as scratch:
            folder = Path(scratch)
            folder.chmod(0o755)
            (folder / "input").mkdir()
            _good(folder / "good")
            (folder / "store").mkdir()
            (folder / "store").chmod(0o777)
            case.write(folder / "input")
            found = run_child(case, folder)
            shutil.rmtree(folder / "input", ignore_errors=True)
        least = least or found.mib
        holds = case.holds(found) and not found.lost and found.mib <= least + MOST_MIB
        failed += not holds
        figures = (
            f"{found.documents:>10}{found.bytes / MB:>9.1f}{found.quarantined:>13}{found.mib:>6}{found.seconds:>6.1f}"
        )
        reasons = [f"{count} × {reason}" for reason, count in found.reasons.items()]
        shown = "; ".join(reason[:90] for reason in reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
        print(f"{'ok' if holds else 'FAIL':4}  {case.name:<58}{figures}  {shown or 'nothing'}", flush=True)
        if found.lost:
            print(f"      lost: {', '.join(found.lost[:5])}")
    print(f"peak memory at most {MOST_MIB} MiB above that of a folder with nothing hostile in it; files lost: 0 wanted")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
