import json

import pytest
import tokenizers

from llama.tokenizer_training import train_tokenizer
from pipelines.adopted_tokenizer import adopt_for_text, adopt_tokenizer, what_is_lost
from pipelines.recipe import Recipe, RecipeError, TokenizerConfig
from pipelines.sources import DataError
from pipelines.stages import build_graph


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(["the cat sat on the mat"], 270).save(tmp_path / "model")
    return tmp_path / "model"


def test_a_lone_file_needs_the_name_of_its_end_token(folder, tmp_path):
    alone = tmp_path / "alone.json"
    (folder / "tokenizer.json").rename(alone)
    with pytest.raises(DataError, match=r"alone\.json: it names no end-of-text token; set tokenizer\.eos_token"):
        adopt_tokenizer(str(alone))
    found = adopt_tokenizer(str(alone), "<|eos|>").tokenizer
    assert (found.eos_token, found.bos_token, found.chat_template) == ("<|eos|>", "<|eos|>", None)
    assert found.decode(found.encode("the cat")) == "the cat"
    with pytest.raises(DataError, match=r"the tokenizer has no token '</s>'"):
        adopt_tokenizer(str(alone), "</s>")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", None, r"there is no tokenizer\.json; give that file, or a folder that has it"),
        ("tokenizer.json", "{", "tokenizer.path=.*model: "),
        ("tokenizer_config.json", "[]", r"model: tokenizer_config\.json is not a JSON object$"),
        ("tokenizer_config.json", "{", r"model: tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", '{"eos_token": null}', "names no end-of-text token; set tokenizer.eos_token"),
        ("generation_config.json", '{"eos_token_id": 999}', "eos_token_id=999"),
    ],
)
def test_what_is_wrong_with_it_is_said(folder, name, content, reason):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=reason) as error:
        adopt_tokenizer(str(folder))
    assert "\n" not in str(error.value)


def test_an_end_token_is_named_once(folder):
    assert adopt_tokenizer(str(folder), "<|eos|>").tokenizer.eos_token == "<|eos|>"
    with pytest.raises(
        DataError, match=r"names the end-of-text token '<\|eos\|>', and tokenizer.eos_token='<\|pad\|>'"
    ):
        adopt_tokenizer(str(folder), "<|pad|>")


def test_for_text_alone_no_end_need_be_named(folder, tmp_path):
    text = "the cat <|eos|> sat"
    whole = adopt_tokenizer(str(folder)).tokenizer
    alone = tmp_path / "alone.json"
    (folder / "tokenizer.json").rename(alone)
    found = adopt_for_text(str(alone), "--tokenizer")
    assert found.encode_batch([text]) == whole.encode_batch([text])
    assert (found.vocab_size, found.decode(found.encode(text))) == (whole.vocab_size, text)
    settings = json.loads(alone.read_text())
    settings["added_tokens"] = []
    alone.write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"^--tokenizer=.*alone\.json: it has no special token; name any token as eos"):
        adopt_for_text(str(alone), "--tokenizer")
    with pytest.raises(DataError, match=r"^--tokenizer=/no/such: there is no tokenizer\.json"):
        adopt_for_text("/no/such", "--tokenizer")


def test_what_does_not_come_back_is_named(folder, tmp_path):
    assert what_is_lost(adopt_tokenizer(str(folder)).tokenizer) == []
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.save(str(folder / "tokenizer.json"))
    assert what_is_lost(adopt_tokenizer(str(folder)).tokenizer) == ["mixed case"]
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "[SEP]": 1, "x": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.save(str(tmp_path / "words.json"))
    lost = what_is_lost(adopt_tokenizer(str(tmp_path / "words.json"), "[SEP]").tokenizer)
    assert lost == ["mixed case", "accents", "Chinese", "emoji", "indentation"]


def test_conversations_need_a_template_before_anything_runs(folder, tmp_path):
    values = recipe(path=str(folder)).model_dump(mode="json")
    values["data"]["sources"].append({"uri": str(tmp_path / "talks.jsonl"), "format": "chat"})
    message = {"role": "assistant", "content": "hello, here I am to help you with anything"}
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": [message]}))
    chatting = Recipe.model_validate(values)
    build_graph(chatting, dashboard_url="", keep=False)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(
        DataError, match=r"^data\.sources\[1\]\.uri='.*talks\.jsonl' holds conversations, and tokenizer"
    ):
        build_graph(chatting, dashboard_url="", keep=False)
    build_graph(recipe(path=str(folder)), dashboard_url="", keep=False)


def test_an_unreachable_place_is_said():
    with pytest.raises(DataError, match=r"^tokenizer\.path=ftp://host/model: .*unknown scheme 'ftp'"):
        adopt_tokenizer("ftp://host/model")


def recipe(**tokenizer):
    values = {
        "name": "test",
        "data": {"sources": [{"uri": "stdlib"}]},
        "tokenizer": tokenizer,
        "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "seq_len": 64},
    }
    return Recipe.from_yaml(json.dumps(values))


def test_the_recipe_follows_the_tokenizer(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    found = recipe(path="model")
    assert found.model.vocab_size == found.tokenizer.vocab_size == 270
    assert found.tokenizer.path == str(folder)
    assert recipe(path="model", vocab_size=300).model.vocab_size == 300
    stored = found.to_yaml()
    (folder / "tokenizer.json").unlink()
    assert Recipe.from_yaml(stored) == found  # which is read without the tokenizer
    learned = recipe()
    assert (learned.tokenizer.kind, learned.tokenizer.sample_bytes, learned.model.vocab_size) == (
        "bpe",
        100_000_000,
        4096,
    )
    assert Recipe.from_yaml(learned.to_yaml()) == learned


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        ({"kind": "bpe"}, r"^tokenizer\.kind='bpe' is for a tokenizer to be learned, and tokenizer\.path names one"),
        ({"sample_bytes": 5}, r"^tokenizer\.sample_bytes=5 is for a tokenizer to be learned"),
        ({"path": None, "eos_token": "</s>"}, r"^tokenizer\.eos_token is for a tokenizer of tokenizer\.path"),
        ({"path": ""}, r"^tokenizer\.path=''"),
        ({"path": 5}, r"^tokenizer\.path=5"),
        ({"path": "s3://key:secret@bucket/model"}, r"^tokenizer\.path='s3://\*\*\*@bucket/model': carries credentials"),
        ({"path": "nowhere"}, r"^tokenizer\.path=.*nowhere: there is no tokenizer\.json"),
        ({"vocab_size": "many"}, r"^tokenizer\.vocab_size='many'"),
    ],
)
def test_settings_that_do_not_go_together(folder, tokenizer, reason):
    with pytest.raises(RecipeError, match=reason):
        recipe(**{"path": str(folder)} | tokenizer)


def test_a_small_tokenizer_gets_the_smallest_vocabulary(tmp_path):
    words = {"type": "WordLevel", "vocab": {"[UNK]": 0, "</s>": 1, "cat": 2}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}))
    assert TokenizerConfig(path=str(tmp_path), eos_token="</s>").vocab_size == 262
