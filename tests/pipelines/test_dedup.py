"""The stage on real text, against brute force over sets of tuples of words."""

import importlib
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from cluster.artifact import Artifact
from cluster.storage import Store
from pipelines import minhash, similarity
from pipelines.data_config import DataConfig, DecontaminateConfig, DedupConfig, NearDuplicateConfig, SourceConfig
from pipelines.decontaminate import read_evaluation
from pipelines.dedup import dedup_stage
from pipelines.documents import ingest_parts, kept_parts, read_part, read_table
from pipelines.drive import drive
from pipelines.formats import Limits
from pipelines.graph import Graph
from pipelines.ngrams import hash_words, plain_text
from pipelines.runs import Run
from pipelines.similarity import Pairs, drop_similar
from pipelines.sources import DataError, find_corpus
from pipelines.stage import Stage
from pipelines.stage_key import stage_key
from tests.pipelines.data_stages import in_this_process
from tests.pipelines.near_duplicates import documents_stage, planted, similar_pairs, word_ngrams

THRESHOLD = 0.8


def config(near: NearDuplicateConfig | None = None, exact: bool = True, **changes: Any) -> DataConfig:
    return DataConfig(sources=(SourceConfig(uri="stdlib"),), dedup=DedupConfig(exact=exact, near=near), **changes)


def run(documents: Stage, settings: DataConfig, folder: Path, backwards: bool = False) -> tuple[Artifact, Artifact]:
    """The artifacts of the two stages."""
    store = Store(folder)
    graph = Graph([documents, dedup_stage(settings)])
    with in_this_process(backwards):
        results = drive(graph, store, Run.create(store, "name: test\n"))
    artifacts = results["ingest"].artifact, results["dedup"].artifact
    assert artifacts[0] and artifacts[1]
    return artifacts[0], artifacts[1]


def metadata(dedup: Artifact) -> Any:
    return dedup.verify().metadata


def dropped(ingest: Artifact, dedup: Artifact) -> dict[int, dict[str, Any]]:
    """What dropped.parquet says, with the documents' numbers in place of part and row."""
    begins = [0]
    for part in ingest_parts(ingest):
        begins.append(begins[-1] + part.documents)
    found = {}
    for row in read_table(dedup.files, "dropped.parquet").to_pylist():
        of = None if row["of_part"] is None else begins[row["of_part"]] + row["of_row"]
        found[begins[row["part"]] + row["row"]] = {"rule": row["rule"], "of": of, "similarity": row["similarity"]}
    return found


def kept_texts(ingest: Artifact, dedup: Artifact) -> list[str]:
    parts = [part for split in ("train", "validation") for part in kept_parts(ingest, dedup, split)]
    return [document.text for part in parts for document in read_part(ingest.files, part)]


def equal_texts(texts: Sequence[str]) -> dict[int, int]:
    """Of all but the first of equal texts the number of the first."""
    first: dict[str, int] = {}
    return {number: first[text] for number, text in enumerate(texts) if first.setdefault(text, number) != number}


def test_of_equal_texts_the_first_stays(tmp_path):
    generator = random.Random(0)
    texts = [f"text {generator.randrange(60)}" for _ in range(200)]
    ingest, dedup = run(documents_stage(texts, 30), config(), tmp_path)
    found, equal = dropped(ingest, dedup), equal_texts(texts)
    assert {number: row["of"] for number, row in found.items()} == equal
    assert {row["rule"] for row in found.values()} == {"exact"}
    assert list(found) == sorted(found)
    assert sorted(kept_texts(ingest, dedup)) == sorted(set(texts))
    about = metadata(dedup)
    assert about["exact"]["documents"] == len(equal)
    assert about["exact"]["bytes"] == sum(len(texts[number]) for number in equal)
    number, of = next(iter(equal.items()))
    assert about["exact"]["examples"][0] == {
        "path": "corpus.txt",
        "offset": number,
        "text": texts[number],
        "of_path": "corpus.txt",
        "of_offset": of,
        "of_text": texts[of],
        "similarity": 1.0,
    }
    assert about["near"] is about["contaminated"] is None
    kept = {split: kept_parts(ingest, dedup, split) for split in ("train", "validation")}
    assert about["splits"] == {
        split: {"documents": sum(p.documents for p in parts), "bytes": sum(p.bytes for p in parts)}
        for split, parts in kept.items()
    }
    assert sum(entry["documents"] for entry in about["splits"].values()) == len(set(texts))


def test_nothing_is_dropped_when_nothing_is_asked_for(tmp_path):
    texts = ["the same text"] * 9
    ingest, dedup = run(documents_stage(texts, 3, validation=3), config(exact=False), tmp_path)
    assert dropped(ingest, dedup) == {}
    assert kept_texts(ingest, dedup) == texts
    assert [file.path for file in dedup.verify().files] == ["dropped.parquet"]


NEAR = config(NearDuplicateConfig(threshold=THRESHOLD))


@pytest.fixture(scope="module")
def texts():
    return planted(400, seed=1)


@pytest.fixture(scope="module")
def near(texts, tmp_path_factory):
    """The two artifacts, and the pairs that the stage found similar."""
    found = []

    def keep(pairs: Pairs) -> Pairs:
        found.append(pairs)
        return drop_similar(pairs)

    with patch("pipelines.dedup.drop_similar", keep):
        artifacts = run(documents_stage(texts), NEAR, tmp_path_factory.mktemp("near"))
    (pairs,) = found
    numbers = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    return *artifacts, dict(zip(numbers, pairs.similarity.tolist(), strict=True))


def test_similar_pairs_are_found_and_no_others(texts, near):
    _, _, found = near
    equal = equal_texts(texts)
    similar = {
        pair: value
        for pair, value in similar_pairs(texts, 5, THRESHOLD).items()
        if pair[0] not in equal and pair[1] not in equal
    }
    certain = {pair for pair, value in similar.items() if value >= THRESHOLD + 0.05}
    assert len(certain) > 60
    assert len(certain & found.keys()) >= 0.95 * len(certain)
    assert found.items() <= similar.items()


def test_a_document_goes_for_an_earlier_one_that_stays(texts, near):
    ingest, dedup, _ = near
    similar = similar_pairs(texts, 5, THRESHOLD)
    found = dropped(ingest, dedup)
    goes = {number: row for number, row in found.items() if row["rule"] == "near"}
    for number, row in goes.items():
        assert row["of"] not in found
        assert row["similarity"] == similar[row["of"], number]  # a key only if the one is before the other
    missed = {second for first, second in similar if first not in found and second not in found}
    assert len(missed) <= 0.05 * len(goes)
    equal = equal_texts(texts)
    assert {number: row["of"] for number, row in found.items() if row["rule"] == "exact"} == equal
    stays = [text for number, text in enumerate(texts) if number not in found]
    assert sorted(kept_texts(ingest, dedup)) == sorted(stays)
    about = metadata(dedup)["near"]
    assert about["documents"] == len(goes)
    assert about["bytes"] == sum(len(texts[number]) for number in goes)
    assert about["compared"] >= len(goes)
    assert about["not_compared"] == 0
    assert about["examples"] == [
        {
            "path": "corpus.txt",
            "offset": number,
            "text": texts[number][:200],
            "of_path": "corpus.txt",
            "of_offset": row["of"],
            "of_text": texts[row["of"]][:200],
            "similarity": row["similarity"],
        }
        for number, row in list(goes.items())[:5]
    ]


def test_scratch_files_are_no_output(near):
    _, dedup, _ = near
    assert dedup.store.list() == [f"attempts/{dedup.verify().attempt}/dropped.parquet", "manifest.json"]


def test_what_is_dropped_does_not_depend_on_the_groups_or_the_order_of_work(texts, near, tmp_path):
    with patch.object(similarity, "GROUP_BYTES", 1 << 13):
        _, dedup = run(documents_stage(texts), NEAR, tmp_path, backwards=True)
    assert dedup.verify().files == near[1].verify().files
    assert metadata(dedup) == metadata(near[1])


@pytest.mark.parametrize("work", ["survey_part", "write_ngrams", "compare"])
def test_a_killed_try_is_taken_up(texts, near, tmp_path, work):
    module = "pipelines.survey" if work == "survey_part" else "pipelines.similarity"
    function = getattr(importlib.import_module(module), work)
    calls = []

    def fail_at_third(task, output):
        calls.append(task.path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return function(task, output)

    documents = documents_stage(texts)
    with patch.object(similarity, "GROUP_BYTES", 1 << 16), patch(f"{module}.{work}", fail_at_third):
        with pytest.raises(KeyboardInterrupt):
            run(documents, NEAR, tmp_path)
        _, dedup = run(documents, NEAR, tmp_path)
    assert len(calls) == len(set(calls)) + 1  # only the third was done again
    assert dedup.verify().files == near[1].verify().files
    assert metadata(dedup) == metadata(near[1])


def test_in_a_crowd_pairs_are_left_out_and_counted(tmp_path):
    words = " ".join(f"word{number}" for number in range(100))
    texts = [f"{words} {number}" for number in range(20)]
    with patch.object(minhash, "FIRST_OF_BUCKET", 2):
        ingest, dedup = run(documents_stage(texts, 5, validation=9), NEAR, tmp_path)
    about = metadata(dedup)["near"]
    assert {number: row["of"] for number, row in dropped(ingest, dedup).items()} == dict.fromkeys(range(1, 20), 0)
    assert about["compared"] < 20 * 19 / 2
    assert about["not_compared"] > 0


def test_a_chain_of_similar_texts_is_compared_right_in_any_groups(tmp_path):
    """Each is like the next few only: all are connected, and what connects them is in many groups."""
    words = [f"word{number}" for number in range(1000)]
    texts = [" ".join(words[begin : begin + 80]) for begin in range(0, 900, 3)]
    similar = similar_pairs(texts, 5, THRESHOLD)
    results = []
    for group_bytes in (1 << 10, 1 << 30):
        with patch.object(similarity, "GROUP_BYTES", group_bytes):
            results.append(dropped(*run(documents_stage(texts), NEAR, tmp_path / str(group_bytes))))
    assert results[0] == results[1]
    for number, row in results[0].items():
        assert row["of"] not in results[0]
        assert row["similarity"] == similar[row["of"], number]
    stay = [number for number in range(len(texts)) if number not in results[0]]
    assert len(stay) < 1.1 * len(greedy(similar, len(texts)))


def greedy(similar: dict[tuple[int, int], float], count: int) -> list[int]:
    """The documents that stay when every one goes that is similar to an earlier one that stays."""
    stay: list[int] = []
    for number in range(count):
        if not any((first, number) in similar for first in stay):
            stay.append(number)
    return stay


def test_short_texts_are_compared_as_a_whole_and_those_without_words_stay(tmp_path):
    texts = ["Hello, world", "...", "hello WORLD!", "!!!", "world hello", "hello world again"]
    ingest, dedup = run(documents_stage(texts, 4, validation=9), NEAR, tmp_path)
    assert dropped(ingest, dedup) == {2: {"rule": "near", "of": 0, "similarity": 1.0}}


def test_conversations_are_compared_by_what_is_said(tmp_path):
    said = " ".join(f"word{number}" for number in range(30))
    texts = [
        json.dumps([{"role": "user", "content": f"{said}\n{end}"}], indent=indent)
        for end, indent in (
            ("one", None),
            ("one", 1),
            ("another end of it, which is so much longer that it counts", None),
        )
    ]
    ingest, dedup = run(documents_stage(texts, 4, kind="chat", validation=9), NEAR, tmp_path)
    assert dropped(ingest, dedup) == {1: {"rule": "near", "of": 0, "similarity": 1.0}}


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing is left of the validation split"):
        run(documents_stage(["the same text"] * 4, 2, validation=2), config(), tmp_path)


def evaluation(folder: Path, texts: Sequence[str], name: str = "evaluation.jsonl") -> tuple[SourceConfig, ...]:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return (SourceConfig(uri=str(folder / name)),)


@pytest.mark.parametrize("max_matches", [0, 3])
def test_documents_with_text_of_evaluation_sets_go(texts, tmp_path, max_matches):
    generator = random.Random(2)
    tests = [" ".join(text.split()[20:50]).upper() for text in generator.sample(texts, 20)]
    shorter = " ".join(re.findall(r"\w+", generator.choice(texts))[30:40])
    tests += [shorter, "the parenthesized form", "no such thing anywhere at all in any of them", "???"]
    ngrams = set().union(*(word_ngrams(text, 13) for text in tests))
    ngrams = {ngram for ngram in ngrams if len(ngram) >= 8}
    sources = evaluation(tmp_path / "data", tests)
    settings = config(decontaminate=DecontaminateConfig(sources=sources, max_matches=max_matches))
    ingest, dedup = run(documents_stage(texts), settings, tmp_path / "store")
    lengths = {len(ngram) for ngram in ngrams}
    matches = [len(ngrams & set().union(*(word_ngrams(text, length) for length in lengths))) for text in texts]
    expected = {number for number, count in enumerate(matches) if count > max_matches} - equal_texts(texts).keys()
    assert len(expected) >= 20
    found = {number: row for number, row in dropped(ingest, dedup).items() if row["rule"] == "contaminated"}
    assert found == dict.fromkeys(sorted(expected), {"rule": "contaminated", "of": None, "similarity": None})
    about = metadata(dedup)["contaminated"]
    assert about["documents"] == len(expected)
    assert about["bytes"] == sum(len(texts[number]) for number in expected)
    for example, number in zip(about["examples"], sorted(expected), strict=False):
        words = tuple(example.pop("ngram").split())
        assert words in ngrams and words in word_ngrams(texts[number], len(words))
        assert example == {"path": "corpus.txt", "offset": number, "text": texts[number][:200]}


def test_rules_come_one_after_the_other(tmp_path):
    """Equal before contaminated before near: each document is counted once, and nothing goes for one that went."""
    words = [" ".join(f"{name}{number}" for number in range(40)) for name in ("a", "b", "c")]
    texts = [words[0], words[1], words[0], f"{words[0]} x", f"{words[1]} x", f"{words[1]} y", words[2]]
    sources = evaluation(tmp_path / "data", [words[0] + " z"])
    settings = config(NearDuplicateConfig(), decontaminate=DecontaminateConfig(sources=sources))
    ingest, dedup = run(documents_stage(texts, 4, validation=9), settings, tmp_path / "store")
    found = dropped(ingest, dedup)
    assert {number: (row["rule"], row["of"]) for number, row in found.items()} == {
        0: ("contaminated", None), 2: ("exact", 0), 3: ("contaminated", None), 4: ("near", 1), 5: ("near", 1)
    }  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "chat", "preference"])
def test_a_question_of_an_evaluation_set_is_found_wherever_it_is_asked(tmp_path, form):
    question = "how many legs do nine spiders and four ants have together"
    asked = [{"role": "user", "content": question}, {"role": "assistant", "content": "ninety-six"}]
    record = {
        "jsonl": {"text": question},
        "chat": {"messages": asked},
        "preference": {"prompt": question, "chosen": "96", "rejected": "12"},
    }[form]
    (tmp_path / "evaluation.jsonl").write_text(json.dumps(record) + "\n")
    sources = (SourceConfig(uri=str(tmp_path / "evaluation.jsonl"), format=form),)
    ngrams = read_evaluation(find_corpus(sources), 13, Limits(1 << 20, 1 << 20))
    other = [{"role": "user", "content": question}, {"role": "assistant", "content": "I do not know"}]
    preference = {"prompt": asked[:1], "chosen": other[1:], "rejected": asked[1:]}
    for kind, text in (
        ("text", f"Tell me, {question}?"),
        ("chat", json.dumps(other)),
        ("preference", json.dumps(preference)),
    ):
        text = plain_text(text, kind)
        assert ngrams.match(text, hash_words(text)) == (1, question)


def test_unreadable_evaluation_sets_are_an_error(tmp_path):
    sources = evaluation(tmp_path / "data", ["some words"])
    with open(tmp_path / "data" / "evaluation.jsonl", "a") as file:
        file.write("{not json\n")
    settings = config(decontaminate=DecontaminateConfig(sources=sources))
    with pytest.raises(DataError, match="data.decontaminate.sources.*evaluation.jsonl"):
        run(documents_stage(["a text"]), settings, tmp_path / "store")


@pytest.mark.parametrize("ngram", [13, 3])
def test_evaluation_texts_of_too_few_words_are_ignored_and_counted(tmp_path, ngram):
    """A benchmark's answer of a word or a phrase would condemn most documents."""
    least = min(ngram, 8)
    count = [f"word{number}" for number in range(least)]
    tests = ["yes", "?!", " ".join(count[1:]), " ".join(count)]
    texts = ["yes it is", f"so {' '.join(count[1:])} it is", f"so {' '.join(count)} it is"]
    sources = evaluation(tmp_path / "data", tests)
    settings = config(decontaminate=DecontaminateConfig(sources=sources, ngram=ngram))
    ingest, dedup = run(documents_stage(texts, 3, validation=9), settings, tmp_path / "store")
    assert list(dropped(ingest, dedup)) == [2]
    assert metadata(dedup)["contaminated"]["too_short"] == 3


@pytest.mark.parametrize("tests", [["?!", "--"], ["yes", "no"]])
def test_evaluation_sets_without_ngrams_are_an_error(tmp_path, tests):
    settings = config(decontaminate=DecontaminateConfig(sources=evaluation(tmp_path / "data", tests)))
    with pytest.raises(DataError, match="data.decontaminate.sources hold no text of at least 8 words"):
        run(documents_stage(["a text"]), settings, tmp_path / "store")


def test_the_key_is_what_the_output_depends_on(tmp_path):
    def key(settings: DataConfig) -> str:
        return stage_key(dedup_stage(settings), {"ingest": "0"})

    assert key(config()) == key(config(part_bytes=1 << 20, validation_fraction=0.5, packing="best_fit"))
    assert key(config()) != key(config(exact=False)) != key(NEAR)
    settings = config(decontaminate=DecontaminateConfig(sources=evaluation(tmp_path, ["one text"])))
    before = key(settings)
    assert before != key(config())
    evaluation(tmp_path, ["another text"])
    assert key(settings) != before
