import pytest

from cluster.storage import Store
from llama.tokenizer import SPECIAL_TOKENS
from pipelines.graph import Graph
from pipelines.ingest import ingest_stage, list_parts, read_parts
from pipelines.recipe import TokenizerConfig
from pipelines.sources import DataError
from pipelines.vocabulary import load_tokenizer, tokenizer_fingerprint, tokenizer_stage, train_tokenizer
from tests.pipelines.data_stages import data_config, in_this_process, run_stages, write_corpus

TEXTS = ["the cat sat on the mat\n" * 20, "naïve 模型 🙂\t\r\n\0 <|bos|> the the\n" * 20]


@pytest.mark.parametrize(
    "text", ["", "the cat", " \n\t ", "模型🙂", "\ud7ff\x00\x7f", "<|assistant|> hi <|eos|>", "ÿþ"]
)
def test_any_text_round_trips(text):
    tokenizer = train_tokenizer(TEXTS, 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert not set(ids) & {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}


def test_special_tokens_come_first_and_bytes_next():
    tokenizer = train_tokenizer(TEXTS, 290)
    assert tokenizer.vocab_size == 290
    assert [tokenizer.backend.id_to_token(number) for number in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert all(
        len(tokenizer.backend.id_to_token(n)) == 1 for n in range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 256)
    )
    assert len(tokenizer.encode("the")) == 1  # the commonest word has been merged


def test_training_is_deterministic_and_depends_on_the_texts():
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


def test_the_stage_learns_from_the_training_split_alone(prepared):
    artifacts = prepared(TokenizerConfig(vocab_size=300))
    parts = [part.path for part in list_parts(artifacts["ingest"], "train")]
    texts = [text for _, text in read_parts(artifacts["ingest"], parts)]
    expected = train_tokenizer(texts, 300)
    found = load_tokenizer(artifacts["tokenizer"])
    assert found.backend.to_str() == expected.backend.to_str()
    assert artifacts["tokenizer"].manifest().metadata == {
        "vocab_size": 300,
        "fingerprint": tokenizer_fingerprint(expected),
        "trained_on_bytes": sum(len(text.encode()) for text in texts),
    }
    assert found.apply_chat_template([{"role": "user", "content": "the"}])[0] == found.bos_id


def test_a_large_corpus_is_sampled(prepared):
    full = prepared(TokenizerConfig(vocab_size=300))["tokenizer"].manifest().metadata["trained_on_bytes"]
    half = prepared(TokenizerConfig(vocab_size=300, sample_bytes=full // 2))["tokenizer"].manifest().metadata
    assert 0.25 * full < half["trained_on_bytes"] < 0.75 * full


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused(prepared):
    with pytest.raises(
        DataError, match=r"tokenizer\.vocab_size=60000, but .* yields only \d+ tokens; add text, or set"
    ):
        prepared(TokenizerConfig(vocab_size=60_000))
