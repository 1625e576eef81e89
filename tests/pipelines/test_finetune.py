"""Fine-tuning without a cluster: what a recipe starts from, and conversations → shards → adapters → export."""

import json
import os
import pickle
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from cluster.artifact import Artifact
from cluster.storage import Store
from llama.config import ModelConfig
from llama.hf import load_pretrained, save_pretrained
from llama.lora import LoraConfig
from llama.losses import IGNORE_INDEX
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from llama.tokenizer_training import train_tokenizer
from llama.training.checkpoint import Checkpointer
from llama.training.config import TrainConfig
from llama.training.mesh import process_group
from llama.training.trainer import Trainer
from pipelines.drive import drive
from pipelines.export import write_export
from pipelines.finetune import StartError, Trained, find_start, fitting_start
from pipelines.loader import ShardLoader
from pipelines.pretrain import pretrain_stage
from pipelines.recipe import Recipe, RecipeError, TrainRecipe
from pipelines.runs import Run, StageStatus
from pipelines.stages import build_graph
from tests.llama.hf_cases import error
from tests.llama.training.helpers import Samples
from tests.pipelines.data_stages import in_this_process

REPOSITORY = Path(__file__).parents[2]
SFT = REPOSITORY / "pipelines" / "recipes" / "sft.yaml"
CONVERSATIONS = REPOSITORY / "pipelines" / "recipes" / "conversations.jsonl"
MODEL = ModelConfig(vocab_size=320, dim=32, num_layers=2, num_heads=4, head_dim=8, max_seq_len=512, rope_theta=999.0)
TEXT = f"""
name: test
data: {{sources: [{{uri: {CONVERSATIONS}, format: chat}}], packing: best_fit}}
train: {{steps: 3, global_batch: 4, micro_batch: 2, seq_len: 400, start_from: ""}}
serve: {{engine: {{num_blocks: 64}}}}
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CONVERSATIONS.read_text()], 320, "bpe")


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    """A model in a Hugging Face directory, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = Transformer(MODEL)
    model.init_weights(seed=7)
    save_pretrained(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    """A store with the finished run `base`, as the stages leave it; its training wrote checkpoints at 1 and 2."""
    store = Store(tmp_path_factory.mktemp("store"))
    run = Run.create(store, "name: base\n", "base")
    run.status.stages = {name: StageStatus(key=f"{name}-key") for name in ("tokenizer", "pretrain")}
    run.save()
    made = Artifact(store.child("artifacts", "tokenizer", "tokenizer-key")).begin()
    tokenizer.save(made.store.local_path())
    made.commit({})
    pretrain = Artifact(store.child("artifacts", "pretrain", "pretrain-key"))
    config = TrainConfig(steps=2, global_batch=2, micro_batch=2, seq_len=16, checkpoint_every=1)
    train(pretrain.store.child("checkpoints"), MODEL, config, Samples(config, 320))
    attempt = pretrain.begin()
    attempt.store.write_json("summary.json", {})
    attempt.commit({"checkpoint": "checkpoints/step-00000002"})
    return store


def train(folder, model, config, loader, start=None):
    with process_group():
        Trainer(model, config, loader, Checkpointer(folder, Artifact), start=start).fit()


def recipe(start, *overrides, store=None, text=TEXT):
    return Recipe.from_yaml(text, [f"train.start_from={start}", *overrides], store)


def test_a_directory_says_what_model_and_tokenizer_are(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    found = recipe("./model")
    assert found.train.start_from == found.tokenizer.path == str(directory)
    assert found.model == load_pretrained(directory).config
    assert (found.tokenizer.vocab_size, found.model.rope_theta) == (320, 999.0)
    changed = recipe("./model", "model.residual_dropout=0.1", f"tokenizer.path={directory}")
    assert (changed.model.residual_dropout, changed.model.rope_theta, changed.tokenizer.vocab_size) == (0.1, 999.0, 320)
    shutil.move(directory, directory.with_name("away"))
    try:
        assert Recipe.from_yaml(found.to_yaml()) == found  # which is read without the directory
        with pytest.raises(StartError, match="neither a committed checkpoint nor a Hugging Face directory"):
            fitting_start(found.train.start_from, found.model)
    finally:
        shutil.move(directory.with_name("away"), directory)


def test_a_run_is_its_last_checkpoint_with_its_own_tokenizer(store):
    text = SFT.read_text().replace("pipelines/recipes/conversations.jsonl", str(CONVERSATIONS))
    found = recipe("base", "train.seq_len=512", store=store, text=text)
    place = store.child("artifacts", "pretrain", "pretrain-key", "checkpoints", "step-00000002")
    assert (found.train.start_from, found.model) == (place.uri, MODEL)
    assert Tokenizer.load(found.tokenizer.path.removeprefix("file://")).vocab_size == 320
    assert Recipe.from_yaml(found.to_yaml()) == found
    with pytest.raises(RecipeError, match="train.start_from=base names a run, and there is no store to look for it in"):
        recipe("base")
    with pytest.raises(RecipeError, match="there is no run 'bas' in .*did you mean base"):
        recipe("bas", store=store)
    run = Run.create(store, "name: x\n", "unfinished")
    with pytest.raises(RecipeError, match=r"has not finished; go on with it \(caravan resume unfinished\)"):
        recipe("unfinished", store=store)
    run.delete()


def key(start, lora=None):
    overrides = [f"train.lora={json.dumps(lora)}"] if lora else []
    found = recipe(start, *overrides)
    return pretrain_stage(found.model, found.train, fitting_start(found.train.start_from, found.model)).config["train"]


def test_the_key_is_of_the_weights_not_of_their_name(directory, store, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    base = key(directory)
    assert base == key(f"file://{directory}") == key(tmp_path / "link")
    assert base != key(directory, {"rank": 2})
    copy = shutil.copytree(directory, tmp_path / "copy", copy_function=shutil.copy2)
    assert key(copy) == base
    os.utime(copy / "model.safetensors", ns=(0, 0))
    assert key(copy)["start_from"] != base["start_from"]
    folder = store.child("artifacts", "pretrain", "pretrain-key", "checkpoints")
    first, last = (find_start(folder.child(f"step-0000000{step}").uri).fingerprint for step in (1, 2))
    assert first != last
    moved = shutil.copytree(folder.local_path() / "step-00000002", tmp_path / "moved")
    assert find_start(str(moved)).fingerprint == last


def test_what_does_not_fit_is_named(directory, store, tmp_path):
    for overrides, said in [
        (["model.dim=48"], r"model.dim=48 is not the 32 of train.start_from=/.*; leave the section model out"),
        (["model.moe={num_experts: 2}"], "model.moe=there is not the absent of"),
        (["model.tie_embeddings=false"], "model.tie_embeddings=False is not the True"),
    ]:
        found = recipe(directory, *overrides)
        with pytest.raises(StartError, match=said):
            build_graph(found, "", keep=False)
    learned = train_tokenizer([CONVERSATIONS.read_text()], 400, "bpe")
    learned.save(tmp_path / "other")
    checkpoint = store.child("artifacts", "pretrain", "pretrain-key", "checkpoints", "step-00000002").uri
    for start, overrides, said in [
        (directory, ["tokenizer={vocab_size: 320}"], "tokenizer.path is missing: the weights of train.start_from=/"),
        (directory, [f"tokenizer={{path: {tmp_path / 'other'}}}"], "has 400 tokens, more than the 320 of train.start"),
        (directory, [f"tokenizer={{path: {directory}, vocab_size: 512}}"], "tokenizer.vocab_size=512 is not the 320"),
        (directory, ["model.preset=tiny"], "model.preset=tiny and train.start_from=.* both give the model; leave one"),
        (tmp_path / "nothing", [], "nothing is neither a committed checkpoint nor a Hugging Face directory"),
        (checkpoint, [], "tokenizer: missing, and train.start_from=.* brings none; set tokenizer.path"),
        (directory, ["tokenizer={path: 5}"], "tokenizer.path=5: input should be a valid string"),
        (directory, ["tokenizer={path: s3://k:secret@b/x}"], r"tokenizer.path='s3://\*\*\*@b/x': carries credentials"),
        ("s3://k:secret@b/x", [], "^train.start_from: carries credentials"),
        ("a b", [], "^train.start_from: run id 'a b' is malformed"),
        (directory, ["train.lora={targets: [wq, gate]}"], "train.lora.targets"),
        (directory, ["model.activation=relu", "train.lora={targets: [w3]}"], "train.lora.targets has w3, and this"),
    ]:
        with pytest.raises(RecipeError, match=said) as raised:
            recipe(start, *overrides, store=store)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="train.lora adapts a model that is trained already; name it in train.start_f"):
        TrainRecipe(lora=LoraConfig())


def test_every_stage_can_be_sent_to_a_worker(directory):
    """With the adopted tokenizer's chat template, of which the compiled form stays here."""
    graph = build_graph(recipe(directory), "", keep=False)
    sent = [pickle.loads(pickle.dumps(stage)) for stage in graph.stages.values()]
    assert {stage.name: stage.config for stage in sent} == {name: each.config for name, each in graph.stages.items()}


def test_conversations_become_adapters_become_a_directory(directory, tmp_path):
    """The stages' own work, without Ray Train around it."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    found = recipe(directory, "train.lora={rank: 2, targets: [wq, wv, w2]}", "train.optimizer.lr=0.01")
    store = Store(tmp_path / "store")
    graph = build_graph(found, "", keep=False)
    with in_this_process():
        results = drive(graph, store, Run.create(store, found.to_yaml()), until="shards")
    shards, tokenizer = (results[name].artifact for name in ("shards", "tokenizer"))
    start = fitting_start(found.train.start_from, found.model)

    attempt = graph.artifact(store, "pretrain").begin()
    folder = attempt.artifact.store.child("checkpoints")
    config = TrainConfig(**{field.name: getattr(found.train, field.name) for field in fields(TrainConfig)})
    with ShardLoader(shards, seq_len=400, global_batch=4, micro_batch=2) as loader:
        own, said = Tokenizer.load(directory), []
        for batch, _ in zip(loader, range(12), strict=False):
            said += [own.decode(row[row != IGNORE_INDEX].tolist(), skip_special_tokens=False) for row in batch.labels]
    with ShardLoader(shards, seq_len=400, global_batch=4, micro_batch=2) as loader:
        train(folder, found.model, config, loader, start.load)
    answers = {
        message["content"]
        for line in CONVERSATIONS.read_text().splitlines()
        for message in json.loads(line)["messages"]
        if message["role"] == "assistant"
    }
    assert {text for row in said for text in row.split("<|eos|>") if text} <= answers
    metadata = {"checkpoint": "checkpoints/step-00000003", "start_from": found.train.start_from}
    metadata["start_fingerprint"] = start.fingerprint
    attempt.commit(metadata | {"lora": yaml.safe_load(found.to_yaml())["train"]["lora"]}, [])

    trained = Trained.of(found.model, attempt.artifact)
    out = Store(tmp_path / "out")
    entries = write_export(trained, tokenizer, "float32", out)
    names = {entry.path for entry in entries}
    assert {"config.json", "tokenizer.json", "adapter/adapter_config.json"} <= names
    base, merged = (
        transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (directory, tmp_path / "out")
    )
    data = torch.arange(40).view(2, 20)
    with torch.no_grad():
        ours, before = trained.load()(data), base(data).logits
        assert error(merged(data).logits, ours) <= 1e-5
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        assert error(adapted(data).logits, ours) <= 1e-5
        assert error(before, ours) > 1e-3

    weights = directory / "model.safetensors"
    modified = weights.stat().st_mtime_ns
    os.utime(weights, ns=(0, 0))
    try:
        with pytest.raises(StartError, match=r"train.start_from=/.* has changed since the training began; put its"):
            Trained.of(found.model, attempt.artifact)
    finally:
        os.utime(weights, ns=(modified, modified))


@pytest.mark.integration
def test_a_directory_on_an_object_store_is_copied_once(directory, swift, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.session.node_folder", lambda name: tmp_path)
    uri = swift.uri(swift.make_bucket(), "model")
    for path in directory.iterdir():
        Store(uri).upload(path, path.name)
    found = recipe(uri)
    assert (found.tokenizer.path, found.model) == (uri, load_pretrained(directory).config)
    start = fitting_start(uri, found.model)
    (tmp_path / f"{start.fingerprint}.partial").mkdir()  # of a process that was killed
    expected = load_pretrained(directory).state_dict()
    for deleted in (False, True):
        model = Transformer(found.model)
        start.load(model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        if not deleted:
            Store(uri).delete("model.safetensors")
    shutil.rmtree(tmp_path / start.fingerprint)
    Store(uri).write_bytes("model.safetensors", b"those of another")
    with pytest.raises(StartError, match="has changed since the training began"):
        start.load(Transformer(found.model))
    assert not (tmp_path / start.fingerprint).exists()
