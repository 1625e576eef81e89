"""The KV cache: what it holds, by the number of key/value heads, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from llama.config import ModelConfig
from llama.counts import generation_flops
from pipelines.explain.presets import chosen_preset
from pipelines.explain.registry import Explanation, Options
from pipelines.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PRESET = "llama-3-8b"
_DTYPE_BYTES = 2
_PROMPT, _NEW_TOKENS = 16, 2048
_POINTS = 64
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Cache:
    """Bytes of bf16 and FLOPs, of one sequence."""

    preset: str
    lengths: np.ndarray
    """Tokens in the cache."""
    cache_bytes: dict[str, np.ndarray]
    """At each length, by the kind of attention."""
    prompt: int
    generated: np.ndarray
    """Tokens generated behind the prompt, from 1."""
    cached_flops: np.ndarray
    """Cumulative, after each generated token."""
    uncached_flops: np.ndarray


def variants(config: ModelConfig) -> dict[str, ModelConfig]:
    """The model with other numbers of key/value heads, most first; the label marks its own."""
    heads = config.num_heads
    counts = {heads, config.kv_heads, 1} | ({heads // 4} if heads % 4 == 0 else set())
    kinds = {heads: "MHA", 1: "MQA"}
    return {
        f"{kinds.get(count, 'GQA')}, {count} KV head{'s' * (count > 1)}"
        + (", as the preset has" if count == config.kv_heads else ""): replace(config, num_kv_heads=count)
        for count in sorted(counts, reverse=True)
    }


def compute(name: str, config: ModelConfig) -> Cache:
    """Up to the preset's longest sequence."""
    longest = config.max_seq_len
    lengths = np.unique(np.geomspace(1, longest, _POINTS).round().astype(int))
    new_tokens = min(_NEW_TOKENS, longest - _PROMPT)
    return Cache(
        name,
        lengths,
        {label: lengths * each.kv_bytes_per_token(_DTYPE_BYTES) for label, each in variants(config).items()},
        _PROMPT,
        np.arange(1, new_tokens + 1),
        *(np.array(generation_flops(config, _PROMPT, new_tokens, cached)) for cached in (True, False)),
    )


def draw(found: Cache) -> Figure:
    figure = new_figure(10, 5.2)
    left, right = figure.subplots(1, 2)
    for dash, (label, sizes) in zip(_DASHES, found.cache_bytes.items(), strict=False):
        left.loglog(found.lengths, sizes / 2**30, linestyle=dash, linewidth=1.8, label=f"{label}: {_size(sizes[-1])}")
    left.set(
        xlabel="tokens of the sequence",
        ylabel="KV cache (GiB)",
        ylim=(None, 60 * max(sizes[-1] for sizes in found.cache_bytes.values()) / 2**30),
    )
    left.set_title("bytes of one sequence in bf16", fontsize=11)
    left.legend(fontsize=9, title=f"at {found.lengths[-1]:,} tokens", title_fontsize=9, loc="upper left")
    _plain_ticks(left)
    right.loglog(found.generated, found.uncached_flops, color="tab:red", linestyle="--", label="without the cache")
    right.loglog(found.generated, found.cached_flops, color="tab:blue", label="with the cache")
    ratio = found.uncached_flops[-1] / found.cached_flops[-1]
    right.text(
        0.04,
        0.95,
        f"for {found.generated[-1]:,} tokens without the cache:\n{ratio:,.0f} times the work",
        transform=right.transAxes,
        va="top",
        fontsize=10,
    )
    right.set(xlabel=f"tokens generated, behind a prompt of {found.prompt}", ylabel="FLOPs so far")
    right.set_title("work of generating tokens", fontsize=11)
    right.legend(fontsize=9, loc="lower right")
    _plain_ticks(right)
    figure.suptitle(f"The KV cache of {found.preset}")
    return figure


def _plain_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)


def _size(size: float) -> str:
    for unit, of in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= of:
            return f"{size / of:,.4g} {unit}"
    return f"{size / 2**10:,.4g} KiB"


def explain(options: Options) -> Explanation:
    found = compute(*chosen_preset(options.preset, _PRESET))
    sizes = "; ".join(f"{label}: {_size(by[-1])}" for label, by in found.cache_bytes.items())
    ratio = found.uncached_flops[-1] / found.cached_flops[-1]
    lines = (
        f"One sequence of {found.lengths[-1]:,} tokens of {found.preset}, in bf16: {sizes}. It grows with every token; "
        "fewer KV heads shrink it in proportion.",
        f"Generating {found.generated[-1]:,} tokens takes {found.cached_flops[-1]:.2g} FLOPs with the cache and "
        f"{found.uncached_flops[-1]:.2g} without, {ratio:,.0f} times as many: every step would compute all earlier "
        "tokens anew.",
    )
    return Explanation(found, lines, {"cache": lambda: draw(found)})
