import json
import random
from dataclasses import asdict
from itertools import pairwise
from unittest.mock import patch

import pytest
import tokenizers

from cluster.serve.token_text import TokenText
from cluster.storage import Store
from llama.tokenizer import Tokenizer
from llama.tokenizer_training import train_tokenizer
from pipelines import baselines, vocabulary
from pipelines.conversations import chat_contents
from pipelines.data_config import SourceConfig
from pipelines.documents import Document, KeptPart, document_id, kept_parts, read_part, write_part
from pipelines.drive import drive
from pipelines.graph import Graph
from pipelines.recipe import TokenizerConfig
from pipelines.runs import Run
from pipelines.sources import DataError
from pipelines.vocabulary import load_tokenizer, tokenizer_fingerprint, tokenizer_stage
from tests.pipelines.data_stages import data_config, data_graph, in_this_process, run_stages, write_corpus

TEXTS = ["the cat sat on the mat\n" * 20, "naïve 模型 🙂\t\r\n\0 <|bos|> the the\n" * 20]


def test_equal_tokenizers_have_equal_fingerprints():
    fingerprint = tokenizer_fingerprint(train_tokenizer(TEXTS, 300))
    assert tokenizer_fingerprint(train_tokenizer(list(TEXTS), 300)) == fingerprint
    assert tokenizer_fingerprint(train_tokenizer(TEXTS[:1], 300)) != fingerprint
    backend = train_tokenizer(TEXTS, 300).backend
    others = [Tokenizer(backend, chat_template=None), Tokenizer(backend, eos_token="<|bos|>")]
    assert len({fingerprint, *map(tokenizer_fingerprint, others)}) == 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Runs the stages up to the tokenizer over texts, conversations and preferences; ingest and dedup only once."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_corpus(folder / "corpus", documents=60)
    talk = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because <|eos|>"}]
    talks = [[*talk, {"role": "user", "content": f"number {number}?"}] for number in range(40)]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    pairs = [{"prompt": f"zzz {number}", "chosen": "zzz", "rejected": "zz"} for number in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    sources = (
        SourceConfig(uri=str(folder / "corpus")),
        SourceConfig(uri=str(folder / "chats.jsonl"), format="chat"),
        SourceConfig(uri=str(folder / "pairs.jsonl"), format="preference"),
    )
    config, store = data_config(folder, sources=sources), Store(folder / "store")

    def stages(tokenizer):
        graph = data_graph(config, tokenizer=tokenizer)
        upstream = [graph.stages[name] for name in ("ingest", "dedup", "tokenizer")]
        with in_this_process():
            return run_stages(Graph(upstream), store)

    return stages


def training_texts(artifacts):
    """What a tokenizer learns from: all that dedup left but preferences; of a conversation what is said in it."""
    ingest = artifacts["ingest"]
    return [
        chat_contents(document.text) if part.kind == "chat" else document.text
        for part in kept_parts(ingest, artifacts["dedup"], "train")
        for document in read_part(ingest.files, part)
        if part.kind != "preference"
    ]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_the_stage_learns_from_the_training_split_alone(prepared, kind):
    artifacts = prepared(TokenizerConfig(vocab_size=280, kind=kind))
    texts = training_texts(artifacts)
    assert any("because" in text for text in texts) and not any("role" in text or "zzz" in text for text in texts)
    expected = train_tokenizer(texts, 280, kind)
    found = load_tokenizer(artifacts["tokenizer"])
    assert found.backend.to_str() == expected.backend.to_str()
    size = sum(len(text.encode()) for text in texts)
    assert artifacts["tokenizer"].manifest().metadata == {
        "vocab_size": 280,
        "fingerprint": tokenizer_fingerprint(expected),
        "trained_on_bytes": size,
        "bytes_per_token": pytest.approx(size / sum(map(len, expected.encode_batch(texts))), rel=0.05),
    }
    assert found.apply_chat_template([{"role": "user", "content": "the"}])[0] == found.bos_id


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_the_bytes_of_a_token_are_known_whatever_the_kind(kind):
    tokenizer = train_tokenizer(TEXTS, 280 if kind != "unigram" else 262, kind)
    text = "".join(TEXTS) + "##the ▁ 🚀 \xa0"
    pieces = baselines.token_bytes(tokenizer)
    ids = tokenizer.encode(text)
    assert b"".join(pieces[token_id] for token_id in ids) == text.encode()
    assert b"".join(TokenText(tokenizer).bytes_of(token_id) for token_id in ids) == text.encode()


def test_of_conversations_what_is_said_is_sampled(tmp_path):
    """As much as of texts, however much JSON is around it."""
    store, parts = Store(tmp_path), []
    for source, kind in enumerate(("text", "chat")):
        said = [f"{source} {number} ".ljust(50, "x") for number in range(2000)]
        chats = [json.dumps([{"role": "assistant", "content": text, "name": "y" * 100}]) for text in said]
        documents = [Document(document_id(text), text, "", 0) for text in (said if kind == "text" else chats)]
        _, part = write_part(store, f"train/{source}.parquet", source, "train", kind, documents)
        parts.append(KeptPart(**asdict(part)))
    sample = list(vocabulary._sample(store, parts, 50_000))
    for source in "01":
        assert 20_000 < sum(len(text) for text in sample if text.startswith(source)) < 30_000


def test_a_large_corpus_is_sampled(prepared):
    full = prepared(TokenizerConfig(vocab_size=300))["tokenizer"].manifest().metadata["trained_on_bytes"]
    half = prepared(TokenizerConfig(vocab_size=300, sample_bytes=full // 2))["tokenizer"].manifest().metadata
    assert 0.25 * full < half["trained_on_bytes"] < 0.75 * full


def test_of_a_large_corpus_few_files_are_read_and_every_source_is_sampled_alike(tmp_path):
    generator, parts, store = random.Random(0), [], Store(tmp_path)
    sizes: dict[int, int] = {}
    for source, files in enumerate((60, 20, 1)):
        for number in range(files):
            texts = [f"{source} {generator.random()} ".ljust(generator.randint(100, 300), "x") for _ in range(20)]
            documents = [Document(document_id(text), text, "file:///x", 0) for text in texts]
            _, part = write_part(store, f"train/{source}-{number}.parquet", source, "train", "text", documents)
            parts.append(KeptPart(**asdict(part)))
            sizes[source] = sizes.get(source, 0) + part.bytes
    total = sum(sizes.values())
    read = []

    def reading(files, part):
        read.append(part)
        return read_part(files, part)

    with patch("pipelines.vocabulary.read_part", reading):
        sample = list(vocabulary._sample(store, parts, total // 10))
    found = {source: sum(len(text) for text in sample if text.startswith(f"{source} ")) for source in sizes}
    assert found[0] == pytest.approx(sizes[0] / 10, rel=0.2) and found[1] == pytest.approx(sizes[1] / 10, rel=0.3)
    assert 0 < found[2] < sizes[2] / 2
    assert [len([part for part in read if part.source == source]) for source in sizes] == [24, 8, 1]
    numbers = [parts.index(part) for part in read if part.source == 0]
    assert numbers == sorted(numbers) and max(b - a for a, b in pairwise([-1, *numbers, 60])) <= 4
    assert list(vocabulary._sample(store, parts, total)) == [
        document.text for part in parts for document in read_part(store, part)
    ]


def test_long_texts_are_sampled_by_stretches(tmp_path, monkeypatch):
    monkeypatch.setattr("llama.tokenizer._STRETCH_CHARS", 100)
    text = "".join(f"word {number}\n" for number in range(2000))
    _, part = write_part(
        store := Store(tmp_path), "a.parquet", 0, "train", "text", [Document(document_id(text), text, "x", 0)]
    )
    found = sum(map(len, vocabulary._sample(store, [KeptPart(**asdict(part))], len(text) // 4)))
    assert found == pytest.approx(len(text) / 4, rel=0.3)


def test_a_sample_of_nothing_is_refused(prepared):
    with pytest.raises(DataError, match=r"^tokenizer\.sample_bytes=1 is less than single documents have, .* raise it"):
        prepared(TokenizerConfig(vocab_size=300, sample_bytes=1))


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused(prepared):
    with pytest.raises(
        DataError, match=r"tokenizer\.vocab_size=60000, but .* yields only \d+ tokens; add text, or set"
    ):
        prepared(TokenizerConfig(vocab_size=60_000))


def test_no_text_is_an_error(tmp_path):
    pairs = [{"prompt": f"a question of {number}", "chosen": "yes", "rejected": "no"} for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    config = data_config(tmp_path, sources=(SourceConfig(uri=str(tmp_path / "pairs.jsonl"), format="preference"),))
    with in_this_process(), pytest.raises(DataError, match="no training text is left of data.sources"):
        run_stages(data_graph(config), Store(tmp_path / "store"))


# -- a tokenizer from outside


@pytest.fixture
def foreign(tmp_path):
    """A directory as a model's, with two tokens that end a generation."""
    tokenizer = train_tokenizer(TEXTS, 280)
    Tokenizer(tokenizer.backend, chat_template="{{ messages[0].content }}").save(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 1], "top_k": 3}')
    return tmp_path / "model"


def test_a_tokenizer_from_outside_is_taken_as_it_is(prepared, foreign):
    (foreign / "config.json").write_text("not read")
    for uri in (str(foreign), foreign.as_uri(), str(foreign / "tokenizer.json")):
        config = TokenizerConfig(path=uri)
        assert (config.vocab_size, config.kind, config.sample_bytes) == (280, None, None)
        artifact = prepared(config)["tokenizer"]
        found, expected = load_tokenizer(artifact), Tokenizer.load(foreign)
        assert found.backend.to_str() == expected.backend.to_str()
        assert (found.eos_ids, found.chat_template) == (expected.eos_ids, expected.chat_template) and 5 in found.eos_ids
        metadata = artifact.manifest().metadata
        assert metadata["fingerprint"] == tokenizer_fingerprint(expected)
        assert metadata["trained_on_bytes"] == 0 and 1 < metadata["bytes_per_token"] < 8
        assert "config.json" not in artifact.files.list()


def test_a_tokenizer_that_loses_text_is_adopted_with_a_warning(foreign, tmp_path):
    lossy = Tokenizer.load(foreign)
    lossy.backend.normalizer = tokenizers.normalizers.Lowercase()
    lossy.save(foreign)
    write_corpus(tmp_path / "corpus", documents=20)
    graph = data_graph(data_config(tmp_path / "corpus"), tokenizer=TokenizerConfig(path=str(foreign)))
    store, events = Store(tmp_path / "store"), []
    with in_this_process():
        drive(graph, store, Run.create(store, ""), until="tokenizer", on_event=events.append)
    (warning,) = [event.message for event in events if event.stage == "tokenizer" and event.kind == "progress"]
    assert warning == "warning: the tokenizer does not bring these back as they were written: mixed case"


def test_the_stage_key_follows_the_files_and_not_their_place(foreign, tmp_path):
    def key(path, **settings):
        return tokenizer_stage(TokenizerConfig(path=str(path), **settings)).config

    before = key(foreign)
    assert key(foreign, vocab_size=512) == before
    foreign.rename(tmp_path / "moved")
    assert key(tmp_path / "moved") == before
    (tmp_path / "moved" / "chat_template.jinja").write_text("{{ messages[1].content }}")
    assert key(tmp_path / "moved") != before


def test_the_model_may_have_more_rows_than_the_tokenizer_but_not_fewer(prepared, foreign):
    assert load_tokenizer(prepared(TokenizerConfig(path=str(foreign), vocab_size=512))["tokenizer"]).vocab_size == 280
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=279 is less than the 280 tokens .*set at least 280"):
        prepared(TokenizerConfig(path=str(foreign), vocab_size=279))
