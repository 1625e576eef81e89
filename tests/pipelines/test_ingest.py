import gzip
import json
import random
from collections import Counter
from unittest.mock import patch

import pytest

from cluster.artifact import Attempt
from cluster.storage import Store
from pipelines.data_config import CleanConfig, DedupConfig, LanguageConfig, SourceConfig
from pipelines.documents import SPLITS, document_id, ingest_parts, read_table
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.ingest import ingest_stage, split_of
from pipelines.runs import Run
from pipelines.sources import DataError
from tests.pipelines.data_stages import checksums, data_config, in_this_process, run_stages, write_corpus


def ingest(store, config, backwards=False):
    with in_this_process(backwards):
        return run_stages(Graph([ingest_stage(config)]), store)["ingest"]


def progress(folder, config):
    """What the stage tells whoever watches."""
    store, events = Store(folder), []
    with in_this_process():
        drive(Graph([ingest_stage(config)]), store, Run.create(store, "name: test\n"), on_event=events.append)
    return [event for event in events if event.kind == "progress"]


def over(*sources, **changes):
    return data_config(".", sources=sources, **changes)


def rows(artifact, split=None, source=None):
    """Of each document its columns, in order."""
    parts = [part for part in ingest_parts(artifact) if split in (None, part.split) and source in (None, part.source)]
    return [row for part in parts for row in read_table(artifact.files, part.path).to_pylist()]


def texts(artifact, split=None, source=None):
    return [row["text"] for row in rows(artifact, split, source)]


def metadata(artifact):
    return artifact.manifest().metadata


def write_lines(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def numbered(count, words=12, name="document"):
    return [f"{name} {number} " + f"word{number} " * words for number in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ingest") / "corpus"
    return folder, write_corpus(folder)


@pytest.fixture(scope="module")
def ingested(corpus, tmp_path_factory):
    return ingest(Store(tmp_path_factory.mktemp("ingest") / "store"), data_config(corpus[0]))


def test_every_text_is_in_the_split_of_its_hash(corpus, ingested):
    assert Counter(texts(ingested)) == Counter(corpus[1])
    for split in SPLITS:
        found = rows(ingested, split)
        assert found
        for row in found:
            assert row["id"] == document_id(row["text"])
            assert split_of(row["id"], 0.15) == split
            assert row["bytes"] == len(row["text"].encode())


def test_the_manifest_counts_what_happened(corpus, ingested):
    found = metadata(ingested)
    kept = {"documents": len(corpus[1]), "bytes": sum(len(text.encode()) for text in corpus[1])}
    (source,) = found["sources"]
    assert source == {
        "uri": str(corpus[0]),
        "format": "text",
        "kind": "text",
        "files": len(corpus[1]) + 3,
        "left_out": 0,
        "documents_in": kept["documents"] + 1,
        "bytes_in": kept["bytes"] + 5,
        "dropped": {"min_document_chars": 1},
        "quarantined": 2,
        **kept,
    }
    example = {"path": (corpus[0] / "short.txt").as_uri(), "offset": 0, "value": 5, "text": "short"}
    assert found["dropped"] == {"min_document_chars": {"documents": 1, "bytes": 5, "examples": [example]}}
    assert found["changed"] == {}
    for unit in ("documents", "bytes"):
        assert sum(found["splits"][split][unit] for split in SPLITS) == kept[unit]
        assert sum(part[unit] for part in found["parts"]) == kept[unit]
    assert len(found["parts"]) >= 3
    ingested.verify()


def test_what_cannot_be_read_is_listed_with_the_reason(ingested):
    names = [file.path for file in ingested.manifest().files if file.path.startswith("quarantine/")]
    items = [json.loads(line) for name in names for line in ingested.files.read_bytes(name).splitlines()]
    assert sorted(item["path"].rsplit("/", 1)[1] for item in items) == ["binary.txt", "latin1.txt"]
    assert all(item.keys() == {"path", "offset", "reason", "records"} and item["offset"] > 0 for item in items)
    found = metadata(ingested)
    assert found["quarantined"] == 2
    assert sorted(found["quarantine"]) == sorted(f"{x['path']} at {x['offset']}: {x['reason']}" for x in items)


def test_rows_say_where_a_document_comes_from(ingested):
    row = rows(ingested, "train")[0]
    with open(row["path"].removeprefix("file://"), newline=None, encoding="utf-8") as file:
        assert file.read() == row["text"]
    assert (row["offset"], row["metadata"]) == (0, "")


def test_the_order_of_the_tasks_does_not_show(corpus, ingested, tmp_path):
    assert checksums(ingest(Store(tmp_path), data_config(corpus[0]), backwards=True)) == checksums(ingested)


def test_the_size_of_parts_moves_no_document_to_another_split(corpus, ingested, tmp_path):
    other = ingest(Store(tmp_path), data_config(corpus[0], part_bytes=1 << 20))
    assert len(ingest_parts(other)) < len(ingest_parts(ingested))
    for split in SPLITS:
        assert texts(other, split) == texts(ingested, split)


def test_a_missing_source_is_named_before_anything_runs():
    with pytest.raises(DataError, match="data.sources.0..uri='/nowhere/at/all': it does not exist"):
        ingest_stage(data_config("/nowhere/at/all"))


def test_part_files_stay_small_however_much_a_compressed_file_holds(tmp_path):
    documents = numbered(4000, words=20)
    path = tmp_path / "many.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in documents).encode()))
    found = ingest(Store(tmp_path / "store"), data_config(path, part_bytes=1 << 16))
    assert texts(found, "train") == [text for text in documents if split_of(document_id(text), 0.15) == "train"]
    parts = ingest_parts(found)
    assert len(parts) > 5
    assert all(part.bytes <= 1 << 16 for part in parts)
    assert [part.path for part in parts] == [f"{part.split}/00-00000-{i:03d}.parquet" for i, part in enumerate(parts)]


# -- cleaning


def test_documents_are_cleaned_and_what_is_dropped_is_shown(tmp_path):
    kept = [text.strip() + " caf\u00e9" for text in numbered(30)]
    written = [text.replace("\u00e9", "e\u0301") for text in kept] + [f"{n}: {'#' * 300}" for n in range(9)]
    written.append("too short")
    path = write_lines(tmp_path / "texts.jsonl", written)
    config = data_config(path, clean=CleanConfig(unicode="NFC", min_words=3))
    found = ingest(Store(tmp_path / "store"), config)
    assert sorted(texts(found)) == sorted(kept)
    assert {row["id"] for row in rows(found)} == set(map(document_id, kept))
    result = metadata(found)
    assert result["changed"] == {"unicode": 30}
    assert list(result["sources"][0]["dropped"].items()) == [("min_document_chars", 1), ("min_words", 9)]
    counts = [(rule, drops["documents"]) for rule, drops in result["dropped"].items()]
    assert counts == [("min_document_chars", 1), ("min_words", 9)]  # the rules' order, not that of the documents
    assert result["dropped"]["min_words"]["bytes"] == 9 * 303
    examples = result["dropped"]["min_words"]["examples"]
    lengths = [len(json.dumps({"text": text})) + 1 for text in written]
    assert examples == [
        {"path": f"file://{path}", "offset": sum(lengths[: 30 + n]), "value": 2, "text": f"{n}: " + "#" * 197}
        for n in range(5)
    ]


def test_a_document_that_grows_beyond_the_limit_is_quarantined(tmp_path):
    path = write_lines(tmp_path / "texts.jsonl", [*numbered(30), "\ufdfa" * 100])
    config = data_config(path, clean=CleanConfig(unicode="NFKC"), max_document_bytes=1024)
    found = ingest(Store(tmp_path / "store"), config)
    assert len(texts(found)) == 30
    assert "in normal form NFKC, more than data.max_document_bytes=1024" in metadata(found)["quarantine"][0]


def test_the_rules_for_text_leave_conversations_alone(tmp_path):
    path = tmp_path / "talks.jsonl"
    turns = [("user", "Hi \x07#{}"), ("assistant", "Ho")]
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": role, "content": text.format(number)} for role, text in turns]}) + "\n"
            for number in range(40)
        )
    )
    clean = CleanConfig(min_words=1000, control_characters=True)
    source = SourceConfig(uri=str(path), format="chat")
    found = ingest(Store(tmp_path / "store"), over(source, clean=clean, min_document_chars=1000))
    assert len(texts(found)) == 40
    assert {part.kind for part in ingest_parts(found)} == {"chat"}
    said = [json.loads(text)[0]["content"] for text in texts(found, "train")]
    assert said and all(text.startswith("Hi \x07#") for text in said)


# -- budgets


def prefix(documents, limit):
    """The longest prefix of at most so many bytes."""
    sizes = [len(text.encode()) for text in documents]
    return documents[: max(n for n in range(len(sizes) + 1) if sum(sizes[:n]) <= limit)]


@pytest.mark.parametrize(
    ("budget", "weights", "shares"),
    [
        (60_000, (1, 1, 2), (15_000, 15_000, 30_000)),
        (400_000, (8, 1, 1), (320_000, 40_000, 40_000)),  # more than the first has
        (10**9, (1, 1, 1), (10**9,) * 3),
    ],
)
def test_a_budget_takes_the_first_documents_of_each_source_by_weight(tmp_path, budget, weights, shares):
    documents = [numbered(count, 20, name) for count, name in [(400, "first"), (1500, "second"), (1500, "third")]]
    paths = [write_lines(tmp_path / f"{number}.jsonl", each) for number, each in enumerate(documents)]
    sources = tuple(SourceConfig(uri=path, weight=weight) for path, weight in zip(paths, weights, strict=True))
    config = over(*sources, max_bytes=budget)
    found = ingest(Store(tmp_path / "store"), config)
    first = sum(len(text.encode()) for text in documents[0])
    if first < shares[0]:
        shares = (first, (budget - first) // 2, (budget - first) // 2)
    for number, share in enumerate(shares):
        assert sorted(texts(found, source=number)) == sorted(prefix(documents[number], share))
        source = metadata(found)["sources"][number]
        assert source["documents_in"] == source["documents"] == len(texts(found, source=number))
    stored = found.files.sizes()
    assert set(stored) == {part.path for part in ingest_parts(found)}  # and nothing that was read in vain
    again = ingest(Store(tmp_path / "backwards"), config, backwards=True)
    assert checksums(again) == checksums(found)


@pytest.mark.parametrize(("max_bytes", "suffix"), [(700_000, ""), (1_000_000, ".gz"), (10**9, ".gz"), (None, "")])
def test_progress_is_a_fraction_of_what_is_wanted(tmp_path, max_bytes, suffix):
    path = tmp_path / "texts"
    path.mkdir()
    for number in range(40):
        digits = random.Random(number).randbytes(40_000).hex()
        data = "".join(json.dumps({"text": digits[at : at + 1000]}) + "\n" for at in range(0, len(digits), 1000))
        name = path / f"{number}.jsonl{suffix}"
        name.write_bytes(gzip.compress(data.encode()) if suffix else data.encode())
    fractions = [event.fraction for event in progress(tmp_path / "store", data_config(path, max_bytes=max_bytes))]
    assert len(fractions) > 5 and None not in fractions
    assert fractions == sorted(fractions) and 0 < fractions[0] < 0.5 and fractions[-1] == 1


def test_a_source_that_yields_nothing_is_named(tmp_path):
    good, other = (write_lines(tmp_path / f"{name}.jsonl", numbered(30)) for name in ("good", "other"))
    events = progress(tmp_path / "store", over(SourceConfig(uri=good), SourceConfig(uri=other, text_column="body")))
    news = [event.message for event in events if event.fraction is None]
    assert news[0] == "30 records could not be read: they are in quarantine, the folder of this stage's output"
    assert news[1:] == [
        f"data.sources[1].uri='{other}' yields no document: 30 records could not be read (file://{other} at 0: no key "
        "'body'; it has 'text') and 0 were dropped; check its settings"
    ]


@pytest.mark.parametrize("cut", [True, False])
def test_the_budget_is_the_remedy_only_for_what_it_cut_off(tmp_path, cut):
    good = write_lines(tmp_path / "good.jsonl", numbered(300))
    other = write_lines(tmp_path / "other.jsonl", ["tiny", "x" * 5000] if cut else ["tiny"])
    config = over(SourceConfig(uri=good), SourceConfig(uri=other), max_bytes=8000)
    (news,) = [event.message for event in progress(tmp_path / "store", config) if event.fraction is None]
    assert "yields no document: 0 records could not be read and 1 were dropped (min_document_chars: 1); check" in news
    assert news.endswith(", or raise data.max_bytes=8000") == cut


def test_how_many_records_are_quarantined_does_not_depend_on_the_parts(tmp_path):
    path = write_lines(tmp_path / "texts.jsonl", numbered(30))
    with open(path, "a") as file:
        file.write("this is no json\n" * 20_000)
    for part_bytes in (1 << 16, 1 << 20):
        found = ingest(Store(tmp_path / "store"), data_config(path, part_bytes=part_bytes))
        assert metadata(found)["quarantined"] == metadata(found)["sources"][0]["quarantined"] == 20_000
        names = [file.path for file in found.manifest().files if file.path.startswith("quarantine/")]
        items = [json.loads(line) for name in names for line in found.files.read_bytes(name).splitlines()]
        assert sum(item["records"] for item in items) == 20_000 > 20 * len(items)


def test_a_try_that_is_killed_at_its_end_is_finished_by_the_next(tmp_path):
    path = write_lines(tmp_path / "texts.jsonl", numbered(3000, 20))
    config = data_config(path, max_bytes=150_000)
    store = Store(tmp_path / "store")
    with patch.object(Attempt, "commit", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        ingest(store, config)
    assert checksums(ingest(store, config)) == checksums(ingest(Store(tmp_path / "other"), config))


# -- what stops the stage


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        (
            ["tiny", "small"],
            {},
            r"the corpus is empty: 0 records could not be read and 2 were dropped .min_document_chars: 2",
        ),
        (
            ["\0" * 100],
            {},
            r"the corpus is empty: 1 records .* read \(.*/0.txt at 0: binary.*\) and 0 were dropped; ch",
        ),
        (["a" * 100], {"max_bytes": 50}, "the corpus is empty: .* data.clean, data.max_bytes=50"),
        (
            ["a" * 100],
            {"validation_fraction": 1e-9},
            "the validation split is empty: .* 1 documents; add text, or raise",
        ),
        (["a" * 100], {"validation_fraction": 1 - 1e-9}, "the train split is empty: .*; add text, or lower"),
    ],
)
def test_a_corpus_that_cannot_be_trained_on_commits_nothing(tmp_path, documents, changes, message):
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    store = Store(tmp_path / "store")
    with pytest.raises(DataError, match=message) as caught:
        ingest(store, data_config(tmp_path / "corpus", **changes))
    assert "\n" not in str(caught.value)
    assert not [path for path in store.list("artifacts") if path.endswith("manifest.json")]


def test_strict_makes_an_error_of_what_cannot_be_read(tmp_path):
    path = tmp_path / "texts.jsonl"
    write_lines(path, numbered(30))
    with open(path, "a") as file:
        file.write("no json\n")
    offset = path.stat().st_size - len("no json\n")
    with pytest.raises(DataError, match=rf"texts.jsonl at {offset}: no JSON.*; mend it, or turn data.strict off"):
        ingest(Store(tmp_path / "store"), data_config(path, strict=True))
    assert metadata(ingest(Store(tmp_path / "store"), data_config(path)))["quarantined"] == 1


def test_strict_leaves_alone_what_a_budget_does_not_reach(tmp_path):
    path = tmp_path / "texts.jsonl"
    write_lines(path, numbered(300))
    with open(path, "a") as file:
        file.write("no json\n")
    config = data_config(path, strict=True, max_bytes=sum(map(len, numbered(200))))
    assert len(texts(ingest(Store(tmp_path / "store"), config))) == 200
    path.write_text("no json\n" + path.read_text())
    with pytest.raises(DataError, match="texts.jsonl at 0: no JSON.*; mend it, or turn data.strict off"):
        ingest(Store(tmp_path / "store"), config)


def test_a_document_that_is_cleaned_and_grows_not_is_kept_at_any_length(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(30):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number}\x07" + "long text " * 300)
    config = data_config(tmp_path / "corpus", max_document_bytes=1024, clean=CleanConfig(control_characters=True))
    assert len(texts(ingest(Store(tmp_path / "store"), config))) == 30


def test_what_a_folder_holds_besides_is_listed(tmp_path):
    folder = tmp_path / "corpus"
    write_lines(folder / "texts.jsonl", numbered(30))
    (folder / "README.md").write_text("about these texts")
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    config = data_config(folder)
    found = ingest(Store(tmp_path / "store"), config)
    (left_out,) = [json.loads(line) for line in found.files.read_bytes("left_out.jsonl").splitlines()]
    assert left_out["path"].endswith("/README.md")
    assert metadata(found)["left_out"] == [f"{left_out['path']}: {left_out['reason']}"]
    assert metadata(found)["sources"][0]["left_out"] == 1
    (unreadable,) = [json.loads(line) for line in found.files.read_bytes("quarantine/listing.jsonl").splitlines()]
    assert unreadable["path"].endswith("/gone.jsonl")
    assert metadata(found)["quarantined"] == metadata(found)["sources"][0]["quarantined"] == 1
    with pytest.raises(DataError, match="gone.jsonl at 0: "):
        ingest(Store(tmp_path / "store"), config.model_copy(update={"strict": True}))


# -- keys


def key(config):
    return Graph([ingest_stage(config)]).keys["ingest"]


def test_a_changed_file_gives_the_stage_another_key(tmp_path):
    write_corpus(tmp_path / "corpus", documents=20)
    before = key(data_config(tmp_path / "corpus"))
    assert key(data_config(tmp_path / "corpus")) == before
    (tmp_path / "corpus" / "0000.txt").write_text("something else, and long enough to count")
    assert key(data_config(tmp_path / "corpus")) != before


def test_only_what_decides_the_output_is_in_the_key(tmp_path):
    path = write_lines(tmp_path / "texts.jsonl", numbered(3))

    def changed(max_bytes=None, max_tokens=None, **source):
        return key(over(SourceConfig(uri=path, **source), max_bytes=max_bytes, max_tokens=max_tokens))

    before = changed()
    assert changed(max_tokens=9, weight=2.0) == changed(max_tokens=5) == before
    assert changed(text_column="body") != before
    assert changed(5, weight=2.0) != changed(5) != before
    config = data_config(path)
    for same in ({"dedup": DedupConfig(exact=False)}, {"packing": "best_fit"}, {"max_tokens": 5}):
        assert key(config.model_copy(update=same)) == before
    for other in ({"strict": True}, {"min_document_chars": 33}, {"clean": CleanConfig(min_words=2)}):
        assert key(config.model_copy(update=other)) != before


def test_an_unknown_language_is_an_error_before_anything_runs(corpus):
    clean = CleanConfig(language=LanguageConfig(allowed=("qq",)))
    with pytest.raises(DataError, match="data.clean.language.allowed has 'qq'"):
        ingest_stage(data_config(corpus[0], clean=clean))
