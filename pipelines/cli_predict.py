"""The `caravan` command that asks an encoder–decoder of a run, here and without a cluster."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.screen import JsonOption, RunArgument, StoreOption, named_store, print_json_line

if TYPE_CHECKING:
    from llama.seq2seq_config import Seq2SeqConfig
    from pipelines.pair_set import Vocabulary


def predict(
    run_id: RunArgument,
    file: Annotated[
        str, typer.Argument(help="Sources, one a line, blanks between the symbols; - reads standard input.")
    ] = "-",
    store: StoreOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sources computed at once.")] = 64,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most [default: the recipe's evaluate.max_tokens]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the target of each source, a line each, by the last checkpoint of an encoder–decoder's run."""
    from cluster.artifact import Artifact
    from pipelines.pair_set import Vocabulary
    from pipelines.runs import Run, RunError
    from pipelines.seq2seq import recipe_of
    from pipelines.training_folder import CHECKPOINTS, checkpoints_of, training_folder
    from pipelines.translate import answer, load_seq2seq

    run = Run.open(named_store(store), run_id)
    recipe = recipe_of(run)
    asked = max_tokens or recipe.max_tokens
    if asked >= recipe.model.max_seq_len:
        raise RunError(
            f"--max-tokens={asked} and the begin token do not fit into model.max_seq_len={recipe.model.max_seq_len} "
            f"of run {run_id!r}; lower it"
        )
    checkpoints, folder = checkpoints_of(run), training_folder(run)
    if not checkpoints or folder is None:
        raise RunError(f"run {run_id!r} has no checkpoint yet; go on with it: caravan resume {run_id}")
    vocabulary = Vocabulary.load(Artifact(run.store.child("artifacts", "pairs", run.status.stages["pairs"].key)))
    lines = _read(file)
    sources = [_source(line, number, vocabulary, recipe.model) for number, line in enumerate(lines, start=1)]
    model = load_seq2seq(recipe.model, Artifact(folder.child(CHECKPOINTS, f"step-{max(checkpoints):08d}")))
    for line, tokens in zip(lines, answer(model, sources, batch_size, asked), strict=True):
        target = vocabulary.decode(tokens)
        if as_json:
            print_json_line({"source": line.split(), "target": target})
        else:
            print(*target)


def _read(file: str) -> list[str]:
    from pipelines.sources import DataError

    try:
        if file == "-":
            return sys.stdin.read().splitlines()
        with open(file, encoding="utf-8") as opened:
            return opened.read().splitlines()
    except FileNotFoundError:
        raise DataError(f"there is no file {file!r}; give one with a source a line, or - for standard input") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the sources of {file!r} cannot be read: {error}") from error


def _source(line: str, number: int, vocabulary: Vocabulary, model: Seq2SeqConfig) -> list[int]:
    """The ids of a line. Raises DataError naming the line."""
    from pipelines.sources import DataError

    symbols = line.split()
    if not symbols:
        raise DataError(f"line {number} is empty; give a source with at least one symbol")
    if len(symbols) > model.source_len:
        raise DataError(
            f"line {number} has {len(symbols)} symbols, more than model.max_source_len={model.source_len}; shorten it"
        )
    try:
        return vocabulary.encode(symbols)
    except DataError as error:
        raise DataError(f"line {number}: {error}") from None
