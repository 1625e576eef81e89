"""Byte-pair encoding of a text, merge by merge (Sennrich et al., arXiv:1508.07909, §3.2).

Without a tokenizer the merges are learned from the text itself: each is the pair of neighbours that is most frequent
at that moment. With one they are those of its list that the text has a use for, in the list's order.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers.models import BPE

from llama.tokenizer import Tokenizer
from pipelines.explain.pieces import encoded, labels, learned_from
from pipelines.explain.registry import ExplainError, Explanation, Options
from pipelines.figures import drawable, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEXT = "low low low low low lower lower newest newest newest newest newest newest widest widest widest"
_LEARNED = 18
_ROWS, _CHARACTERS = 20, 84
"""At most so many steps, and characters of different words, are drawn."""
_MARGIN = 32  # characters left of the words
_FONT = "DejaVu Sans Mono"

Word = tuple[str, ...]
"""The pieces of a word, in the tokenizer's spelling."""


@dataclass(frozen=True)
class Step:
    """One merge and what it makes of the words."""

    rank: int
    """Its place in the tokenizer's list of merges, from 1."""
    left: str
    right: str
    merged: str
    count: int
    """How often the text has it at this moment."""
    words: list[list[str]]
    """Pieces of each different word afterwards."""


@dataclass(frozen=True)
class Merges:
    learned: bool
    """From the text itself."""
    counts: list[int]
    """How often the text has each different word, in order of first occurrence."""
    start: list[list[str]]
    """Each word in bytes, or characters."""
    steps: list[Step]
    tokens_before: int
    tokens_after: int
    """Of the whole text."""


def merge(word: Word, left: str, right: str) -> Word:
    """The word with each such pair joined, from its beginning on."""
    merged: list[str] = []
    for piece in word:
        # A piece that has just been joined is `left + right`, and never `left` again.
        if piece == right and merged and merged[-1] == left:
            merged[-1] = left + right
        else:
            merged.append(piece)
    return tuple(merged)


def merge_steps(tokenizer: Tokenizer, text: str, learned: bool) -> Merges:
    """Raises ExplainError: the tokenizer is no BPE, or does more than merging; the text has no tokens."""
    ids = encoded(tokenizer, text)
    backend = tokenizer.backend
    if not isinstance(backend.model, BPE):
        raise ExplainError(f"the tokenizer is {type(backend.model).__name__}, which has no merges; take one of BPE")
    normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    cut = [(normal, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(normal)
    names = [word for word, _ in cut]
    counts = Counter(names)
    words: dict[str, Word] = {name: tuple(name) for name in counts}
    show = _Labels(tokenizer)
    start, before, steps = show(words), sum(map(len, names)), []
    for rank, (left, right) in enumerate(json.loads(backend.to_str())["model"]["merges"], start=1):
        after = {name: merge(word, left, right) for name, word in words.items()}
        if after == words:
            continue
        count = sum(counts[name] * (len(words[name]) - len(after[name])) for name in words)
        words = after
        steps.append(Step(rank, show.piece(left), show.piece(right), show.piece(left + right), count, show(words)))
    if [piece for name in names for piece in words[name]] != [backend.id_to_token(token_id) for token_id in ids]:
        raise ExplainError("the tokenizer does more with this text than merging; take shorter words, or another one")
    return Merges(learned, list(counts.values()), start, steps, before, len(ids))


class _Labels:
    """The tokenizer's spelling of pieces as text; looked up once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, str] = {}

    def piece(self, name: str) -> str:
        if name not in self._known:
            token_id = self._tokenizer.backend.token_to_id(name)
            self._known[name] = name if token_id is None else labels(self._tokenizer, [token_id])[0]
        return self._known[name]

    def __call__(self, words: dict[str, Word]) -> list[list[str]]:
        return [[self.piece(piece) for piece in word] for word in words.values()]


def fitting_words(merges: Merges) -> int:
    """How many of the words fit into a row. Raises ExplainError if the first one does not."""
    width = 0
    for place, (word, count) in enumerate(zip(merges.start, merges.counts, strict=True)):
        width += _width(word, count)
        if width > _CHARACTERS:
            if place == 0:
                raise ExplainError(f"--text begins with a word of {width} characters; at most {_CHARACTERS} are drawn")
            return place
    return len(merges.counts)


def _width(word: list[str], count: int) -> int:
    return sum(map(len, word)) + len(_times(count)) + 2


def _times(count: int) -> str:
    return f"×{count}" if count > 1 else ""


def draw(merges: Merges) -> Figure:
    """A row for the bytes and one for each merge, a box for each piece, those just made in orange."""
    words = fitting_words(merges)
    rows: list[tuple[str, list[list[str]], str]] = [("bytes", merges.start, "")]
    for number, step in enumerate(merges.steps, start=1):
        times = f"{step.count}×" if merges.learned else f"{step.count}×, no. {step.rank:,}"
        room = _MARGIN - len(times) - 3
        what = f"{number}. {step.left} + {step.right}"
        what = what if len(what) <= room else f"{what[: room - 1]}…"
        rows.append((f"{what:<{room}} {times}", step.words, step.merged))
    if len(rows) > _ROWS:
        left_out = len(rows) - _ROWS
        rows = [*rows[: _ROWS - 2], (f"… {left_out + 1} merges more …", [], ""), rows[-1]]
    figure = new_figure(10, 1.3 + 0.31 * len(rows))
    axes = figure.add_subplot()
    for place, (title, pieces, made) in enumerate(rows):
        axes.text(0, place, drawable(title, _FONT), family=_FONT, fontsize=9, va="center", parse_math=False)
        _draw_row(axes, place, pieces[:words], merges.counts, merges.start, made)
    axes.set(xlim=(-1, _MARGIN + _CHARACTERS + 1), ylim=(len(rows) - 0.4, -1.4))
    heading = "merge, and how often" if merges.learned else "merge, how often, its number"
    axes.text(0, -1, heading, fontsize=10, weight="bold", va="center")
    axes.text(_MARGIN, -1, "the text's different words in pieces", fontsize=10, weight="bold", va="center")
    axes.axis("off")
    missing = len(merges.counts) - words
    where = "learned from the text itself" if merges.learned else "by the tokenizer's list"
    figure.suptitle(
        f"BPE, merges {where}: {merges.tokens_before} tokens become {merges.tokens_after}"
        + (f" ({missing} words more are not drawn)" if missing else "")
    )
    return figure


def _draw_row(
    axes: Axes, place: int, pieces: list[list[str]], counts: list[int], start: list[list[str]], made: str
) -> None:
    from matplotlib.patches import Rectangle

    begin = _MARGIN
    for word, count, whole in zip(pieces, counts, start, strict=False):
        at = begin
        for piece in word:
            color = "tab:orange" if piece == made else "tab:blue"
            axes.add_patch(
                Rectangle((at + 0.06, place - 0.36), len(piece) - 0.12, 0.72, facecolor=color, alpha=0.35, linewidth=0)
            )
            axes.text(
                at + len(piece) / 2,
                place,
                drawable(piece, _FONT),
                family=_FONT,
                fontsize=9,
                ha="center",
                va="center",
                parse_math=False,
            )
            at += len(piece)
        if count > 1:
            axes.text(at + 0.2, place, _times(count), fontsize=8, color="0.4", va="center")
        begin += _width(whole, count)


def explain(options: Options) -> Explanation:
    text = _TEXT if options.text is None else options.text
    if options.model is not None:
        merges = merge_steps(options.model.tokenizer, text, learned=False)
    else:
        merges = merge_steps(learned_from(text, _LEARNED), text, learned=True)
    first = [f"{step.left} + {step.right} ({step.count} times)" for step in merges.steps[:3]]
    lines = [
        f"{merges.tokens_before} single pieces become {merges.tokens_after} tokens by {len(merges.steps)} merge"
        f"{'s' * (len(merges.steps) != 1)}.",
        f"First: {', then '.join(first)}." if first else "No pair of this text is in the tokenizer's list.",
    ]
    if merges.learned:
        lines.append(
            "Each merge is the pair that the text has most often at that moment, counted inside words; ␣ is the space, "
            "which belongs to the word behind it."
        )
    return Explanation(merges, tuple(lines), {"bpe": lambda: draw(merges)})
