"""The recipe of an encoder–decoder, and the stages that it means: pairs → pretrain → evaluate.

A recipe with the key `pairs` is one. Pairs of sequences are drawn for a task or read from a file (pipelines/pairs.py),
the model learns to write the target of each source, and is then asked for those of sources that it has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from llama.seq2seq_config import Seq2SeqConfig
from llama.training.config import check_compilable, check_trainable
from pipelines.graph import Graph
from pipelines.pair_set import SPECIAL
from pipelines.pairs import PairsConfig, Room, pairs_stage
from pipelines.pretrain import pretrain_stage
from pipelines.recipe import StoredRecipe, TrainRecipe, check_finite
from pipelines.recipe_text import parse_yaml, shown
from pipelines.runs import Run, RunError
from pipelines.section import Positive, Section
from pipelines.stage import Resources
from pipelines.stage_options import StageName, StageOptions
from pipelines.translate import evaluate_stage

STAGES = ("pairs", "pretrain", "evaluate")
_WITHOUT_MEANING = {
    "lora": "adapters go onto decoders",
    "start_from": "weights to start from are those of decoders",
    "shuffle_shards": "pairs are all mixed",
    "cache_bytes": "pairs are held in memory",
}


class Seq2SeqEvaluate(Section):
    """How the held-out sources are put to the model."""

    batch_size: Positive = 64
    """Sources computed at once."""
    max_tokens: Positive | None = None
    """Tokens of an answer at most, with the one that ends it; None is all that `model.max_seq_len` has room for."""


class Seq2SeqRecipe(StoredRecipe):
    """A run of an encoder–decoder; all sections but `evaluate` and `stages` must be there.

    What `pairs.task` tells of `model` and `train` is filled in where it is left out: `vocab_size`, `max_source_len` and
    `max_seq_len`, and `train.seq_len`. With `pairs.path` they are to be given.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    pairs: PairsConfig
    model: Seq2SeqConfig
    train: TrainRecipe
    evaluate: Seq2SeqEvaluate = Seq2SeqEvaluate()
    stages: dict[StageName, StageOptions] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_a_decoders(cls, values: Any) -> Any:
        match values:
            case {"train": dict(train)}:
                for name, why in _WITHOUT_MEANING.items():
                    if (value := train.get(name)) is not None:
                        raise ValueError(f"train.{name}={shown(value)} has no place here: {why}; leave it out")
        return values

    @model_validator(mode="before")
    @classmethod
    def _fill_in_sizes(cls, values: Any) -> Any:
        match values:
            case {"pairs": {"path": str()}, "model": dict(model), "train": dict(train)}:
                wanted = {"model.vocab_size": model, "model.max_source_len": model, "model.max_seq_len": model}
                for name, section in {**wanted, "train.seq_len": train}.items():
                    if section.get(name.partition(".")[2]) is None:
                        raise ValueError(f"{name}: missing; with pairs.path it is to be given")
            case {"pairs": dict(given), "model": dict(model), "train": dict(train)}:
                pairs = PairsConfig.filled_in(given)
                symbols, longest = pairs.get("symbols"), pairs.get("max_length")
                if type(symbols) is not int or type(longest) is not int:
                    return values  # of a file; or the section itself refuses it
                # The begin token and the target are trained on, and generation has the end token besides.
                sizes = {"vocab_size": symbols + SPECIAL, "max_source_len": longest, "max_seq_len": longest + 2}
                return {
                    **values,
                    "pairs": pairs,
                    "model": {**sizes, **model},
                    "train": {"seq_len": longest + 1, **train},
                }
        return values

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        model, train = self.model, self.train
        if train.seq_len > model.max_seq_len:
            raise ValueError(
                f"train.seq_len={train.seq_len} is above model.max_seq_len={model.max_seq_len}; lower it, or raise that"
            )
        if self.max_tokens >= model.max_seq_len:
            raise ValueError(
                f"evaluate.max_tokens={self.max_tokens} and the begin token do not fit into model.max_seq_len="
                f"{model.max_seq_len}; lower it, or raise that"
            )
        if self.pairs.task is not None:
            self._check_drawn_fit()
        train.check_world_sizes(model)
        check_trainable(model)
        check_compilable(model, train)
        for name, options in self.stages.items():
            if name not in STAGES:
                raise ValueError(f"stages.{name}: there is no such stage; choose one of {', '.join(STAGES)}")
            options.check(name, STAGES)
        check_finite(self.model_dump())
        return self

    def _check_drawn_fit(self) -> None:
        symbols, _, longest, _ = self.pairs.drawn
        for name, value, needed, why in (
            ("model.vocab_size", self.model.vocab_size, symbols + SPECIAL, f"pairs.symbols={symbols} and two more"),
            ("model.max_source_len", self.model.source_len, longest, f"pairs.max_length={longest}"),
            ("train.seq_len", self.train.seq_len, longest + 1, f"pairs.max_length={longest} and the begin token"),
        ):
            if value < needed:
                raise ValueError(f"{name}={value} is below {why}; leave it out, or set at least {needed}")

    @property
    def max_tokens(self) -> int:
        """Tokens of an answer at most."""
        return self.evaluate.max_tokens or self.model.max_seq_len - 1

    @property
    def room(self) -> Room:
        return Room(self.model.vocab_size, self.model.source_len, self.train.seq_len - 1)


def is_seq2seq(values: object) -> bool:
    """Whether a recipe's parsed YAML is that of an encoder–decoder."""
    return isinstance(values, Mapping) and "pairs" in values


def recipe_of(run: Run) -> Seq2SeqRecipe:
    """The recipe of a run of an encoder–decoder. Raises RunError for another run."""
    if not is_seq2seq(parse_yaml(run.recipe_yaml, f"the recipe of run {run.id!r}")):
        raise RunError(f"run {run.id!r} is not of an encoder–decoder, but of a model that continues text")
    return Seq2SeqRecipe.from_yaml(run.recipe_yaml)


def build_seq2seq_graph(recipe: Seq2SeqRecipe, generations: Mapping[str, int] | None = None) -> Graph:
    """Pairs to figures. `generations`: which stages were made anew (pipelines/generations.py).

    Raises:
        DataError: the file at `pairs.path` is not there.
    """
    train, workers = recipe.train, recipe.train.world_sizes(recipe.model).largest
    taken = {
        "pairs": (1.0, 0.0),
        "pretrain": (workers * train.cpus_per_worker, workers * train.gpus_per_worker),
        "evaluate": (train.cpus_per_worker, train.gpus_per_worker),
    }
    stages = [
        pairs_stage(recipe.pairs, recipe.room),
        pretrain_stage(recipe.model, train),
        evaluate_stage(
            recipe.model, recipe.evaluate.batch_size, recipe.max_tokens, train.worker_needs, train.wait_for_nodes
        ),
    ]
    return Graph(
        [
            replace(
                stage,
                resources=Resources(*taken[stage.name], own_workers=True),
                tries=recipe.stages.get(stage.name, StageOptions()).tries,
            )
            for stage in stages
        ],
        generations,
    )
