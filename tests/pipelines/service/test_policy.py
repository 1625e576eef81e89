"""What a recipe from the network may name: every way out that somebody might try, and the ways that are allowed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from pipelines import recipe as recipes
from pipelines.recipe import Recipe
from pipelines.service.policy import PolicyError, RecipePolicy, modules, places

S3 = "s3://bucket/data?endpoint_override=127.0.0.1:9000&scheme=http"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("allowed/sub", "allowed-too", "store", "secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "secret" / "key.txt").write_text("x")
    (tmp_path / "allowed" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "allowed" / "loop").symlink_to(tmp_path / "allowed" / "loop")
    (tmp_path / "way-in").symlink_to(tmp_path / "allowed")
    (tmp_path / "allowed" / "[a]").symlink_to(tmp_path / "secret")
    return tmp_path


@pytest.fixture
def policy(folder: Path) -> RecipePolicy:
    return RecipePolicy(str(folder / "store"), (str(folder / "allowed"), S3, "gs://corpora"), ("mine", "team.stages"))


def source(uri: Any) -> dict[str, Any]:
    return {"data": {"sources": [{"uri": "stdlib"}, {"uri": uri}]}}


BAD = [
    "/etc/passwd",
    "/",
    "etc",
    "~root/x",
    "{0}/secret",
    "{0}/allowed/../secret",
    "{0}/allowed/sub/../../secret/key.txt",
    "{0}/allowed-too",
    "{0}/allowed*",
    "{0}/*/key.txt",
    "{0}/allowed/out",
    "{0}/allowed/out/key.txt",
    "{0}/allowed/out/*",
    "{0}/allowed/[a]/key.txt",
    "file://{0}/secret",
    "file://{0}/allowed/%2e%2e/secret",
    "file://{0}/%61llowed-too",
    "file:/etc",
    "s3://bucket/data",
    "s3://bucket/data?endpoint_override=evil:9000&scheme=http",
    "s3://bucket/data?endpoint_override=127.0.0.1:9000&scheme=http&region=x",
    "s3://bucket/database?endpoint_override=127.0.0.1:9000&scheme=http",
    "s3://bucket/*?endpoint_override=127.0.0.1:9000&scheme=http",
    "s3://other/data?endpoint_override=127.0.0.1:9000&scheme=http",
    "s3://key:word@bucket/data?endpoint_override=127.0.0.1:9000&scheme=http",
    "gs://corpora2/x",
    "gs://corpora/x?endpoint_override=evil",
    "http://evil/x",
    "s3://",
    "a\0b",
]
GOOD = [
    "stdlib",
    "{0}/allowed",
    "{0}/allowed/",
    "{0}/allowed/sub/../sub/x.txt",
    "{0}/allowed/**/*.txt",
    "{0}/allowed/not-there-yet",
    "{0}/way-in/sub",
    "{0}/store/artifacts/shards/abc",
    "file://{0}/allowed/a%20b",
    "s3://bucket/data?scheme=http&endpoint_override=127.0.0.1:9000",
    "s3://bucket/data/x*/[ab]?endpoint_override=127.0.0.1:9000&scheme=http",
    "gs://corpora",
    "gs://corpora/wiki",
]


@pytest.mark.parametrize("uri", BAD)
def test_what_lies_elsewhere_is_refused_in_every_field(policy: RecipePolicy, folder: Path, uri: str) -> None:
    uri = uri.format(folder)
    everywhere = {
        "data.sources[1].uri": source(uri),
        "data.decontaminate.sources[0].uri": {"data": {"decontaminate": {"sources": [{"uri": uri}]}}},
        "tokenizer.path": {"tokenizer": {"path": uri}},
    }
    if "/" in uri:
        everywhere["train.start_from"] = {"train": {"start_from": uri}}
    for field, values in everywhere.items():
        with pytest.raises(PolicyError) as caught:
            policy.check(values)
        assert caught.value.field == field and str(caught.value).startswith(field)
        assert "word" not in str(caught.value), "no secret is repeated"


@pytest.mark.parametrize("uri", GOOD)
def test_what_lies_there_is_taken(policy: RecipePolicy, folder: Path, uri: str) -> None:
    policy.check(source(uri.format(folder)))


def test_a_link_in_a_circle_leads_nowhere_else(policy: RecipePolicy, folder: Path) -> None:
    policy.check(source(f"{folder}/allowed/loop"))
    assert os.path.realpath(folder / "allowed" / "loop").startswith(str(folder))


def test_relative_paths_are_the_service_s(policy: RecipePolicy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "allowed")
    policy.check(source("sub"))
    with pytest.raises(PolicyError):
        policy.check(source("../secret"))


def test_stdlib_is_a_source_and_no_path(policy: RecipePolicy) -> None:
    with pytest.raises(PolicyError):
        policy.check({"tokenizer": {"path": "stdlib"}})


def test_a_start_is_a_run_of_the_store_or_an_allowed_place(policy: RecipePolicy, folder: Path) -> None:
    policy.check({"train": {"start_from": "20260101-000000-abcdef"}})
    policy.check({"train": {"start_from": f"{folder}/store/artifacts/pretrain/k/checkpoints/step-00000001"}})


@pytest.mark.parametrize(
    ("uses", "allowed"),
    [("mine:f", True), ("mine.sub:f", True), ("team.stages:f", True), ("team.stages.x:f", True)]
    + [("mineral:f", False), ("os:system", False), ("team:f", False), ("team.stagesx:f", False), ("", False)],
)
def test_only_allowed_modules_are_stages(policy: RecipePolicy, uses: str, allowed: bool) -> None:
    values = {"stages": {"extra": {"uses": uses, "after": ["shards"]}, "ingest": {"retries": 2}}}
    if allowed:
        policy.check(values)
    else:
        with pytest.raises(PolicyError, match="stages.extra.uses: module .* is not one that the service's operator"):
            policy.check(values)


@pytest.mark.parametrize("values", [{}, {"data": 3}, {"data": {"sources": "x"}}, {"train": []}, {"stages": {"a": 1}}])
def test_what_is_no_recipe_is_left_to_the_recipe(policy: RecipePolicy, values: dict[str, Any]) -> None:
    policy.check(values)


def strings(section: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted paths of all of a recipe's fields that take any text."""
    for name, annotation in recipes._fields_of(section).items():
        element = recipes._element_of(annotation)
        below = list(strings(element if element is not None else annotation, (*path, name)))
        kinds = [annotation, *get_args(annotation), *(get_args(each) for each in get_args(annotation))]
        if below:
            yield from below
        elif any(kind is str or (isinstance(kind, tuple) and str in kind) for kind in kinds):
            yield ".".join((*path, name))


NO_PLACES = {
    "name",
    "data.sources.text_column",
    "data.sources.metadata_columns",
    "data.clean.language.allowed",
    "data.decontaminate.sources.text_column",
    "data.decontaminate.sources.metadata_columns",
    "tokenizer.eos_token",
    "train.accelerator_type",
    "evaluate.prompts",
    "serve.accelerator_type",
}
"""Text that is a name or is used as it stands."""


def test_every_text_of_a_recipe_is_known_as_a_place_or_as_none() -> None:
    """A new field that takes text belongs to `places`, or to the list above."""
    named = {"data.sources.uri", "data.decontaminate.sources.uri", "tokenizer.path", "train.start_from"}
    found = set(strings(Recipe))
    assert named <= found
    assert {path for path in found if not path.startswith("stages")} - named - NO_PLACES == set()


def test_a_resolved_recipe_is_seen_whole() -> None:
    text = yaml.safe_dump(
        {
            "name": "x",
            "data": {
                "sources": [{"uri": "/a"}, {"uri": "/b"}],
                "decontaminate": {"sources": [{"uri": "/c"}]},
            },
            "tokenizer": {"path": "/d", "vocab_size": 300},
            "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 64},
            "train": {"steps": 2, "global_batch": 2, "micro_batch": 1, "seq_len": 32},
        }
    )
    values = Recipe.from_yaml(text).model_dump(mode="json")
    assert [place.value for place in places(values)] == ["/a", "/b", "/c", "/d", None]
    assert list(modules(values)) == []
