"""The recipe: one YAML file that describes a run, typed, with no key that is not obeyed.

Settings that the lower floors define (`model`, most of `train`, `serve.engine`) are embedded as they are; nothing is
typed twice. Every error is a RecipeError of one line: the key's path, its value, and what to do.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from cluster.location import has_credentials
from cluster.placement import WorkerNeeds, WorldSizes
from cluster.storage import Store
from llama.config import ModelConfig
from llama.engine.config import EngineConfig, check_cacheable
from llama.lora import check_targets
from llama.presets import PRESETS, preset_settings
from llama.tokenizer_training import SMALLEST_VOCABULARY, TokenizerKind
from llama.training.config import TrainConfig, check_compilable, check_trainable
from llama.training.mesh import check_experts_split, check_world_size, fits_world_size
from pipelines.adopted_tokenizer import adopt_tokenizer
from pipelines.data_config import DataConfig
from pipelines.finetune import fill_in_start
from pipelines.recipe_text import OTHER_KINDS, RecipeError, first_line, parse_yaml, set_override, sets_preset, shown
from pipelines.section import Positive, Section, lasting_uri
from pipelines.stage_options import StageName, StageOptions

_PORTS = (1, 65535)
_SECTION = "input should be a section, such as {key: value}"
_IN_YAML = {
    "tuple_type": "input should be a list, such as [a, b]",
    "model_type": _SECTION,
    "dataclass_type": _SECTION,
    "int_parsing": "input should be a valid integer, such as 1_000_000",
}
"""What pydantic says in Python's words."""


SectionT = TypeVar("SectionT", bound=BaseModel)


class TokenizerConfig(Section):
    """A tokenizer to learn from the training text, or with `path` one from outside."""

    vocab_size: Annotated[int, Field(ge=SMALLEST_VOCABULARY)] = 4096
    """Tokens, of which 256 are the bytes and a few special; the model's vocabulary follows it. With `path` that
    tokenizer's own number if it is left out, and at least that."""
    kind: TokenizerKind | None = None
    """How the tokens are found and used (bpe if left out); all three are byte-level (llama/tokenizer_training.py)."""
    sample_bytes: Positive | None = None
    """Bytes of training text to learn from (100 million if left out); of a larger corpus that much is sampled."""
    path: Annotated[str, Field(min_length=1)] | None = None
    """A tokenizer.json or a folder as transformers saves it, local or a store's URI."""
    eos_token: Annotated[str, Field(min_length=1)] | None = None
    """The end-of-text token at `path`, if no tokenizer_config.json there names it."""

    @field_validator("path")
    @classmethod
    def _means_the_same_everywhere(cls, path: str | None) -> str | None:
        return None if path is None else lasting_uri(path)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        return cls.filled_in(values) if isinstance(values, dict) else values

    @classmethod
    def filled_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """With what follows from the keys that are given, so that a stored recipe says it. Raises ValueError."""
        path = values.get("path")
        if path is None:
            if values.get("eos_token") is not None:
                raise ValueError("tokenizer.eos_token is for a tokenizer of tokenizer.path; leave it out")
            learned = {"kind": "bpe", "sample_bytes": 100_000_000}
            return {**values, **{key: value for key, value in learned.items() if values.get(key) is None}}
        for key in ("kind", "sample_bytes"):
            if values.get(key) is not None:
                raise ValueError(
                    f"tokenizer.{key}={shown(values[key])} is for a tokenizer to be learned, and tokenizer.path names "
                    "one that is there; leave one of them out"
                )
        if isinstance(path, str) and path and not has_credentials(path) and values.get("vocab_size") is None:
            found = adopt_tokenizer(lasting_uri(path), values.get("eos_token")).tokenizer.vocab_size
            return {**values, "vocab_size": max(found, SMALLEST_VOCABULARY)}
        return values


def _counts(value: Any) -> Any:
    """Raises ValueError for what is neither a number of workers nor the bounds of one."""
    bounds = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    if not all(type(bound) is int for bound in bounds):
        raise ValueError(f"train.workers={shown(value)} is no number of workers, such as 4, and no [min, max]")
    return value


@dataclass(frozen=True)
class TrainRecipe(TrainConfig):
    """A training run and what it asks of the cluster."""

    start_from: str | None = None
    """A run, a checkpoint or a Hugging Face directory whose weights training starts from (pipelines/finetune.py); None
    draws them by the seed."""
    workers: Annotated[int | tuple[int, int], BeforeValidator(_counts)] = 1
    """Ranks, one process each; or [min, max], between which the training takes the most that the nodes hold whenever
    it starts, shrinks when it loses some, and grows at a checkpoint when a node joins. The global batch stays: every
    rank accumulates more or fewer micro-batches."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    accelerator_type: str | None = None
    """Ray's name of the GPU that a worker must get, such as H200."""
    wait_for_nodes: float = 0.0
    """Seconds to wait for the nodes that the (fewest) workers need, at the beginning and after a loss; an autoscaler is
    asked for them. 0 refuses at once. As long it is waited for room that others hold, before a start that finds none
    counts as a failure."""
    max_failures: int = 2
    """How often in a row the training may be restarted from its last checkpoint after losing a worker. A restart that
    committed a newer checkpoint before it failed ends the row; growing, and nodes that were announced to be taken away,
    are no failures."""
    shuffle_shards: int | None = None
    """Shards whose rows are mixed with one another; each epoch takes the shards in an order of its own. None mixes the
    rows of all shards, and so needs them all at hand."""
    cache_bytes: int | None = None
    """Disk that each node may give to copies of remote shards; twice `train.shuffle_shards` shards must fit. None
    copies all of them. A local store needs no copies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora is not None and self.start_from is None:
            raise ValueError("train.lora adapts a model that is trained already; name it in train.start_from")
        smallest, largest = self._bounds
        shown = str(largest) if smallest == largest else f"[{smallest}, {largest}]"
        if smallest < 1:
            raise ValueError(f"train.workers={shown} must be at least 1")
        if smallest > largest:
            raise ValueError(f"train.workers={shown} is [min, max] with min above max; write [{largest}, {smallest}]")
        if smallest < largest and self.parallel.dp_shard != -1:
            raise ValueError(
                f"train.parallel.dp_shard={self.parallel.dp_shard} allows one number of workers, and train.workers="
                f"{shown} several; set train.parallel.dp_shard=-1"
            )
        if self.wait_for_nodes < 0:
            raise ValueError(f"train.wait_for_nodes={self.wait_for_nodes} must not be negative; 0 refuses at once")
        if self.max_failures < 0:
            raise ValueError(f"train.max_failures={self.max_failures} must not be negative; 0 means no second try")
        for name, otherwise in (("shuffle_shards", "mix all shards"), ("cache_bytes", "copy all shards")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name}={value} must be at least 1; leave it out to {otherwise}")
        _check_resources("train", "worker", self.cpus_per_worker, self.gpus_per_worker, self.accelerator_type)

    @property
    def _bounds(self) -> tuple[int, int]:
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @property
    def worker_needs(self) -> WorkerNeeds:
        """What one process of this training asks of Ray."""
        return WorkerNeeds(self.cpus_per_worker, self.gpus_per_worker, self.accelerator_type)

    def world_sizes(self, model: ModelConfig) -> WorldSizes:
        """The numbers of workers that may train this model."""
        return WorldSizes(*self._bounds, self.parallel.ep, partial(fits_world_size, self, model))

    def check_world_sizes(self, model: ModelConfig) -> None:
        """Raises ValueError if no number of workers fits mesh, batch and experts; names the nearest that does."""
        sizes = self.world_sizes(model)
        if sizes.smallest == sizes.largest:
            check_world_size(self, model, sizes.largest)  # which says what is wrong with it
            return
        check_experts_split(model, self.parallel.ep)
        if sizes.usable(most := self.global_batch // self.micro_batch) is None:
            nearest = sizes.nearest(most)
            remedy = f"; {nearest} would" if nearest else ""
            experts = " and cuts every expert in equal parts" if model.moe is not None else ""
            raise ValueError(
                f"train.workers={sizes}: no number between them is a multiple of train.parallel.dp_replicate="
                f"{self.parallel.dp_replicate} times train.parallel.ep={self.parallel.ep} and, times train.micro_batch="
                f"{self.micro_batch}, divides train.global_batch={self.global_batch}{experts}{remedy}"
            )


class EvaluateConfig(Section):
    batch_size: Positive = 16
    """Rows in one forward pass."""
    max_tokens: Positive | None = None
    """Held-out tokens to score at most, but one row, from all of the validation split; None scores it whole."""
    prompts: tuple[str, ...] = ()
    """Texts for the model to continue."""
    sample_tokens: Positive = 48
    """Tokens to generate for each prompt."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """0 takes the likeliest token."""


class ExportConfig(Section):
    dtype: Literal["float32", "bfloat16"] = "float32"


class RequestsConfig(Section):
    """The conversations that the deploy stage holds with its own endpoint."""

    conversations: Annotated[int, Field(ge=0)] = 4
    turns: Positive = 3
    max_tokens: Positive = 24
    """Tokens of each answer."""


class ServeConfig(Section):
    replicas: Positive = 1
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    accelerator_type: str | None = None
    port: Annotated[int, Field(ge=_PORTS[0], le=_PORTS[1])] = 8000
    engine: EngineConfig = EngineConfig()
    requests: RequestsConfig = RequestsConfig()

    @model_validator(mode="after")
    def _resources(self) -> Self:
        _check_resources("serve", "replica", self.cpus_per_replica, self.gpus_per_replica, self.accelerator_type)
        return self


class StoredRecipe(Section):
    """What a recipe of any kind is: a section that is read from YAML and written with its run."""

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), store: Store | None = None) -> Self:
        """Read a YAML file and set `overrides` in it, each `dotted.path=value` with the value in YAML.

        `store` is where a run that `train.start_from` names is looked for. Raises RecipeError, and StorageError if it
        is there that the store fails.
        """
        try:
            text = Path(path).read_text("utf-8")
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe {os.fspath(path)!r}; give the path of a YAML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {os.fspath(path)!r} cannot be read: {first_line(error)}") from error
        return cls.from_yaml(text, overrides, store)

    @classmethod
    def from_yaml(cls, text: str, overrides: Sequence[str] = (), store: Store | None = None) -> Self:
        """`load`, from the text itself."""
        values = parse_yaml(text, "the recipe")
        if not isinstance(values, dict):
            sections = ", ".join(cls.model_fields)
            raise RecipeError(f"the recipe is {shown(values)}, not a mapping of its sections ({sections})")
        for key, what in OTHER_KINDS.items():
            if key in values and key not in cls.model_fields:
                raise RecipeError(f"it has a key `{key}`, and so is {what}")
        # First the preset, which is another shape altogether and not a mixture of two, then what changes it.
        for override in sorted(overrides, key=lambda override: not sets_preset(override)):
            if sets_preset(override):
                values["model"] = {}
            set_override(values, override)
        _refuse_booleans(cls, values)
        try:
            return cls.model_validate(values, context=store)
        except ValidationError as error:
            raise RecipeError(_explain(error.errors(), cls)) from None  # pydantic's own text shows whole inputs

    def to_yaml(self) -> str:
        """The recipe with every default filled in; `from_yaml` makes an equal one of it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


class Recipe(StoredRecipe):
    """A run. `Recipe.load` reads one from YAML; all sections but `evaluate`, `export`, `serve` and
    `stages` must be there.

    With `train.start_from` what it names says what `model` and `tokenizer` are, where they are left out.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    train: TrainRecipe
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    serve: ServeConfig = Field(default_factory=ServeConfig)
    stages: dict[StageName, StageOptions] = {}

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        """`model.preset` names a published shape; keys beside it replace its own, its vocabulary is the tokenizer's."""
        match values:
            case {"model": {"preset": str(name), **given}}:
                shape = preset_settings(name, {str(key): value for key, value in given.items()})
                if "vocab_size" not in given:
                    del shape["vocab_size"]
                return {**values, "model": shape}
            case {"model": {"preset": name}}:
                raise ValueError(f"model.preset={shown(name)} is no name; choose one of {', '.join(PRESETS)}")
        return values

    @model_validator(mode="before")
    @classmethod
    def _vocabulary_follows_tokenizer(cls, values: Any) -> Any:
        match values:
            case {"tokenizer": dict(given), "model": dict(model)} if "vocab_size" not in model:
                tokenizer = TokenizerConfig.filled_in(given)
                vocab_size = tokenizer.get("vocab_size", TokenizerConfig.model_fields["vocab_size"].default)
                return {**values, "tokenizer": tokenizer, "model": {**model, "vocab_size": vocab_size}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _follow_start(cls, values: Any, info: ValidationInfo) -> Any:  # the last of these to be defined is run first
        match values:
            case {"train": {"start_from": str(name)}} if name:
                return fill_in_start(values, info.context)
            case {"train": {"start_from": name}} if name is not None:
                raise ValueError(f"train.start_from={shown(name)} is no run and no place; name one, or leave it out")
        return values

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        model, train, serve = self.model, self.train, self.serve
        if model.vocab_size != self.tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size={model.vocab_size} is not tokenizer.vocab_size={self.tokenizer.vocab_size}; "
                "leave model.vocab_size out"
            )
        if train.seq_len > model.max_seq_len:
            raise ValueError(
                f"train.seq_len={train.seq_len} is above model.max_seq_len={model.max_seq_len}; lower it, or raise that"
            )
        train.check_world_sizes(model)
        check_trainable(model)
        if train.lora is not None:
            check_targets(model, train.lora)
        check_compilable(model, self.train)
        check_cacheable(model)
        num_blocks = serve.engine.blocks(model, 4 if self.export.dtype == "float32" else 2)
        if num_blocks * serve.engine.block_size < model.max_seq_len:
            raise ValueError(
                f"serve.engine.num_blocks={num_blocks} of serve.engine.block_size={serve.engine.block_size} tokens "
                f"hold less than one request of model.max_seq_len={model.max_seq_len}; raise serve.engine.num_blocks"
            )
        for name, options in self.stages.items():
            options.check(name)
        check_finite(self.model_dump())
        return self


def validated(section: type[SectionT], values: object) -> SectionT:
    """`values` as a section of a recipe. Raises RecipeError, one line."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_explain(error.errors(), section)) from error


def _check_resources(section: str, unit: str, cpus: float, gpus: float, accelerator_type: str | None) -> None:
    if cpus <= 0:
        raise ValueError(f"{section}.cpus_per_{unit}={cpus} must be positive")
    if gpus < 0:
        raise ValueError(f"{section}.gpus_per_{unit}={gpus} must not be negative; 0 means none")
    if accelerator_type is not None and gpus == 0:
        raise ValueError(
            f"{section}.accelerator_type={accelerator_type!r} names a GPU, but {section}.gpus_per_{unit}=0; "
            "set it, or leave the type out"
        )


def _refuse_booleans(annotation: Any, value: Any, path: tuple[str | int, ...] = ()) -> None:
    """YAML's `yes` is true, and pydantic takes true for the number 1."""
    kinds = _alternatives(annotation)
    if isinstance(value, bool) and bool not in kinds and {int, float} & set(map(_plain, kinds)):
        raise RecipeError(f"{_dotted(path)}={value} is no number; give one")
    fields_of = _fields_of(annotation)
    for key, item in value.items() if isinstance(value, dict) else ():
        if key in fields_of:
            _refuse_booleans(fields_of[key], item, (*path, key))
    for index, item in enumerate(value) if isinstance(value, list) else ():
        _refuse_booleans(_element_of(annotation), item, (*path, index))


def _plain(annotation: Any) -> Any:
    """`int` of `Annotated[int, ...]`."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def check_finite(value: Any, path: tuple[str | int, ...] = ()) -> None:
    """YAML has `.nan` and `.inf`; no setting means anything at them."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{_dotted(path)}={value} is not a finite number; give one")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        check_finite(item, (*path, key))


# -- errors in one line


def _explain(errors: list[ErrorDetails], root: type[BaseModel]) -> str:
    line = _explain_one(errors[0], root)
    return line if len(errors) == 1 else f"{line} (and {len(errors) - 1} more)"


def _explain_one(error: ErrorDetails, root: type[BaseModel]) -> str:
    path = error["loc"]
    dotted = _dotted(path)
    message = _IN_YAML.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:] if re.match(r"(Input|String) should", message) else message
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _similar(path, root)
        return f"{dotted}: unknown key; " + (f"did you mean {known}?" if known else "remove it")
    if error["type"] in ("missing", "missing_argument"):
        return f"{dotted}: missing; add it to the recipe"
    if error["type"] == "value_error":  # one of ours, which names its key, perhaps not from the top
        if not path or message.startswith(str(path[0])):
            return message
        if message.startswith(f"{path[-1]}."):
            return f"{_dotted(path[:-1])}.{message}"
    return f"{dotted}={shown(error['input'])}: {message}"


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _similar(path: Sequence[str | int], root: type[BaseModel]) -> str | None:
    """The known key that an unknown one was probably meant to be: one below or beside it of its very name, a sibling
    that contains it or is spelt alike, else its name elsewhere."""
    *parents, name = path
    section: Any = root
    for part in parents:
        section = _fields_of(section).get(part) if isinstance(part, str) else _element_of(section)
    if below := [known for known in _known_paths(section, tuple(parents)) if known[-1] == name]:
        return _dotted(below[0])
    siblings = [*_fields_of(section), *(["preset"] if parents == ["model"] and root is Recipe else [])]
    containing = [sibling for sibling in siblings if sibling.endswith(f"_{name}") or sibling.startswith(f"{name}_")]
    if near := containing or difflib.get_close_matches(str(name), siblings, n=1):
        return _dotted((*parents, near[0]))
    elsewhere = [known for known in _known_paths(root) if known[-1] == name]
    return _dotted(elsewhere[0]) if elsewhere else None


def _known_paths(section: Any, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    for name, annotation in _fields_of(section).items():
        yield (*prefix, name)
        element = _element_of(annotation)
        yield from _known_paths(*((annotation, (*prefix, name)) if element is None else (element, (*prefix, name, 0))))


def _fields_of(annotation: Any) -> dict[str, Any]:
    """Name and type of the fields of a section, also where it is optional; none for a plain type."""
    for candidate in _alternatives(annotation):
        if isinstance(candidate, type) and (issubclass(candidate, BaseModel) or dataclasses.is_dataclass(candidate)):
            return _fields_of_section(candidate)
    return {}


@cache  # reading the hints takes longer than all else about a recipe
def _fields_of_section(section: type) -> dict[str, Any]:
    names = section.model_fields if issubclass(section, BaseModel) else [f.name for f in dataclasses.fields(section)]  # type: ignore[arg-type]
    hints = get_type_hints(section)
    return {name: hints[name] for name in names}


def _element_of(annotation: Any) -> Any:
    """The element type of a list of sections, or None."""
    for candidate in _alternatives(annotation):
        if get_origin(candidate) in (tuple, list):
            return get_args(candidate)[0]
    return None


def _alternatives(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
