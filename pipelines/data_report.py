"""What became of the data: from the documents that were read to the tokens that are trained on.

    data_report.json    every document accounted for: read, dropped and by which rule (with examples), kept, tokens
    data_report.png     the same as a picture

Both lie in the artifact of `shards` and are copied into the folder of every run that used it. They follow from the
metadata of the four stages alone; nothing is read twice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any

from pipelines.documents import KEPT, PARTS, SPLITS, stage_metadata
from pipelines.figures import drawable, new_figure, own_style, png
from pipelines.stage import StageContext

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

JSON_FILE = "data_report.json"
PICTURE_FILE = "data_report.png"

EXACT, CONTAMINATED, NEAR = "exact duplicate", "contaminated", "near duplicate"
REFUSED = "refused by the chat template"
OVER_TOKENS = "over a limit of tokens"

_LABEL_CHARS = 40
_DRAWN_SOURCES = 20
_READ, _KEPT, _DROPPED, _PREFERENCES = "tab:gray", "tab:green", "tab:red", "tab:olive"


def write_report(context: StageContext, shards_metadata: Mapping[str, Any]) -> None:
    """Write both files into the attempt of the stage `shards`, whose metadata is given, and record them.

    Raises NotFound if one of the stages `ingest`, `dedup` and `tokenizer` is not committed."""
    ingest, dedup, tokenizer = (stage_metadata(context.inputs[name]) for name in ("ingest", "dedup", "tokenizer"))
    report = build_report(ingest, dedup, tokenizer, shards_metadata)
    with own_style():
        picture = png(draw_report(report))
    output = context.attempt.store
    context.record(output.write_json(JSON_FILE, report), output.write_bytes(PICTURE_FILE, picture))


def build_report(
    ingest: Mapping[str, Any], dedup: Mapping[str, Any], tokenizer: Mapping[str, Any], shards: Mapping[str, Any]
) -> dict[str, Any]:
    """The report, of the stages' metadata.

    `documents.in` is `documents.kept` plus the documents of every rule of `dropped`: none is lost in silence. So it is
    for each source, whose kept ones are its `documents` and `preferences`. What is quarantined was no document, and is
    counted by itself; what lies beyond `data.max_bytes` was never read. Sizes are bytes of text as UTF-8; tokens
    include the two that bound each document.
    """
    pairs: list[list[Mapping[str, Any]]] = [[] for _ in ingest["sources"]]
    for part, kept in zip(ingest[PARTS], dedup[KEPT], strict=True):
        if part["kind"] == "preference":
            pairs[part["source"]].append(kept)
    duplicates = {EXACT: dedup["exact"], CONTAMINATED: dedup["contaminated"], NEAR: dedup["near"]}
    sources = [
        _source(
            read,
            packed,
            _sum(of)["documents"],
            {rule: found["by_source"].get(str(number), 0) for rule, found in duplicates.items() if found},
        )
        for number, (read, packed, of) in enumerate(zip(ingest["sources"], shards["sources"], pairs, strict=True))
    ]
    preferences = _sum(chain(*pairs))
    read = _sum(sources, "documents_in", "bytes_in")
    packed = _sum(shards["splits"].values())
    kept = {unit: packed[unit] + preferences[unit] for unit in packed}

    dropped: dict[str, Any] = {rule: dict(of) for rule, of in ingest["dropped"].items()}
    for rule, found in duplicates.items():
        dropped[rule] = {name: of for name, of in (found or {"documents": 0}).items() if name != "by_source"}
    dropped[REFUSED] = dict(shards["chat_refused"])
    dropped[OVER_TOKENS] = {"documents": sum(source["over_tokens"] for source in shards["sources"])}
    tokens = sum(source["tokens"] for source in sources)
    return {
        "documents": {"in": read["documents"], "kept": kept["documents"]},
        "bytes": {"in": read["bytes"], "kept": kept["bytes"]},
        "tokens": tokens,
        "training_tokens": shards["splits"]["train"]["tokens"],
        "validation_tokens": shards["splits"]["validation"]["tokens"],
        "bytes_per_token": _per(packed["bytes"], tokens),
        "dropped": {rule: of for rule, of in dropped.items() if of["documents"]},
        "changed": ingest["changed"],
        "quarantined": {"records": ingest["quarantined"], "examples": ingest["quarantine"]},
        "left_out": {
            "files": sum(source["left_out"] for source in ingest["sources"]),
            "examples": ingest["left_out"],
        },
        "preferences": preferences,
        "sources": sources,
        "tokenizer": {name: tokenizer[name] for name in ("vocab_size", "fingerprint", "trained_on_bytes")},
        "packing": {
            "kind": shards["packing"],
            "seq_len": shards["seq_len"],
            "splits": {split: _packing(shards["splits"][split], shards["seq_len"]) for split in SPLITS},
        },
        "length_histogram": [
            {"tokens_from": 1 << power, "tokens_below": 2 << power, "documents": count}
            for power, count in enumerate(shards["length_histogram"])
        ],
    }


def _source(
    read: Mapping[str, Any], packed: Mapping[str, Any], preferences: int, duplicates: Mapping[str, int]
) -> dict[str, Any]:
    """What the stages say of one source: `documents` are packed, `preferences` kept as they are."""
    dropped = {**read["dropped"], **duplicates, REFUSED: packed["refused"], OVER_TOKENS: packed["over_tokens"]}
    return {
        **{name: read[name] for name in ("uri", "format", "kind", "files", "left_out", "quarantined")},
        "dropped": {rule: documents for rule, documents in dropped.items() if documents},
        "documents_in": read["documents_in"],
        "bytes_in": read["bytes_in"],
        "documents": packed["documents"],
        "preferences": preferences,
        "bytes": packed["bytes"],
        "tokens": packed["tokens"],
        "training_tokens": packed["training_tokens"],
        "validation_tokens": packed["validation_tokens"],
        "bytes_per_token": _per(packed["bytes"], packed["tokens"]),
    }


def _packing(split: Mapping[str, Any], seq_len: int) -> dict[str, Any]:
    """`density` is the share of the rows' places that hold a target to learn."""
    return {
        **{name: split[name] for name in ("documents", "tokens", "targets", "rows", "samples")},
        "density": _per(split["targets"], split["rows"] * seq_len),
    }


def _sum(counts: Any, documents: str = "documents", size: str = "bytes") -> dict[str, int]:
    counts = list(counts)
    return {
        "documents": sum(count[documents] for count in counts),
        "bytes": sum(count[size] for count in counts),
    }


def _per(amount: int, unit: int) -> float | None:
    return round(amount / unit, 4) if unit else None


def in_one_line(report: Mapping[str, Any]) -> str:
    """Documents in and kept, tokens, dropped by rule, quarantined."""
    documents = report["documents"]
    line = f"{documents['in']:,} documents → {documents['kept']:,} kept, {_tokens(report)}"
    if report["dropped"]:
        line += "; dropped: " + ", ".join(f"{of['documents']:,} {rule}" for rule, of in report["dropped"].items())
    if report["quarantined"]["records"]:
        line += f"; {report['quarantined']['records']:,} quarantined"
    return line


def _tokens(report: Mapping[str, Any]) -> str:
    """Apart, for a limit of tokens is one of training."""
    return f"{report['training_tokens']:,} training and {report['validation_tokens']:,} validation tokens"


# -- the picture


def draw_report(report: Mapping[str, Any]) -> Figure:
    """What each rule dropped, tokens and bytes per token of the sources, and how long documents are.

    To be called inside `own_style`."""
    steps = len(report["dropped"]) + 3
    sources = _drawn_sources(report["sources"])
    heights = [0.9 + 0.3 * steps, 0.9 + 0.3 * len(sources), 2.6]
    figure = new_figure(9, 0.6 + sum(heights))
    figure.suptitle(_title(report), fontsize=11)
    grid = figure.add_gridspec(3, 2, height_ratios=heights, width_ratios=(3, 2), wspace=0.06)
    _draw_flow(figure.add_subplot(grid[0, :]), report)
    tokens = figure.add_subplot(grid[1, 0])
    _draw_sources(tokens, figure.add_subplot(grid[1, 1], sharey=tokens), sources)
    _draw_lengths(figure.add_subplot(grid[2, :]), report)
    return figure


def _title(report: Mapping[str, Any]) -> str:
    """In two lines: in one it would be wider than the picture."""
    documents = report["documents"]
    title = f"{documents['in']:,} documents in, {documents['kept']:,} kept"
    if report["quarantined"]["records"]:
        title += f"; {report['quarantined']['records']:,} records in quarantine"
    return f"{title}\n{_tokens(report)}"


def _draw_flow(axes: Axes, report: Mapping[str, Any]) -> None:
    """A bar for what was read, one for each rule where the last one ends, one for what is left."""
    documents = report["documents"]
    bars = [("read", 0, documents["in"], _READ, f"{documents['in']:,}")]
    left = documents["in"]
    for rule, of in report["dropped"].items():
        left -= of["documents"]
        share = of["documents"] / documents["in"]
        shown = f"{share:.1%}" if share >= 0.0005 else "<0.1%"
        bars.append((rule, left, of["documents"], _DROPPED, f"−{of['documents']:,} ({shown})"))
    preferences = report["preferences"]["documents"]
    if preferences:
        left -= preferences
        bars.append(("preference pairs", left, preferences, _PREFERENCES, f"{preferences:,}"))
    bars.append(("packed" if preferences else "kept", 0, left, _KEPT, f"{left:,}"))
    widest = max(documents["in"], 1)
    for place, (_, begin, width, color, label) in enumerate(bars):
        axes.barh(place, width, left=begin, color=color, edgecolor=color)  # without an edge a narrow one would vanish
        axes.text(begin + width + 0.01 * widest, place, label, va="center", fontsize=9)
    _name_bars(axes, [name for name, *_ in bars])
    axes.set(xlim=(0, 1.3 * widest), xlabel="documents")
    _count(axes.xaxis)


def _draw_sources(tokens: Axes, bytes_per_token: Axes, sources: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(sources))
    tokens.barh(places, [source["tokens"] for source in sources], color="tab:blue", edgecolor="tab:blue")
    bytes_per_token.barh(places, [source["bytes_per_token"] or 0 for source in sources], color="tab:cyan")
    for place, source in enumerate(sources):
        tokens.text(source["tokens"], place, f" {source['tokens']:,}", va="center", fontsize=9)
        shown = "none" if source["bytes_per_token"] is None else f"{source['bytes_per_token']:.2f}"
        bytes_per_token.text(source["bytes_per_token"] or 0, place, f" {shown}", va="center", fontsize=9)
    _name_bars(tokens, [source["label"] for source in sources])
    bytes_per_token.tick_params(left=False, labelleft=False)
    for axes, name in ((tokens, "tokens"), (bytes_per_token, "bytes_per_token")):
        axes.set_xlim(0, 1.45 * max(source[name] or 0 for source in sources) or 1)
    tokens.set(xlabel="tokens")
    _count(tokens.xaxis)
    bytes_per_token.set(xlabel="bytes per token")


def _draw_lengths(axes: Axes, report: Mapping[str, Any]) -> None:
    bins = report["length_histogram"]
    empty = sum(1 for _ in takewhile(lambda of: not of["documents"], bins))
    shown = bins[empty:] or [{"tokens_from": 1, "documents": 0}]
    edges = [of["tokens_from"] for of in shown]
    axes.bar(range(len(shown)), [of["documents"] for of in shown], width=0.95, align="edge", color="tab:blue")
    axes.set_xticks(range(len(shown) + 1), [f"{edge:,}" for edge in [*edges, 2 * edges[-1]]], fontsize=8)
    packing = report["packing"]
    density = packing["splits"]["train"]["density"]
    title = f"rows of {packing['seq_len']:,} tokens, {packing['kind']}"
    title += "" if density is None else f": {density:.1%} of their places hold a target"
    axes.set(xlabel="tokens of a document", ylabel="documents")
    axes.set_title(title, fontsize=10)
    axes.set_xlim(-0.1, len(shown) + 0.1)
    _count(axes.yaxis)


def _drawn_sources(sources: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All of them with a `label`, or of very many the largest and one for the others."""
    labels = source_labels([source["uri"] for source in sources])
    sources = [{**source, "label": label} for source, label in zip(sources, labels, strict=True)]
    if len(sources) <= _DRAWN_SOURCES:
        return list(sources)
    largest = sorted(range(len(sources)), key=lambda index: -sources[index]["tokens"])[: _DRAWN_SOURCES - 1]
    others = [source for index, source in enumerate(sources) if index not in set(largest)]
    tokens, size = (sum(source[unit] for source in others) for unit in ("tokens", "bytes"))
    rest = {"label": f"{len(others)} others", "tokens": tokens, "bytes_per_token": _per(size, tokens)}
    return [*(sources[index] for index in sorted(largest)), rest]


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    labels = [drawable(name) for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=9, parse_math=False)  # a `$` in a name is no formula
    axes.set_ylim(len(names) - 0.4, -0.6)


def _count(axis: Axis) -> None:
    """Ticks at whole numbers, 1.5 M for 1,500,000."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_major_formatter(EngFormatter())


def source_labels(uris: Sequence[str]) -> list[str]:
    """Each source's number and URI without its options; of a long one those segments that few others have."""
    shown = [uri.partition("?")[0] if "://" in uri else uri for uri in uris]  # in a path a `?` is part of a glob
    segments = [re.split("(?<![:/])/", uri) for uri in shown]
    sources_with = Counter(chain(*map(enumerate, segments)))
    return [f"{number}: {_shortened(of, sources_with)}" for number, of in enumerate(segments)]


def _shortened(segments: Sequence[str], sources_with: Mapping[tuple[int, str], int]) -> str:
    left = list(segments)
    middle = (len(left) - 1) / 2
    for place in sorted(range(len(left)), key=lambda at: (-sources_with[at, left[at]], abs(at - middle)))[:-1]:
        if len(label := _joined(left)) <= _LABEL_CHARS:
            return label
        left[place] = "…"
    label = _joined(left)
    half = (_LABEL_CHARS - 1) // 2
    return label if len(label) <= _LABEL_CHARS else f"{label[:half]}…{label[-half:]}"


def _joined(segments: Sequence[str]) -> str:
    return re.sub("…(/…)+", "…", "/".join(segments))
