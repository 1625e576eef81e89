import pytest

from cluster.serve import token_text
from cluster.storage import Store
from llama.tokenizer_training import train_tokenizer
from pipelines import baselines
from pipelines.graph import Graph
from pipelines.ingest import ingest_stage, list_parts, read_parts
from pipelines.recipe import TokenizerConfig
from pipelines.sources import DataError
from pipelines.vocabulary import load_tokenizer, tokenizer_fingerprint, tokenizer_stage
from tests.pipelines.data_stages import data_config, in_this_process, run_stages, write_corpus

TEXTS = ["the cat sat on the mat\n" * 20, "naïve 模型 🙂\t\r\n\0 <|bos|> the the\n" * 20]


def test_equal_tokenizers_have_equal_fingerprints():
    fingerprint = tokenizer_fingerprint(train_tokenizer(TEXTS, 300))
    assert tokenizer_fingerprint(train_tokenizer(list(TEXTS), 300)) == fingerprint
    assert tokenizer_fingerprint(train_tokenizer(TEXTS[:1], 300)) != fingerprint


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_corpus(folder / "corpus", documents=60)
    config, store = data_config(folder / "corpus"), Store(folder / "store")

    def stages(tokenizer):
        with in_this_process():
            return run_stages(Graph([ingest_stage(config), tokenizer_stage(tokenizer)]), store)

    return stages


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_the_stage_learns_from_the_training_split_alone(prepared, kind):
    artifacts = prepared(TokenizerConfig(vocab_size=280, kind=kind))
    parts = [part.path for part in list_parts(artifacts["ingest"], "train")]
    texts = [text for _, text in read_parts(artifacts["ingest"], parts)]
    expected = train_tokenizer(texts, 280, kind)
    found = load_tokenizer(artifacts["tokenizer"])
    assert found.backend.to_str() == expected.backend.to_str()
    assert artifacts["tokenizer"].manifest().metadata == {
        "vocab_size": 280,
        "fingerprint": tokenizer_fingerprint(expected),
        "trained_on_bytes": sum(len(text.encode()) for text in texts),
    }
    assert found.apply_chat_template([{"role": "user", "content": "the"}])[0] == found.bos_id


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_the_bytes_of_a_token_are_known_whatever_the_kind(kind):
    tokenizer = train_tokenizer(TEXTS, 280 if kind != "unigram" else 262, kind)
    text = "".join(TEXTS) + "##the ▁ 🚀 \xa0"
    pieces = baselines.token_bytes(tokenizer)
    ids = tokenizer.encode(text)
    assert b"".join(pieces[token_id] for token_id in ids) == text.encode()
    assert b"".join(token_text.token_bytes(tokenizer, token_id) for token_id in ids) == text.encode()


def test_a_large_corpus_is_sampled(prepared):
    full = prepared(TokenizerConfig(vocab_size=300))["tokenizer"].manifest().metadata["trained_on_bytes"]
    half = prepared(TokenizerConfig(vocab_size=300, sample_bytes=full // 2))["tokenizer"].manifest().metadata
    assert 0.25 * full < half["trained_on_bytes"] < 0.75 * full


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused(prepared):
    with pytest.raises(
        DataError, match=r"tokenizer\.vocab_size=60000, but .* yields only \d+ tokens; add text, or set"
    ):
        prepared(TokenizerConfig(vocab_size=60_000))
