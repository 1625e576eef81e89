"""The recipe's data section: what it refuses, in one line that names the key."""

import pytest

from pipelines.recipe import Recipe, RecipeError

TEXT = """
name: test
data: {sources: [{uri: stdlib}, {uri: /corpus}]}
tokenizer: {vocab_size: 512}
model: {dim: 64, num_layers: 2, num_heads: 4, max_seq_len: 128}
train: {steps: 10, global_batch: 8, micro_batch: 2, seq_len: 64, optimizer: {lr: 1e-3}}
"""


def load(*overrides: str) -> Recipe:
    return Recipe.from_yaml(TEXT, overrides)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.sources=[]"], "data.sources is empty; name at least one source"),
        (["data.sources[0].weight=2"], r"data\.sources\[0\]\.weight=2\.0 .* both are absent; set one"),
        (["data.sources[0].weight=2", "data.sources[1].weight=2"], r"data\.sources\[0\]\.weight=2\.0 .* set one"),
        (
            ["data.sources[0]={uri: /p, format: preference, max_tokens: 5}"],
            r"data\.sources\[0\]\.max_tokens=5: preferences are not packed",
        ),
        (
            ["data.sources[0]={uri: /p, format: preference, weight: 2}", "data.max_tokens=9"],
            r"data\.sources\[0\]\.weight=2\.0: preferences are not packed .* or set data\.max_bytes",
        ),
        (["data.sources[0].weight=0"], r"data.sources\[0\].weight=0"),
        (["data.sources[0].max_tokens=0"], r"data.sources\[0\].max_tokens=0"),
        (["data.sources[0].format=word"], r"data.sources\[0\].format='word'"),
        (["data.sources[0].txt_column=a"], r"txt_column: unknown key; did you mean data.sources\[0\].text_column"),
        (["data.sources[0].uri=s3://key:secret@bucket"], "carries credentials"),
        (["data.clean.unicode=nfc"], "data.clean.unicode='nfc'"),
        (["data.clean.max_duplicate_line_ratio=30"], "data.clean.max_duplicate_line_ratio=30"),
        (["data.clean.max_top_ngram_char_ratios=[0.2]"], "data.clean.max_top_ngram_char_ratios"),
        (["data.clean.min_words=9", "data.clean.max_words=3"], "min_words=9 is above data.clean.max_words=3"),
        (["data.clean.language={allowed: []}"], "data.clean.language.allowed"),
        (["data.clean.language={allowed: [English]}"], r"data.clean.language.allowed\[0\]='English'"),
        (["data.clean.control_characters=3"], "data.clean.control_characters=3"),
        (["data.clean.min_words=yes"], "data.clean.min_words=True is no number"),
        (["data.dedup.near={threshold: 0}"], "data.dedup.near.threshold=0"),
        (["data.dedup.near.threshold=.nan"], "data.dedup.near.threshold=nan"),
        (["data.dedup.near.num_perm=4"], "data.dedup.near.num_perm=4"),
        (["data.decontaminate={}"], "data.decontaminate.sources: missing"),
        (["data.decontaminate={sources: []}"], "data.decontaminate.sources"),
        (["data.decontaminate={sources: [{uri: /e, weight: 2}]}"], "evaluation sets are read whole"),
        (["data.packing=tight"], "data.packing='tight'"),
        (["data.part_bytes=10"], "data.part_bytes=10"),
        (["data.max_document_bytes=10"], "data.max_document_bytes=10"),
    ],
)
def test_refusals(overrides, complaint):
    with pytest.raises(RecipeError, match=complaint) as refusal:
        load(*overrides)
    assert "\n" not in str(refusal.value)


def test_weights_divide_either_budget():
    for budget in ("data.max_bytes=1000000", "data.max_tokens=1000000"):
        assert load("data.sources[0].weight=2", budget).data.sources[0].weight == 2


def test_every_rule_is_off_until_it_is_given():
    data = load().data
    assert not any(value for value in data.clean.model_dump().values())
    assert data.dedup.exact and data.dedup.near is None and data.decontaminate is None
    assert data.packing == "concatenate" and not data.strict


def test_a_local_path_means_the_same_everywhere_and_a_uri_stays(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sources = load("data.sources=[{uri: corpus/*.txt}, {uri: 's3://b/c?scheme=http'}, {uri: stdlib}]").data.sources
    assert [source.uri for source in sources] == [f"{tmp_path}/corpus/*.txt", "s3://b/c?scheme=http", "stdlib"]
