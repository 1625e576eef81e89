"""Every document is accounted for, and the picture shows the figures of the report."""

import io
import json
import math
import random
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from cluster.storage import Store
from pipelines.data_config import DataConfig, DecontaminateConfig, DedupConfig, NearDuplicateConfig, SourceConfig
from pipelines.data_report import (
    JSON_FILE,
    PICTURE_FILE,
    build_report,
    draw_report,
    in_one_line,
    source_labels,
    write_report,
)
from pipelines.drive import drive
from pipelines.figures import own_style, png
from pipelines.graph import Graph
from pipelines.report import summarise
from pipelines.runs import Run
from pipelines.stage import Stage, StageResult
from tests.pipelines.data_stages import data_graph, in_this_process, run_stages

SEQ_LEN = 16
RULES = ("min_document_chars", "min_words", "language")
FATES = (
    *RULES,
    "exact duplicate",
    "contaminated",
    "near duplicate",
    "refused by the chat template",
    "over a limit of tokens",
)
FATE = st.sampled_from([*FATES, "packed", "preference"])


def count(sizes: list[int]) -> dict:
    return {"documents": len(sizes), "bytes": sum(sizes)}


def stages_metadata(documents: list[tuple[int, str, int]], uris: list[str]) -> dict[str, dict]:
    """What the four stages would say of documents given as (source, fate, bytes); a token has 4 bytes."""

    def sizes(*fates: str, source: int | None = None) -> list[int]:
        return [size for number, fate, size in documents if fate in fates and source in (None, number)]

    after_ingest = FATES[3:] + ("packed", "preference")
    after_dedup = (*FATES[6:], "packed", "preference")
    packed = sizes("packed")
    bins = Counter((size // 4).bit_length() - 1 for size in packed)
    split = {
        **count(packed),
        "tokens": sum(size // 4 for size in packed),
        "targets": sum(size // 4 for size in packed),
        "rows": 2 * len(packed),
        "samples": 2 * len(packed),
    }
    empty = dict.fromkeys(split, 0)
    nothing = {"documents": 0, "bytes": 0}
    return {
        "ingest": {
            "sources": [
                {
                    "uri": uri,
                    "format": "text",
                    "kind": "text",
                    "files": 1,
                    "left_out": 1,
                    "quarantined": 2,
                    "documents_in": len(sizes(*FATES, "packed", "preference", source=number)),
                    "bytes_in": sum(sizes(*FATES, "packed", "preference", source=number)),
                    "dropped": {rule: len(sizes(rule, source=number)) for rule in RULES},
                }
                for number, uri in enumerate(uris)
            ],
            "parts": [{"kind": "text", "source": 0}]
            + [{"kind": "preference", "source": number} for number in range(len(uris))],
            "dropped": {rule: {**count(sizes(rule)), "examples": []} for rule in RULES},
            "changed": {"unicode": 3},
            "quarantined": 2 * len(uris),
            "quarantine": ["a.txt at 5: not UTF-8"],
            "left_out": ["README.md"],
            "splits": {"train": count(sizes(*after_ingest)), "validation": nothing},
        },
        "dedup": {
            "kept": [count(packed), *(count(sizes("preference", source=number)) for number in range(len(uris)))],
            **{
                name: {
                    **count(sizes(rule)),
                    "by_source": {str(number): len(sizes(rule, source=number)) for number in range(len(uris))},
                    "examples": [],
                }
                for name, rule in zip(("exact", "contaminated", "near"), FATES[3:6], strict=True)
            },
            "splits": {"train": count(sizes(*after_dedup)), "validation": nothing},
        },
        "tokenizer": {"vocab_size": 300, "fingerprint": "f", "trained_on_bytes": 5},
        "shards": {
            "packing": "best_fit",
            "seq_len": SEQ_LEN,
            "splits": {"train": split, "validation": empty},
            "sources": [
                {
                    "uri": uri,
                    **count(sizes("packed", source=number)),
                    "tokens": sum(size // 4 for size in sizes("packed", source=number)),
                    "training_tokens": sum(size // 4 for size in sizes("packed", source=number)),
                    "validation_tokens": 0,
                    "over_tokens": len(sizes("over a limit of tokens", source=number)),
                    "refused": len(sizes("refused by the chat template", source=number)),
                }
                for number, uri in enumerate(uris)
            ],
            "chat_refused": {"documents": len(sizes("refused by the chat template")), "examples": []},
            "length_histogram": [bins[power] for power in range(max(bins, default=0) + 1)],
        },
    }


def some_metadata(seed: int = 0, sources: int = 2, uri: str = "s3://bucket/{}") -> dict[str, dict]:
    generator = random.Random(seed)
    fates = [*FATES, *["packed"] * 20, "preference"]
    documents = [(generator.randrange(sources), generator.choice(fates), generator.randint(4, 900)) for _ in range(400)]
    return stages_metadata(documents, [uri.format(number) for number in range(sources)])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), FATE, st.integers(4, 900)), max_size=30))
def test_every_document_is_kept_or_dropped_by_a_named_rule(documents: list[tuple[int, str, int]]) -> None:
    report = build_report(**stages_metadata(documents, ["a", "b", "c"]))
    fates = Counter(fate for _, fate, _ in documents)
    assert report["documents"] == {"in": len(documents), "kept": fates["packed"] + fates["preference"]}
    assert {rule: of["documents"] for rule, of in report["dropped"].items()} == {f: fates[f] for f in FATES if fates[f]}
    assert report["preferences"]["documents"] == fates["preference"]
    for number, source in enumerate(report["sources"]):
        mine = Counter(fate for of, fate, _ in documents if of == number)
        assert source["dropped"] == {fate: mine[fate] for fate in FATES if mine[fate]}
    pairs = [sum((number, fate) == (n, "preference") for number, fate, _ in documents) for n in range(3)]
    assert [source["preferences"] for source in report["sources"]] == pairs
    assert sum(of["documents"] for of in report["length_histogram"]) == fates["packed"]
    text_bytes = [sum(size for number, fate, size in documents if (number, fate) == (n, "packed")) for n in range(3)]
    assert [source["bytes"] for source in report["sources"]] == text_bytes


def _write_sources(folder: Path) -> tuple[SourceConfig, ...]:
    """One of texts that meet every rule, one of conversations, one of preferences, one beyond its limit of tokens."""
    words = [" ".join(f"{name}{number}" for number in range(40)) for name in ("near", "test", "plain")]
    texts = ["tiny", *words, words[0] + " more", words[2]]
    texts += [" ".join(f"word{n}x{place}" for place in range(20)) for n in range(40)]
    talks = [[("user", f"{n}?"), ("assistant", f"{n}!")] + [("tool", "no")] * (n % 5 == 0) for n in range(60)]
    lines = {
        "texts": [{"text": text} for text in texts],
        "talks": [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in talks + talks[:3]],
        "pairs": [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in [*range(30), 0, 1]],
        "more": [{"text": f"a text of its own, number {n}: {'x' * n}"} for n in range(90)] + [{"text": words[1]}] * 2,
    }
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\nno json" * 150)
    (folder / "evaluation.jsonl").write_text(json.dumps({"text": words[1]}))
    return (
        SourceConfig(uri=str(folder / "texts.jsonl")),
        SourceConfig(uri=str(folder / "talks.jsonl"), format="chat"),
        SourceConfig(uri=str(folder / "pairs.jsonl"), format="preference"),
        SourceConfig(uri=str(folder / "more.jsonl"), max_tokens=500),
    )


@pytest.mark.parametrize("max_tokens", [None, 1500])
def test_of_each_source_of_a_run_every_document_is_accounted_for(tmp_path: Path, max_tokens: int | None) -> None:
    config = DataConfig(
        sources=_write_sources(tmp_path),
        validation_fraction=0.2,
        min_document_chars=8,
        part_bytes=1 << 16,
        max_tokens=max_tokens,
        dedup=DedupConfig(near=NearDuplicateConfig()),
        decontaminate=DecontaminateConfig(sources=(SourceConfig(uri=str(tmp_path / "evaluation.jsonl")),)),
    )
    with in_this_process():
        artifacts = run_stages(data_graph(config, vocab_size=300), Store(tmp_path / "store"))
    report = artifacts["shards"].files.read_json(JSON_FILE)
    total: Counter[str] = Counter()
    for source in report["sources"]:
        total.update(source["dropped"])
        kept = source["documents"] + source["preferences"]
        assert source["documents_in"] == kept + sum(source["dropped"].values())
        assert source["tokens"] == source["training_tokens"] + source["validation_tokens"]
    assert [source["documents_in"] for source in report["sources"]] == [46, 63, 32, 92]
    assert total == {rule: of["documents"] for rule, of in report["dropped"].items()}
    assert report["documents"]["in"] == report["documents"]["kept"] + sum(total.values())
    assert set(FATES[3:]) | {"min_document_chars"} == set(total)
    texts, talks, pairs, more = (source["dropped"] for source in report["sources"])
    assert [texts[rule] for rule in ("min_document_chars", *FATES[3:6])] == [1, 1, 1, 1]
    assert (talks["exact duplicate"], talks["refused by the chat template"]) == (3, 12)
    assert pairs == {"exact duplicate": 2}
    assert more["exact duplicate"] == 2 and more["over a limit of tokens"] > 20
    assert ("over a limit of tokens" in texts) == (max_tokens is not None)
    assert report["training_tokens"] <= (max_tokens or math.inf)
    assert report["quarantined"]["records"] == 600
    assert all(
        example["text"] and example.get("of_text", example["text"])
        for rule in total.keys() - {"over a limit of tokens"}
        for example in report["dropped"][rule]["examples"]
    )


def test_rates_are_bytes_per_token_and_targets_per_place() -> None:
    report = build_report(
        **stages_metadata([(0, "packed", 40), (1, "packed", 24), (1, "min_words", 9)], ["a", "b", "c"])
    )
    assert [source["bytes_per_token"] for source in report["sources"]] == [4.0, 4.0, None]
    train = report["packing"]["splits"]["train"]
    assert train["density"] == 16 / (4 * SEQ_LEN)
    assert report["packing"]["splits"]["validation"]["density"] is None
    assert [of["documents"] for of in report["length_histogram"]] == [0, 0, 1, 1]  # 6 and 10 tokens
    assert report["dropped"]["min_words"]["bytes"] == 9


def test_the_line_names_what_is_lost() -> None:
    documents = [(0, "packed", 40)] * 1234 + [(0, "language", 40)] * 2 + [(0, "near duplicate", 4)]
    report = build_report(**stages_metadata(documents, ["a"]))
    dropped = "2 language, 1 near duplicate"
    assert (
        in_one_line(report)
        == f"1,237 documents → 1,234 kept, 12,340 training and 0 validation tokens; dropped: {dropped}; 2 quarantined"
    )


def test_the_flow_begins_where_the_last_rule_ended_and_ends_at_what_was_packed() -> None:
    report = build_report(**some_metadata())
    with own_style():
        flow, tokens, bytes_per_token, lengths = draw_report(report).axes
    names = [label.get_text() for label in flow.get_yticklabels()]
    assert names == ["read", *report["dropped"], "preference pairs", "packed"]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in flow.patches]
    assert bars[0] == (0, report["documents"]["in"])
    for (begin, _), (_, end) in zip(bars[:-1], bars[1:], strict=True):
        assert end == begin or begin == 0
    assert bars[-1] == (0, report["documents"]["kept"] - report["preferences"]["documents"])
    assert [bar.get_width() for bar in tokens.patches] == [source["tokens"] for source in report["sources"]]
    assert [bar.get_width() for bar in bytes_per_token.patches] == [s["bytes_per_token"] for s in report["sources"]]
    assert sum(bar.get_height() for bar in lengths.patches) == sum(s["documents"] for s in report["sources"])


@pytest.mark.parametrize(
    ("sources", "uri", "drawn"),
    [(1, "stdlib", 1), (20, "s3://" + "long/" * 30 + "$a_{}$/语料/{{}}%20\n", 20), (45, "file:///x/{}", 20)],
    ids=["one", "odd names", "many"],
)
def test_any_number_of_sources_of_any_name_is_drawn(sources: int, uri: str, drawn: int) -> None:
    report = build_report(**some_metadata(sources=sources, uri=uri))
    with warnings.catch_warnings(), own_style():
        warnings.simplefilter("error")  # a glyph that the font has not, or a layout that collapsed
        figure = draw_report(report)
        picture = png(figure)
    tokens = figure.axes[1]
    assert len(tokens.patches) == drawn
    assert sum(bar.get_width() for bar in tokens.patches) == report["tokens"]
    assert imread(io.BytesIO(picture)).std() > 0.05
    assert b"Software" not in picture and b"Creation" not in picture


def test_labels_show_where_sources_differ() -> None:
    tail = "cleaned/deduplicated/and-some-more/part-*.jsonl.zst?endpoint_override=host:80&scheme=http"
    uris = [f"s3://corpora/a-long-name/{kind}/{year}/{tail}" for kind in ("web", "books") for year in (1999, 2025)]
    assert source_labels([*uris, "stdlib", "s3://bucket/x?region=a", "/data/part-?.txt"]) == [
        "0: …/web/1999/…/part-*.jsonl.zst",
        "1: …/web/2025/…/part-*.jsonl.zst",
        "2: …/books/1999/…/part-*.jsonl.zst",
        "3: …/books/2025/…/part-*.jsonl.zst",
        "4: stdlib",
        "5: s3://bucket/x",
        "6: /data/part-?.txt",
    ]
    (label,) = source_labels(["/" + "name" * 30])
    assert len(label) <= 43 and label.endswith("name") and "…" in label


def test_green_is_what_is_kept_and_the_title_fits() -> None:
    documents = [(0, "packed", 40), (0, "language", 4)]
    report = build_report(**stages_metadata(documents, ["a"])) | {"training_tokens": 10**12, "validation_tokens": 10**9}
    report["documents"] = {"in": 10**10, "kept": 10**10}
    report["quarantined"] = {"records": 10**9}
    with own_style():
        figure = draw_report(report)
        png(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["read", "language", "kept"]
    (title,) = figure.texts
    assert title.get_text() == (
        "10,000,000,000 documents in, 10,000,000,000 kept; 1,000,000,000 records in quarantine\n"
        "1,000,000,000,000 training and 1,000,000,000 validation tokens"
    )
    box = title.get_window_extent()
    assert figure.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1


def test_nothing_kept_can_be_drawn() -> None:
    report = build_report(**stages_metadata([(0, "min_words", 9)], ["a"]))
    with own_style():
        assert png(draw_report(report))


def _graph(metadata: dict[str, dict]) -> Graph:
    def write_shards(context):
        context.record(context.attempt.store.write_bytes("train/shard", b"x"))
        write_report(context, metadata["shards"])
        return metadata["shards"]

    upstream = ("ingest", "dedup", "tokenizer")

    def stage(name: str, after: tuple[str, ...]) -> Stage:
        def write(context):
            context.record(context.attempt.store.write_bytes("out", b"x"))
            return metadata[name]

        return Stage(name, 1, {}, write, after)

    stages = [stage("ingest", ()), stage("dedup", ("ingest",)), stage("tokenizer", ("dedup",))]
    return Graph([*stages, Stage("shards", 1, {}, write_shards, upstream)])


def _run(graph: Graph, store: Store) -> tuple[Run, dict[str, StageResult]]:
    run = Run.create(store, "name: test\n")
    return run, drive(graph, store, run)


def test_the_report_is_part_of_the_shards_and_of_every_run_that_used_them(tmp_path: Path) -> None:
    graph = _graph(some_metadata())
    store = Store(tmp_path / "store")
    for state in ("done", "skipped"):
        run, results = _run(graph, store)
        assert results["shards"].state == state
        summary = summarise(run, results, 1.0)
        shards = graph.artifact(store, "shards")
        assert {file.path for file in shards.verify().files} == {"train/shard", JSON_FILE, PICTURE_FILE}
        assert run.directory.read_bytes(JSON_FILE) == shards.files.read_bytes(JSON_FILE)
        assert run.directory.read_bytes("plots/data.png") == shards.files.read_bytes(PICTURE_FILE)
        assert summary.plots == (str(run.directory.local_path("plots/data.png")),)
        assert summary.data == in_one_line(run.directory.read_json(JSON_FILE))
        assert summary.quarantine == str(graph.artifact(store, "ingest").files.local_path("quarantine"))
    other = Store(tmp_path / "other")
    _run(graph, other)
    mine, theirs = (graph.artifact(at, "shards").verify().files for at in (store, other))
    assert mine == theirs  # the same bytes at another time and place


def test_a_run_that_made_no_shards_has_no_report(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = Run.create(store, "name: test\n")
    summary = summarise(run, drive(_graph(some_metadata()), store, run, until="dedup"), 1.0)
    assert summary.data is None and summary.plots == ()
    assert not run.directory.exists(JSON_FILE)
