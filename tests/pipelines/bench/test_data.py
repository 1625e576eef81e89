import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.bench.harness import BenchError
from pipelines.bench import data
from pipelines.bench.corpus import write_stdlib_corpus
from pipelines.bench.data import DataBench, as_json, as_text
from pipelines.bench.plain import Job, write_rows
from pipelines.documents import SPLITS
from pipelines.graph import Graph
from tests.pipelines.data_stages import in_this_process

BENCH = DataBench(megabytes=1, vocab_size=400, seq_len=64)


def stream(rows: list[list[int]], tokens: int) -> list[int]:
    """What the rows were cut of: each shares a token with the next, the last is filled up."""
    joined = rows[0] + [token for row in rows[1:] for token in row[1:]]
    return joined[:tokens]


def read_tokens(path: Path) -> list[list[int]]:
    with pa.ipc.open_file(str(path)) as file:
        return file.read_all().column("tokens").to_pylist()


def our_stream(shards: Artifact) -> list[int]:
    splits = shards.verify().metadata["splits"]
    return [
        token
        for split in SPLITS
        for shard in splits[split]["shards"]
        for token in stream(read_tokens(shards.files.local_path(shard["path"])), shard["tokens"])
    ]


@dataclass
class Prepared:
    folder: Path
    store: Store
    graph: Graph
    job: Path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """What both contestants begin with."""
    folder = tmp_path_factory.mktemp("bench")
    store = Store(folder / "store")
    write_stdlib_corpus(folder / "corpus", BENCH.megabytes * 10**6)
    graph = data._graph(BENCH, folder / "corpus")
    with in_this_process():
        data._run(graph, store, "tokenizer")
    return Prepared(folder, store, graph, data._job(BENCH, graph, store, folder))


def test_the_peer_does_the_same_work(prepared: Prepared) -> None:
    with in_this_process():
        data._run(prepared.graph, prepared.store, "shards")
    ours = our_stream(prepared.graph.artifact(prepared.store, "shards"))
    job = Job(**json.loads(prepared.job.read_text()))
    backend = tokenizers.Tokenizer.from_file(job.tokenizer)
    backend.encode_special_tokens = True
    assert write_rows(job, backend) == len(ours)
    rows = read_tokens(Path(job.output))
    assert {len(row) for row in rows} == {BENCH.seq_len + 1}
    assert np.array_equal(stream(rows, len(ours)), ours)
    job.parts[0][1].append(0)  # a row that dedup has dropped
    assert 0 < write_rows(job, backend) < len(ours)


@pytest.mark.integration
def test_both_take_their_turns(prepared: Prepared) -> None:
    said: list[str] = []
    report = data._compete(replace(BENCH, memory_only=True), prepared.graph, prepared.store, prepared.job, said.append)
    assert said[1:] == [f"{name}: its turn" for name in (data.OURS, data.PEER)]
    assert [row.name for row in report.rows] == [data.OURS, data.PEER]
    assert all(row.megabytes_per_second > 0 and 20 < row.peak_mib < 4000 for row in report.rows)
    assert report.speed is None and report.bytes >= 900_000
    shown = as_text(report)
    assert "one turn each" in shown and "largest single process" in shown and "--megabytes 100 or more" in shown
    assert json.loads(json.dumps(as_json(report)))["rows"][0]["start_seconds"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"megabytes": 0}, "megabytes=0 must be at least 1"),
        ({"rounds": 4}, "rounds=4 must be at least 5"),
        ({"workers": 0}, "workers=0 must be at least 1"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        DataBench(**settings)
