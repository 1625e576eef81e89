import json
import random
from dataclasses import asdict
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage import Store
from llama.tokenizer import Tokenizer
from llama.tokenizer_training import train_tokenizer
from pipelines.conversations import canonical
from pipelines.data_config import SourceConfig
from pipelines.documents import SPLITS, Document, KeptPart, document_id, kept_parts, read_part, write_part
from pipelines.mixture import Claim, divide
from pipelines.recipe import TokenizerConfig
from pipelines.shards import ShardConfig, ShardTask, _run, token_dtype, write_shard
from pipelines.sources import DataError
from pipelines.vocabulary import load_tokenizer, tokenizer_fingerprint
from tests.pipelines.data_stages import (
    SEQ_LEN,
    checksums,
    data_config,
    data_graph,
    in_this_process,
    run_stages,
    write_corpus,
)

PACKINGS = ("concatenate", "best_fit")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "corpus"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all tests: the stages before `shards` run once."""
    return Store(tmp_path_factory.mktemp("shards") / "store")


def make(store, config, backwards=False, **others):
    with in_this_process(backwards):
        return run_stages(data_graph(config, **others), store)


@pytest.fixture(scope="module", params=PACKINGS)
def artifacts(request, corpus, store):
    return make(store, data_config(corpus, packing=request.param))


def metadata(artifacts):
    return artifacts["shards"].manifest().metadata


def shard_list(artifacts, split):
    return metadata(artifacts)["splits"][split]["shards"]


def read(artifacts, path):
    return read_arrow(artifacts["shards"].files.read_bytes(path))


def read_arrow(data):
    """The columns of a shard, as lists of rows."""
    batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
    return {name: batch[name].to_pylist() for name in batch.schema.names}


def documents_of(artifacts, split):
    """(source, text) of what dedup left and shards are made of, in order."""
    ingest = artifacts["ingest"]
    return [
        (part.source, document.text)
        for part in kept_parts(ingest, artifacts["dedup"], split)
        for document in read_part(ingest.files, part)
    ]


def pieces_of(columns):
    """(row, number, begin, end) of each piece."""
    rows = zip(columns["documents"], columns["numbers"], columns["length"], strict=True)
    for row, (begins, numbers, length) in enumerate(rows):
        ends = [*begins[1:], length]
        yield from ((row, *piece) for piece in zip(numbers, begins, ends, strict=True))


def documents_in(columns, column="tokens"):
    """The documents' tokens, put together again from their pieces."""
    documents: dict[int, list[int]] = {}
    for row, number, begin, end in pieces_of(columns):
        piece = columns[column][row][begin:end]
        documents[number] = documents[number] + piece[1:] if number in documents else piece
    assert list(range(len(documents))) == sorted(documents)
    return [documents[number] for number in range(len(documents))]


def targets_in(columns, packing):
    """Every target that counts, one after the other."""
    found = []
    for row, tokens in enumerate(columns["tokens"]):
        firsts = columns["documents"][row] if packing == "best_fit" else [0]
        mask = columns["loss_mask"][row] if "loss_mask" in columns else [1] * len(tokens)
        found += [tokens[t] for t in range(1, columns["length"][row]) if t not in firsts and mask[t]]
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_the_shards_give_every_text_once_in_order(artifacts, split):
    tokenizer = load_tokenizer(artifacts["tokenizer"])
    decoded = []
    for shard in shard_list(artifacts, split):
        documents = documents_in(read(artifacts, shard["path"]))
        assert len(documents) == shard["documents"]
        for ids in documents:
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            decoded.append((shard["source"], tokenizer.decode(ids[1:-1], skip_special_tokens=False)))
    assert decoded == documents_of(artifacts, split)


@pytest.fixture(scope="module")
def tokenizers():
    texts = ["the cat sat on the mat\n" * 9, "naïve 模型 🙂 <|eos|>\r\n" * 9]
    return {kind: train_tokenizer(texts, 275, kind) for kind in ("bpe", "wordpiece", "unigram")}


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_text_comes_back_from_a_shard(tokenizers, tmp_path_factory, kind, data):
    """Of any characters, in rows of any length, under any budget, of a text or a conversation."""
    tokenizer, store = tokenizers[kind], Store(tmp_path_factory.mktemp("shard"))
    texts = data.draw(
        st.lists(st.text(st.characters(codec="utf-8"), max_size=60) | st.just("the mat <|eos|> "), max_size=9)
    )
    chat, packing = data.draw(st.booleans()), data.draw(st.sampled_from(PACKINGS))
    dropped = tuple(sorted(data.draw(st.sets(st.integers(0, len(texts) - 1)))) if texts else ())
    talks = [[{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}] for text in texts]
    written = [canonical(talk) for talk in talks] if chat else texts
    documents = [Document(document_id(text), text, "file:///x", 0) for text in written]
    _, part = write_part(store, "part.parquet", 0, "train", "chat" if chat else "text", documents)
    encoded = [
        tokenizer.encode_chat(talk) if chat else ([0, *tokenizer.encode(text), 1], None)
        for number, (talk, text) in enumerate(zip(talks, texts, strict=True))
        if number not in dropped
    ]
    total = sum(len(ids) for ids, _ in encoded)
    limit = data.draw(st.none() | st.integers(0, total + 1))
    sums = np.cumsum([len(ids) for ids, _ in encoded])
    fitting = len(encoded) if limit is None else int((sums <= limit).sum())
    task = ShardTask(
        name="train/shard",
        source=0,
        kind=part.kind,
        documents=store,
        parts=(KeptPart(**(asdict(part) | {"dropped": dropped})),),
        tokenizer=store,
        seq_len=data.draw(st.integers(1, 20)),
        packing=packing,
        masked=chat,
        limit=limit,
    )
    with patch("pipelines.shards._load", lambda store: tokenizer), patch("llama.tokenizer._STRETCH_CHARS", 25):
        result = write_shard(task, store).result
    if not fitting:
        assert result["shard"] is result["file"] is None and result["tokens"] == 0
        return
    columns = read_arrow(store.read_bytes("train/shard.arrow"))
    expected = [
        f"<|bos|><|user|>{text[:9]}<|eos|><|assistant|>{text[9:]}<|eos|>" if chat else f"<|bos|>{text}<|eos|>"
        for number, text in enumerate(texts)
        if number not in dropped
    ]
    found = [tokenizer.decode(ids, skip_special_tokens=False) for ids in documents_in(columns)]
    assert found == expected[:fitting]
    if chat:
        assert documents_in(columns, "loss_mask") == [[int(each) for each in mask] for _, mask in encoded[:fitting]]
    assert len(targets_in(columns, packing)) == result["shard"]["targets"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_token_but_a_first_one_is_a_target_once(artifacts, split):
    packing = metadata(artifacts)["packing"]
    for shard in shard_list(artifacts, split):
        columns = read(artifacts, shard["path"])
        documents = documents_in(columns)
        expected = [ids[1 if packing == "best_fit" or number == 0 else 0 :] for number, ids in enumerate(documents)]
        targets = targets_in(columns, packing)
        assert sorted(targets) == sorted(token_id for ids in expected for token_id in ids)
        assert len(targets) == shard["targets"]
        if packing == "concatenate":
            assert targets == [token_id for ids in expected for token_id in ids]


def test_the_manifest_counts_tokens_bytes_and_rows(artifacts):
    tokenizer = load_tokenizer(artifacts["tokenizer"])
    found = metadata(artifacts)
    lengths = []
    for split in SPLITS:
        texts, totals = [text for _, text in documents_of(artifacts, split)], found["splits"][split]
        lengths += [len(tokenizer.encode(text)) + 2 for text in texts]
        assert totals["documents"] == len(texts)
        assert totals["bytes"] == sum(len(text.encode()) for text in texts)
        assert totals["tokens"] == sum(lengths[-len(texts) :])
        for shard in totals["shards"]:
            full = [length == SEQ_LEN + 1 for length in read(artifacts, shard["path"])["length"]]
            assert shard["rows"] == len(full)
            assert shard["samples"] == (len(full) if found["packing"] == "best_fit" else sum(full))
            assert found["packing"] == "best_fit" or full == sorted(full, reverse=True)
    assert len(found["splits"]["train"]["shards"]) >= 3
    assert found["length_histogram"] == [
        sum(1 << k <= n < 2 << k for n in lengths) for k in range(max(lengths).bit_length())
    ]
    assert found["tokenizer"] == tokenizer_fingerprint(tokenizer)
    assert found["recipe"] == artifacts["shards"].store.uri.rpartition("/")[2]
    assert (found["seq_len"], found["vocab_size"], found["masked"]) == (SEQ_LEN, tokenizer.vocab_size, False)
    assert (found["bos_id"], found["pad_id"]) == (tokenizer.bos_id, tokenizer.pad_id)
    names = ("documents", "tokens", "bytes")
    assert [{name: source[name] for name in names} for source in found["sources"]] == [
        {name: sum(found["splits"][split][name] for split in SPLITS) for name in names}
    ]
    by_split = {split: found["splits"][split]["tokens"] for split in SPLITS}
    assert [(each["training_tokens"], each["validation_tokens"]) for each in found["sources"]] == [
        (by_split["train"], by_split["validation"])
    ]


def test_files_are_uncompressed_arrow_of_fixed_size_lists(artifacts):
    for shard in shard_list(artifacts, "train"):
        data = artifacts["shards"].files.read_bytes(shard["path"])
        reader = pa.ipc.open_file(pa.BufferReader(data))
        assert reader.num_record_batches == 1
        assert dict(zip(reader.schema.names, reader.schema.types, strict=True)) == {
            "tokens": pa.list_(pa.uint16(), SEQ_LEN + 1),
            "documents": pa.list_(pa.int32()),
            "numbers": pa.list_(pa.int32()),
            "length": pa.int32(),
        }
        assert np.array(read(artifacts, shard["path"])["tokens"], np.uint16).tobytes() in data


def test_the_order_of_the_tasks_does_not_show(corpus, artifacts, tmp_path):
    config = data_config(corpus, packing=metadata(artifacts)["packing"])
    with in_this_process(backwards=True):
        again = run_stages(data_graph(config), Store(tmp_path))
    assert checksums(again["shards"]) == checksums(artifacts["shards"])


def test_the_report_is_part_of_the_artifact(artifacts):
    report = artifacts["shards"].files.read_json("data_report.json")
    assert report["tokens"] == sum(metadata(artifacts)["splits"][split]["tokens"] for split in SPLITS)
    assert "data_report.png" in checksums(artifacts["shards"])


def test_the_smallest_type_that_holds_every_id():
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32


# -- budgets of tokens


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three: a large one of short texts, one of long texts, a small one."""
    folder = tmp_path_factory.mktemp("sources")
    generator = random.Random(1)
    for name, count, words in (("many", 600, 60), ("long", 60, 900), ("small", 12, 50)):
        texts = [
            {"text": f"{name} {number} " + " ".join(generator.choices(["one", "two", "三", "x = 4"], k=words))}
            for number in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return [str(folder / f"{name}.jsonl") for name in ("many", "long", "small")]


@pytest.mark.parametrize(
    ("max_tokens", "weights", "limits"),
    [
        (None, (1, 1, 1), (None, 9000, 10)),
        (20_000, (1, 1, 1), (None, None, None)),
        (20_000, (5, 1, 1), (4000, None, None)),
        (30_001, (1, 2, 9), (None, 3000, None)),
        (10**9, (1, 2, 3), (None, None, None)),
    ],
)
@patch("pipelines.shards.write_report", lambda context, metadata: None)  # a second for each
def test_budgets_take_the_longest_beginnings_that_fit(sources, store, max_tokens, weights, limits):
    given = zip(sources, weights if max_tokens else (1, 1, 1), limits, strict=True)
    configs = tuple(SourceConfig(uri=uri, weight=weight, max_tokens=limit) for uri, weight, limit in given)
    config = data_config(sources, sources=configs, max_tokens=max_tokens, packing="best_fit")
    artifacts = make(store, config)
    tokenizer = load_tokenizer(artifacts["tokenizer"])
    documents = documents_of(artifacts, "train")
    lengths = [[len(tokenizer.encode(text)) + 2 for source, text in documents if source == n] for n in range(3)]
    shares = divide(max_tokens, ShardConfig.of(config, SEQ_LEN).claims, [sum(each) for each in lengths])
    expected = []
    for share, each in zip(shares, lengths, strict=True):
        sums = np.cumsum(each).tolist()
        expected.append(max((total for total in sums if share is None or Fraction(total) <= share), default=0))
    found = [sum(shard["tokens"] for shard in shard_list(artifacts, "train") if shard["source"] == n) for n in range(3)]
    assert found == expected
    assert (found == [sum(each) for each in lengths]) == (max_tokens == 10**9)
    decoded = [
        (shard["source"], tokenizer.decode(ids, skip_special_tokens=True))
        for shard in shard_list(artifacts, "train")
        for ids in documents_in(read(artifacts, shard["path"]))
    ]
    taken = [sum(source == n for source, _ in decoded) for n in range(3)]
    assert decoded == [pair for n in range(3) for pair in [each for each in documents if each[0] == n][: taken[n]]]
    left_out = [sum(source == n for source, _ in documents) - taken[n] for n in range(3)]
    assert [source["over_tokens"] for source in metadata(artifacts)["sources"]] == left_out
    assert [source["training_tokens"] for source in metadata(artifacts)["sources"]] == found
    whole = len(documents_of(artifacts, "validation"))
    assert metadata(artifacts)["splits"]["validation"]["documents"] == whole
    # What was written beyond the budget is gone, from the manifest and from the folder.
    assert set(artifacts["shards"].files.list()) == set(checksums(artifacts["shards"]))
    written = checksums(artifacts["shards"])
    artifacts["shards"].delete()
    with patch("pipelines.mixture._PROBE", 1), patch("pipelines.mixture._GROWTH", 1):
        assert checksums(make(store, config, backwards=True)["shards"]) == written


@pytest.mark.parametrize(("limit", "words"), [(None, "of 5 shards"), (10**6, "of at most 5 shards")])
def test_progress_tells_a_bound_from_a_number(limit, words, monkeypatch):
    told = []
    context = SimpleNamespace(emit=lambda text, fraction: told.append((text, fraction)))

    def write(context, function, tasks, on_result, record):
        on_result(len(tasks))
        return {name: {"tokens": 10, "left_out": 0} for name in tasks}

    monkeypatch.setattr("pipelines.shards.map_parts", write)
    tasks = {
        split: [
            ShardTask(f"{split}/{n}", 0, "text", None, (), None, SEQ_LEN, "best_fit", False)  # type: ignore[arg-type]
            for n in range(count)
        ]
        for split, count in (("train", 3), ("validation", 2))
    }
    _run(ShardConfig(SEQ_LEN, 1 << 16, "best_fit", None, (Claim(1.0, limit),)), context, tasks, 4.0)
    assert told[-1] == (f"wrote 5 {words}", 1.0)


def test_a_budget_below_the_first_document_is_refused(corpus, store):
    with pytest.raises(DataError, match=r"^data\.max_tokens=5: not even the first document of a source"):
        make(store, data_config(corpus, max_tokens=5))


def test_weights_that_divide_bytes_do_not_change_the_stage(corpus):
    def of(weight, **changes):
        return ShardConfig.of(data_config(corpus, sources=(SourceConfig(uri="stdlib", weight=weight),), **changes), 8)

    assert of(1.0, max_bytes=10) == of(2.0, max_bytes=10)
    assert of(1.0, max_tokens=10) != of(2.0, max_tokens=10)


def test_a_stage_that_was_stopped_goes_on_from_the_shards_that_it_wrote(corpus, store, artifacts, tmp_path):
    config = data_config(corpus, packing=metadata(artifacts)["packing"])
    own = Store(tmp_path)
    with patch("pipelines.shards.write_report", side_effect=RuntimeError("killed")), pytest.raises(RuntimeError):
        make(own, config)
    with patch("pipelines.shards.encode_documents", side_effect=AssertionError("encoded again")):
        again = make(own, config)
    assert checksums(again["shards"]) == checksums(artifacts["shards"])


# -- conversations and preferences


def chats(count):
    generator = random.Random(2)
    for number in range(count):
        turns = [("system", "Be brief.")] if number % 3 else []
        for turn in range(generator.randint(1, 4)):
            turns += [("user", f"{number}.{turn}? <|eos|>"), ("assistant", f" {number} " * generator.randint(1, 30))]
        if number % 7 == 0:
            turns.append(("tool", "unknown to the template"))
        yield [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def talks(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats(80)))
    pairs = [{"prompt": f"{number}?", "chosen": f"yes {number}", "rejected": "no"} for number in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return (
        SourceConfig(uri=str(corpus)),
        SourceConfig(uri=str(folder / "pairs.jsonl"), format="preference"),
        SourceConfig(uri=str(folder / "chats.jsonl"), format="chat"),
    )


@pytest.mark.parametrize("packing", PACKINGS)
def test_conversations_are_learned_where_an_assistant_speaks(talks, store, packing):
    artifacts = make(store, data_config(talks, sources=talks, packing=packing))
    tokenizer = load_tokenizer(artifacts["tokenizer"])
    found = metadata(artifacts)
    assert found["masked"] is True
    chat_count = refused = 0
    for split in SPLITS:
        documents = documents_of(artifacts, split)
        expected = []
        for source, text in documents:
            if source == 0:
                expected.append(
                    (0, [ids := [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], [1] * len(ids)])
                )
            elif source == 2 and '"tool"' in text:
                refused += 1
            elif source == 2:
                ids, learned = tokenizer.encode_chat(json.loads(text))
                assert ids[-1] == tokenizer.eos_id  # the template's own; no second one follows
                expected.append((2, [ids, [int(each) for each in learned]]))
                chat_count += 1
        rebuilt = []
        for shard in shard_list(artifacts, split):
            columns = read(artifacts, shard["path"])
            pairs = zip(documents_in(columns), documents_in(columns, "loss_mask"), strict=True)
            rebuilt += [(shard["source"], list(pair)) for pair in pairs]
            assert len(targets_in(columns, packing)) == shard["targets"]
            padding = [row[length:] for row, length in zip(columns["loss_mask"], columns["length"], strict=True)]
            assert not any(any(row) for row in padding)
        assert rebuilt == expected
    assert chat_count and refused
    assert found["chat_refused"]["documents"] == refused
    assert [source["refused"] for source in found["sources"]] == [0, 0, refused]
    example = found["chat_refused"]["examples"][0]
    assert example["path"].endswith("chats.jsonl") and "messages.role=tool is unknown" in example["reason"]
    preferences = [source for split in SPLITS for source, _ in documents_of(artifacts, split) if source == 1]
    assert found["preferences"] == len(preferences) > 0
    assert found["sources"][1]["documents"] == found["sources"][1]["tokens"] == 0


def test_conversations_need_a_template_that_takes_them(talks, store, tmp_path):
    learned = train_tokenizer(["some text"], 262)
    templates = {
        None: r"chats\.jsonl holds conversations, and the tokenizer has no chat template; put chat_template\.jinja",
        "{{ nothing.at.all }}": r"^the chat template takes no conversation; .*chats\.jsonl, 0: the chat t.* refuses",
    }
    for number, (template, reason) in enumerate(templates.items()):
        path = tmp_path / str(number)
        Tokenizer(learned.backend, chat_template=template).save(path)
        with pytest.raises(DataError, match=reason):
            config = data_config(talks, sources=talks[1:])
            make(store, config, tokenizer=TokenizerConfig(path=str(path)))
