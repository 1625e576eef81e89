import json
from collections import Counter

import pytest

from cluster.storage import Store
from pipelines.graph import Graph
from pipelines.ingest import SPLITS, ingest_stage, list_parts, read_parts, split_of
from pipelines.sources import DataError
from tests.pipelines.data_stages import checksums, data_config, in_this_process, run_stages, write_corpus


def ingest(store, config, backwards=False):
    with in_this_process(backwards):
        return run_stages(Graph([ingest_stage(config)]), store)["ingest"]


def documents(artifact, split):
    return list(read_parts(artifact, [part.path for part in list_parts(artifact, split)]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ingest") / "corpus"
    return folder, write_corpus(folder)


@pytest.fixture(scope="module")
def ingested(corpus, tmp_path_factory):
    return ingest(Store(tmp_path_factory.mktemp("ingest") / "store"), data_config(corpus[0]))


def test_every_text_comes_once_in_the_split_of_its_hash(corpus, ingested):
    found = {split: documents(ingested, split) for split in SPLITS}
    counts = Counter(text for split in SPLITS for _, text in found[split])
    assert counts == Counter(set(corpus[1]))
    assert len(counts) < len(corpus[1])  # there were duplicates to drop
    for split in SPLITS:
        assert found[split] and all(split_of(document_id, 0.15) == split for document_id, _ in found[split])


def test_the_manifest_counts_what_happened(corpus, ingested):
    metadata = ingested.manifest().metadata
    unique = set(corpus[1])
    assert metadata["duplicates"] == len(corpus[1]) - len(unique)
    assert metadata["too_short"] == 1
    assert metadata["quarantined"] == 2
    assert sum(metadata["splits"][split]["documents"] for split in SPLITS) == len(unique)
    assert sum(metadata["splits"][split]["bytes"] for split in SPLITS) == sum(len(text.encode()) for text in unique)
    assert len(metadata["splits"]["train"]["parts"]) >= 3
    quarantine = json.loads(ingested.files.read_bytes("quarantine.json"))
    assert sorted(item["path"].rsplit("/", 1)[1] for item in quarantine) == ["binary.txt", "latin1.txt"]
    assert all(any(item["path"] in line for line in metadata["quarantine"]) for item in quarantine)
    ingested.verify()


def test_rows_say_where_a_document_comes_from(ingested):
    import io

    import pyarrow.parquet as pq

    part = list_parts(ingested, "train")[0]
    table = pq.read_table(io.BytesIO(ingested.files.read_bytes(part.path)))
    assert table.column_names == ["id", "text", "source", "split"]
    row = table.to_pylist()[0]
    with open(row["source"].removeprefix("file://"), newline=None, encoding="utf-8") as file:
        assert file.read() == row["text"]
    assert row["split"] == "train"


def test_the_order_of_the_tasks_does_not_show(corpus, ingested, tmp_path):
    assert checksums(ingest(Store(tmp_path), data_config(corpus[0]), backwards=True)) == checksums(ingested)


def test_the_size_of_parts_moves_no_document_to_another_split(corpus, ingested, tmp_path):
    other = ingest(Store(tmp_path), data_config(corpus[0], part_bytes=1 << 20))
    assert len(list_parts(other, "train")) < len(list_parts(ingested, "train"))
    for split in SPLITS:
        assert documents(other, split) == documents(ingested, split)


def test_a_missing_source_is_named_before_anything_runs():
    with pytest.raises(DataError, match="data.sources.0..uri='/nowhere/at/all' does not exist"):
        ingest_stage(data_config("/nowhere/at/all"))


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        (["tiny", "small"], {}, "the corpus is empty: 0 documents could not be read and 2 are shorter than"),
        (["\0" * 100], {}, "the corpus is empty: 1 documents could not be read"),
        (
            ["a" * 100],
            {"validation_fraction": 1e-9},
            "the validation split is empty: .* 1 documents; add text, or raise",
        ),
        (["a" * 100], {"validation_fraction": 1 - 1e-9}, "the train split is empty: .*; add text, or lower"),
    ],
)
def test_a_corpus_that_cannot_be_trained_on_commits_nothing(tmp_path, texts, changes, message):
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    store = Store(tmp_path / "store")
    with pytest.raises(DataError, match=message) as caught:
        ingest(store, data_config(tmp_path / "corpus", **changes))
    assert "\n" not in str(caught.value)
    assert store.list("artifacts") == []


def test_a_changed_file_gives_the_stage_another_key(tmp_path):
    write_corpus(tmp_path / "corpus", documents=20)
    before = Graph([ingest_stage(data_config(tmp_path / "corpus"))]).keys
    assert Graph([ingest_stage(data_config(tmp_path / "corpus"))]).keys == before
    (tmp_path / "corpus" / "0000.txt").write_text("something else, and long enough to count")
    assert Graph([ingest_stage(data_config(tmp_path / "corpus"))]).keys != before
