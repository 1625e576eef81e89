import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.recipe import Recipe, RecipeError

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
TEXT = """
name: test
data: {sources: [{uri: stdlib}, {uri: /corpus}], max_bytes: 1000000}
tokenizer: {vocab_size: 512}
model: {dim: 64, num_layers: 2, num_heads: 4, max_seq_len: 128, moe: {num_experts: 4}}
train: {steps: 10, global_batch: 8, micro_batch: 2, seq_len: 64, workers: 2, parallel: {ep: 2}, optimizer: {lr: 1e-3}}
"""


OTHERS = ("start_from", "pairs:")  # test_finetune, test_seq2seq
WHOLE = sorted(path for path in RECIPES.glob("*.yaml") if not any(word in path.read_text() for word in OTHERS))


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_round_trip(path):
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_the_two_quickstarts_share_data_and_tokenizer():
    sparse, dense = Recipe.load(RECIPES / "quickstart.yaml"), Recipe.load(RECIPES / "quickstart-dense.yaml")
    assert (sparse.data, sparse.tokenizer, sparse.train.seq_len) == (dense.data, dense.tokenizer, dense.train.seq_len)
    assert sparse.model.moe is not None and dense.model.moe is None


def test_values_and_defaults():
    recipe = Recipe.from_yaml(TEXT)
    assert recipe.model.vocab_size == recipe.tokenizer.vocab_size == 512
    assert recipe.train.optimizer.lr == 1e-3 and recipe.train.workers == 2
    assert recipe.train.steps == 10 and recipe.train.log_every == 10
    assert yaml.safe_load(recipe.to_yaml())["model"]["hidden_dim"] == recipe.model.hidden_dim
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("train.steps=3", lambda r: r.train.steps, 3),
        ("train.optimizer.lr=2e-4", lambda r: r.train.optimizer.lr, 2e-4),
        ("data.sources[1].uri=s3://bucket/x?scheme=http", lambda r: r.data.sources[1].uri, "s3://bucket/x?scheme=http"),
        ("data.sources.0.weight=2", lambda r: r.data.sources[0].weight, 2.0),
        ("data.sources=[{uri: /a}]", lambda r: [s.uri for s in r.data.sources], ["/a"]),
        ("evaluate.prompts=['a=b', c]", lambda r: r.evaluate.prompts, ("a=b", "c")),
        ("serve.engine.num_blocks=99", lambda r: r.serve.engine.num_blocks, 99),
        ("train.workers=[2, 4]", lambda r: r.train.workers, (2, 4)),
        ("train.accelerator_type=null", lambda r: r.train.accelerator_type, None),
        ("tokenizer.vocab_size=1000", lambda r: r.model.vocab_size, 1000),
    ],
)
def test_overrides(override, read, expected):
    assert read(Recipe.from_yaml(TEXT, [override])) == expected


def test_a_preset_is_a_start_that_other_keys_change():
    values = yaml.safe_load(TEXT)
    values["model"] = {"preset": "qwen3-30b-a3b", "num_layers": 2, "moe": {"top_k": 3}}
    model = Recipe.from_yaml(yaml.safe_dump(values), ["model.max_seq_len=4096"]).model
    assert (model.dim, model.qk_norm, model.num_layers, model.max_seq_len) == (2048, "head", 2, 4096)
    assert model.moe is not None and (model.moe.num_experts, model.moe.top_k) == (128, 3)
    assert model.vocab_size == 512
    assert model.head_dim == 128 and model.num_heads == 32


def test_a_preset_on_the_command_line_replaces_the_recipes_model():
    overrides = ["model.num_layers=2", "model.preset=tiny", "train.parallel.ep=1", "model.dim=384"]
    model = Recipe.from_yaml(TEXT, overrides).model
    assert (model.num_layers, model.dim, model.num_heads, model.head_dim, model.moe) == (2, 384, 6, 64, None)


def test_sizes_that_a_preset_leaves_open_follow_the_changes():
    values = yaml.safe_load(TEXT)
    values["model"] = {"preset": "llama-3.2-1b", "dim": 1024, "position": "alibi"}
    values["train"]["parallel"] = {"ep": 1}
    values["serve"] = {"engine": {"num_blocks": 9000}}
    model = Recipe.from_yaml(yaml.safe_dump(values)).model
    assert (model.head_dim, model.rope_scaling, model.rope_theta) == (32, None, 10000.0)


def test_later_overrides_win():
    assert Recipe.from_yaml(TEXT, ["train.steps=3", "train.steps=4"]).train.steps == 4


ERRORS = [
    ("train.stepz=1", "train.stepz: unknown key; did you mean train.steps?"),
    ("train.optimizer.lrr=1", "train.optimizer.lrr: unknown key; did you mean train.optimizer.lr?"),
    ("model.moe.num_expert=3", "model.moe.num_expert: unknown key; did you mean model.moe.num_experts?"),
    ("serve.engine.num_block=3", "serve.engine.num_block: unknown key; did you mean serve.engine.num_blocks?"),
    ("data.sources[0].url=x", "data.sources[0].url: unknown key; did you mean data.sources[0].uri?"),
    ("steps=3", "steps: unknown key; did you mean train.steps?"),
    ("qqqq=1", "qqqq: unknown key; remove it"),
    ("train.steps=abc", "train.steps='abc': input should be a valid integer"),
    ("train.precision=fp8", "train.precision='fp8': input should be 'fp32' or 'bf16'"),
    ("train.optimizer.lr=-1", "train.optimizer.lr=-1.0 must be positive"),
    ("train.optimizer.lr=.inf", "train.optimizer.lr=inf is not a finite number"),
    ("tokenizer.vocab_size=100", "tokenizer.vocab_size=100: input should be greater than or equal to 262"),
    ("model.vocab_size=77", "model.vocab_size=77 is not tokenizer.vocab_size=512; leave model.vocab_size out"),
    ("model.num_heads=5", "model.dim=64 is not divisible by model.num_heads=5; choose a divisor"),
    ("train.seq_len=1000", "train.seq_len=1000 is above model.max_seq_len=128; lower it"),
    ("train.global_batch=6", "train.global_batch=6 is not divisible by train.micro_batch=2 times 2 workers; choose"),
    ("train.parallel.ep=3", "train.parallel.ep=3 does not divide dp_shard=2 (2 workers"),
    ("model.moe.num_experts=3", "train.parallel.ep=2 does not divide model.moe.num_experts=3; choose a divisor"),
    ("model.moe=null", "train.parallel.ep=2 splits experts, but the model is dense; set train.parallel.ep=1"),
    ("model.activation=swish_learned", "train.parallel.ep=2 splits experts, but model.activation=swish_learned"),
    (
        "model.rope_scaling={kind: dynamic_ntk, factor: 2, original_max_seq_len: 64}",
        "model.rope_scaling.kind=dynamic_ntk turns every key anew",
    ),
    ("model.sliding_window=true", "model.sliding_window=True is no number; give one"),
    ("model.moe.capacity_factor=yes", "model.moe.capacity_factor=True is no number; give one"),
    ("train.steps=true", "train.steps=True is no number; give one"),
    ("tokenizer.vocab_size=yes", "tokenizer.vocab_size=True is no number; give one"),
    ("model.moe.dense_layers=[true]", "model.moe.dense_layers[0]=True is no number; give one"),
    ("model.moe.top_k=1", "model.moe.normalize_top_k=True with model.moe.top_k=1 makes every weight 1"),
    ("model.num_experts=3", "model.num_experts: unknown key; did you mean model.moe.num_experts?"),
    ("model.dropout=0.1", "model.dropout: unknown key; did you mean model.attention_dropout?"),
    ("model.preset=llama-9", "model.preset='llama-9' is not one of tiny, tiny-moe"),
    ("model.preset=3", "model.preset=3 is no name; choose one of tiny"),
    ("model.prest=tiny", "model.prest: unknown key; did you mean model.preset?"),
    ("train.workers=0", "train.workers=0 must be at least 1"),
    ("train.workers=many", "train.workers='many' is no number of workers, such as 4, and no [min, max]"),
    ("train.workers=[1, 2, 4]", "train.workers=[1, 2, 4] is no number of workers, such as 4, and no [min, max]"),
    ("train.workers=[2, yes]", "train.workers[1]=True is no number; give one"),
    ("train.workers=[4, 2]", "train.workers=[4, 2] is [min, max] with min above max; write [2, 4]"),
    ("train.workers=[0, 2]", "train.workers=[0, 2] must be at least 1"),
    (
        "train={steps: 1, global_batch: 8, micro_batch: 2, seq_len: 64, workers: [2, 4], parallel: {dp_shard: 2}}",
        "train.parallel.dp_shard=2 allows one number of workers, and train.workers=[2, 4] several; set",
    ),
    ("train.workers=[5, 7]", "train.workers=[5, 7]: no number between them is a multiple of"),
    ("train.hang_seconds=-1", "train.hang_seconds=-1.0 must not be negative; 0 turns the watchdog off"),
    ("train.max_failures=-1", "train.max_failures=-1 must not be negative"),
    ("train.shuffle_shards=0", "train.shuffle_shards=0 must be at least 1; leave it out to mix all shards"),
    ("train.cache_bytes=0", "train.cache_bytes=0 must be at least 1; leave it out to copy all shards"),
    ("train.cpus_per_worker=0", "train.cpus_per_worker=0.0 must be positive"),
    ("train.accelerator_type=H200", "train.accelerator_type='H200' names a GPU, but train.gpus_per_worker=0; set it"),
    ("serve.accelerator_type=H200", "serve.accelerator_type='H200' names a GPU, but serve.gpus_per_replica=0; set it"),
    ("serve.port=99999", "serve.port=99999: input should be less than or equal to 65535"),
    ("serve.engine.num_blocks=0", "serve.engine.num_blocks=0 is not a positive integer"),
    ("serve.engine.num_blocks=1", "serve.engine.num_blocks=1 of serve.engine.block_size=16 tokens hold less than one"),
    ("data.sources=[]", "data.sources is empty; name at least one"),
    ("data.max_bytes=0", "data.max_bytes=0: input should be greater than or equal to 1"),
    ("data={sources: [{uri: a, weight: 2}, {uri: b}]}", "data.sources[0].weight=2.0 is its share of data.max_bytes"),
    ("data.sources[7].uri=a", "override 'data.sources[7].uri=a': data.sources has the items 0 to 1, not '7'"),
    ("train.steps.x=1", "override 'train.steps.x=1': train.steps=10 has no keys below it"),
    ("data.sources[7].uri=s3://k:secret@b", "override 'data.sources[7].uri=s3://***@b': data.sources has the items"),
    ("data.name={s3://k:secret@b", "the value of override 'data.name={s3://***@b' is not valid YAML"),
    ("train.start_from=5", "train.start_from=5 is no run and no place; name one, or leave it out"),
    ("train.steps", "override 'train.steps' is not of the form key.path=value"),
    ("train.steps={", "the value of override 'train.steps={' is not valid YAML"),
    ("model=3", "model=3: input should be a section, such as {key: value}"),
    ("data.sources={uri: a}", "data.sources={'uri': 'a'}: input should be a list"),
    ("data.dedup.near=true", "data.dedup.near=True: input should be a section"),
    ("data.max_tokens=1e9", "data.max_tokens='1e9': input should be a valid integer, such as 1_000_000"),
    ("name=a/b", "name='a/b': string should match pattern"),
]


def test_a_question_mark_within_braces_needs_quotes():
    hint = re.escape("""; within {} quote a URI that has a ?: {uri: "s3://..."}""")
    with pytest.raises(RecipeError, match=f"^the value of override .* got '\\?'{hint}$"):
        Recipe.from_yaml(TEXT, ["data.sources=[{uri: s3://b/a?region=x}]"])
    with pytest.raises(RecipeError, match=f"^the recipe .*, line 2: .*{hint}$"):
        Recipe.from_yaml("data:\n  sources: [{uri: s3://b/a?region=x}]")
    quoted = Recipe.from_yaml(TEXT, ['data.sources=[{uri: "s3://b/a?region=x"}]'])
    assert quoted.data.sources[0].uri == "s3://b/a?region=x"


def test_a_range_of_workers_must_hold_one_that_fits_mesh_and_batch():
    with pytest.raises(RecipeError, match=r"train.global_batch=8 and cuts every expert in equal parts; 4 would$"):
        Recipe.from_yaml(TEXT, ["train.workers=[5, 7]"])
    recipe = Recipe.from_yaml(TEXT, ["train.workers=[1, 9]"])
    sizes = recipe.train.world_sizes(recipe.model)
    assert [size for size in range(1, 10) if sizes.fits(size)] == [2, 4]


def test_a_number_of_workers_that_cannot_share_an_expert_is_none_to_train_with():
    batch = ["train.global_batch=24", "train.micro_batch=1"]
    with pytest.raises(RecipeError, match=r"^model\.dim=64 is not divisible by the 3 ranks that share one expert"):
        Recipe.from_yaml(TEXT, [*batch, "train.workers=6"])
    with pytest.raises(RecipeError, match=r"; 8 would$"):
        Recipe.from_yaml(TEXT, [*batch, "train.workers=[5, 7]"])
    recipe = Recipe.from_yaml(TEXT, [*batch, "train.workers=[2, 6]"])
    assert recipe.train.world_sizes(recipe.model).usable(6) == 4, "6 would end the training that grows to it"


@pytest.mark.parametrize(("override", "expected"), ERRORS, ids=[override for override, _ in ERRORS])
def test_errors_name_the_key_the_value_and_the_remedy(override, expected):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(TEXT, [override])
    message = str(caught.value)
    assert message.startswith(expected)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x", "data: missing; add it to the recipe (and 3 more)"),
        ("[]", "the recipe is [], not a mapping"),
        ("", "the recipe is None, not a mapping"),
        ("a: [", "the recipe is not valid YAML, line 1"),
        (
            "name: a\n? [b]\n: c",
            "the recipe is not valid YAML, line 2: a key is a list or a mapping; write a plain word",
        ),
        ("name: a\nname: b", "the recipe is not valid YAML, line 2: the key 'name' comes twice"),
        ("a: !!python/object/apply:os.getcwd []", "the recipe is not valid YAML, line 1: could not determine"),
    ],
)
def test_what_is_no_recipe(text, expected):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe .*nowhere.yaml"):
        Recipe.load(tmp_path / "nowhere.yaml")


def test_credentials_in_a_source_are_refused_and_not_shown():
    with pytest.raises(RecipeError, match="carries credentials") as caught:
        Recipe.from_yaml(TEXT, ["data.sources[0].uri=s3://key:secret@bucket/x"])
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None


def test_what_a_recipe_means_is_told_without_what_takes_seconds_to_import():
    """Drivers, the service and every command that reads a recipe begin with this."""
    slow = "{'ray', 'torch._dynamo', 'torch.distributed.tensor', 'llama.model', 'openai', 'scipy', 'pandas'}"
    code = f"import pipelines.stages, sys; sys.exit(' '.join({slow} & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", code], cwd=RECIPES.parents[1], timeout=60, capture_output=True)
    assert (found.returncode, found.stderr) == (0, b"")


def test_as_many_workers_as_there_are_room_for_may_be_any_number():
    recipe = Recipe.from_yaml(TEXT, ["train.workers=[2, 1_000_000_000_000]"])
    sizes = recipe.train.world_sizes(recipe.model)  # ends, too
    assert (sizes.fewest, sizes.usable(9)) == (2, 4)
