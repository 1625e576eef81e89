"""The shards stage beside plain `tokenizers` and pyarrow: the same documents, encoded, packed and written, in one run.

Ours is the stage itself on a local Ray, from the graph's look at what is committed to the manifest, every file synced.
The peer is one process with as many threads (pipelines/bench/plain.py). Both read the part files that ingest wrote and
must come to the same number of tokens. Starting Ray, its workers' imports and the peer's are reported, not counted.
"""

from __future__ import annotations

import json
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cluster import processes, session
from cluster.storage import Store
from llama.bench.harness import MIN_ROUNDS, BenchError, Contestant, Ratio, interleave, ratio
from llama.tokenizer import Tokenizer
from pipelines.bench.corpus import write_stdlib_corpus
from pipelines.bench.plain import Job
from pipelines.bench.turns import Say, Turns
from pipelines.data_config import DataConfig, SourceConfig
from pipelines.dedup import dedup_stage
from pipelines.documents import SPLITS, kept_parts
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.ingest import ingest_stage
from pipelines.recipe import TokenizerConfig
from pipelines.runs import Run
from pipelines.shards import ShardConfig, shards_stage
from pipelines.stage import Event
from pipelines.vocabulary import tokenizer_stage

OURS, PEER = "caravan", "tokenizers+pyarrow"
SMALL_MEGABYTES = 100
"""Of less, figures say little about speed."""

_SAMPLE_BYTES = 20_000_000  # to learn the tokenizer from
_VALIDATION_FRACTION = 0.1  # so that a small corpus has some too; both splits are written
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class DataBench:
    """What is measured.

    Raises:
        BenchError: a setting is out of range; names field, value and remedy.
    """

    megabytes: int = 200
    """Of text, 10⁶ bytes each."""
    rounds: int = 5
    workers: int = 2
    """CPUs of the local Ray, and threads of the peer."""
    vocab_size: int = 16_384
    seq_len: int = 1024
    memory_only: bool = False
    """Each works once, for its memory alone: no rounds, no verdict."""

    def __post_init__(self) -> None:
        least = {"megabytes": 1, "rounds": MIN_ROUNDS, "workers": 1, "vocab_size": 300, "seq_len": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise BenchError(f"{name}={getattr(self, name)} must be at least {smallest}")


@dataclass(frozen=True)
class Row:
    """One contestant's result; speeds are medians over the rounds, of text in 10⁶ bytes."""

    name: str
    megabytes_per_second: float
    tokens_per_second: float
    peak_mib: float
    """Resident size of the largest single one of its processes that encode, at its largest; not their sum."""
    start_seconds: float
    """Until it could begin, and how much longer its first turn took than the later ones; neither is counted."""


@dataclass(frozen=True)
class DataReport:
    bench: DataBench
    documents: int
    bytes: int
    tokens: int
    rows: list[Row]
    speed: Ratio | None
    """Ours over the peer's."""


def measure(bench: DataBench, say: Say = lambda message: None) -> DataReport:
    """Runs the comparison on a local Ray of its own; `say` is told what goes on.

    Raises:
        BenchError: the contestants come to different tokens, or the peer has failed.
        ClusterError: this process is connected to a cluster already, or none can be started.
    """
    with tempfile.TemporaryDirectory(prefix="caravan-bench-") as folder:
        corpus, store = Path(folder, "corpus"), Store(Path(folder, "store"))
        say(f"writing {bench.megabytes} MB of text")
        write_stdlib_corpus(corpus, bench.megabytes * 10**6)
        graph = _graph(bench, corpus)
        # In a cluster of its own: the workers that are measured have done nothing before.
        say("starting a local Ray to prepare")
        with _own_cluster(bench.workers):
            _run(graph, store, "tokenizer", say)
        job = _job(bench, graph, store, Path(folder))
        return _compete(bench, graph, store, job, say)


@contextmanager
def _own_cluster(workers: int) -> Iterator[None]:
    """A local Ray that ends with the block; the process keeps its own way to end on a signal."""
    handler = signal.getsignal(signal.SIGTERM)
    with session.connect("local", num_cpus=workers, dashboard=False):
        signal.signal(signal.SIGTERM, handler)  # Ray has put one there that ends in a crash
        yield


def _graph(bench: DataBench, corpus: Path) -> Graph:
    source = SourceConfig(uri=str(corpus), format="jsonl")
    data = DataConfig(sources=(source,), validation_fraction=_VALIDATION_FRACTION)
    tokenizer = TokenizerConfig(vocab_size=bench.vocab_size, sample_bytes=_SAMPLE_BYTES)
    shards = shards_stage(ShardConfig.of(data, bench.seq_len))
    return Graph([ingest_stage(data), dedup_stage(data), tokenizer_stage(tokenizer), shards])


def _run(graph: Graph, store: Store, until: str, say: Say = lambda message: None) -> None:
    def on_event(event: Event) -> None:
        if event.kind == "running":
            say(f"preparing: {event.stage}")

    drive(graph, store, Run.create(store, "name: bench\n"), until=until, on_event=on_event)


def _job(bench: DataBench, graph: Graph, store: Store, folder: Path) -> Path:
    """What the peer is to do, as a file."""
    ingest, dedup, learned = (graph.artifact(store, name) for name in ("ingest", "dedup", "tokenizer"))
    tokenizer_folder = learned.fetch(folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    files = ingest.fetch(folder)
    parts = [part for split in SPLITS for part in kept_parts(ingest, dedup, split)]
    job = Job(
        parts=[(str(files / part.path), list(part.dropped)) for part in parts],
        tokenizer=str(tokenizer_folder / "tokenizer.json"),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
        output=str(folder / "rows.arrow"),
        seq_len=bench.seq_len,
        threads=bench.workers,
    )
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), "utf-8")
    return path


def _compete(bench: DataBench, graph: Graph, store: Store, job: Path, say: Say = lambda message: None) -> DataReport:
    rounds = 0 if bench.memory_only else bench.rounds
    say("starting the local Ray that is measured, and the peer")
    began = time.perf_counter()
    with _own_cluster(bench.workers):
        starts = {OURS: time.perf_counter() - began}
        began = time.perf_counter()
        with Contestant(PEER, [str(job)], module="pipelines.bench.plain") as peer, _worker_peak() as worker_peak:
            starts[PEER] = time.perf_counter() - began
            answer: dict[str, float] = {}
            shards = graph.artifact(store, "shards")
            our_turns = Turns(OURS, lambda: _run(graph, store, "shards"), rounds, say)
            peer_turns = Turns(PEER, lambda: answer.update(peer.turn()), rounds, say)

            def ours() -> None:
                shards.delete()  # a few files, not to be timed
                our_turns()

            interleave({OURS: ours, PEER: peer_turns}, rounds)
            seconds = {OURS: our_turns.seconds, PEER: peer_turns.seconds}
            peaks = {OURS: worker_peak(), PEER: answer["peak_mib"]}
    manifest = shards.manifest()
    assert manifest is not None
    splits: Any = manifest.metadata["splits"]
    totals = {unit: sum(splits[split][unit] for split in SPLITS) for unit in ("documents", "bytes", "tokens")}
    if totals["tokens"] != answer["tokens"]:
        raise BenchError(f"{OURS} wrote {totals['tokens']} tokens, {PEER} {answer['tokens']}: not the same work")
    rows = []
    for name, (first, *later) in seconds.items():
        usual = median(later or [first])
        speeds = (totals["bytes"] / 1e6 / usual, totals["tokens"] / usual)
        rows.append(Row(name, *speeds, peaks[name], starts[name] + max(0.0, first - usual)))
    speed = None if bench.memory_only else ratio(seconds[OURS][1:], seconds[PEER][1:])
    return DataReport(bench, totals["documents"], totals["bytes"], totals["tokens"], rows, speed)


@contextmanager
def _worker_peak() -> Iterator[Any]:
    """Watches the local cluster's workers inside the block; what is yielded tells the largest resident size so far of
    any, MiB. A process keeps its own record of that, so only what one does just before it ends can be missed."""
    peaks: dict[int, float] = {}
    done = threading.Event()

    def look() -> None:
        for process in session.ray_processes():
            try:
                if process.cmdline()[0].startswith("ray::"):
                    peaks[process.pid] = _peak_mib(process.pid)
            except (processes.gone(), IndexError, OSError):
                continue

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            look()

    def largest() -> float:
        look()
        return max(peaks.values())

    watcher = threading.Thread(target=watch, name="worker-memory", daemon=True)
    watcher.start()
    try:
        yield largest
    finally:
        done.set()
        watcher.join()


def _peak_mib(pid: int) -> float:
    """Largest resident size of a process, MiB. Raises OSError once it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)  # a zombie has no memory


def as_text(report: DataReport) -> str:
    """The table for a terminal."""
    bench = report.bench
    lines = [
        f"{report.bytes / 1e6:.0f} MB of text, {report.documents:,} documents, {report.tokens:,} tokens of "
        f"{bench.vocab_size:,}; rows of {bench.seq_len}; {bench.workers} workers or threads; "
        + ("one turn each" if bench.memory_only else f"{bench.rounds} rounds"),
        f"{'':20}{'MB/s':>8}{'tokens/s':>12}{'peak MiB':>10}{'start s':>9}",
    ]
    for row in report.rows:
        lines.append(
            f"{row.name:20}{row.megabytes_per_second:8.2f}{row.tokens_per_second:12,.0f}{row.peak_mib:10.0f}"
            f"{row.start_seconds:9.1f}"
        )
    lines.append("peak MiB: of its largest single process, not the sum over several")
    lines.append("start: until it can begin, once; not in the speeds, which are medians over the rounds")
    if report.speed is not None:
        lines.append(f"{OURS} over {PEER}: {report.speed}")
    if bench.megabytes < SMALL_MEGABYTES:
        lines.append(
            f"{bench.megabytes} MB are too little to compare speeds: the fixed costs of a run take most of the time; "
            f"give --megabytes {SMALL_MEGABYTES} or more"
        )
    return "\n".join(lines)


def as_json(report: DataReport) -> dict[str, Any]:
    """Plain data, the verdict included."""
    data = asdict(report)
    if report.speed is not None:
        data["speed"]["verdict"] = report.speed.verdict
    return data
