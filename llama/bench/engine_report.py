"""What `python -m llama.bench engine` found: a row for each contestant and cell, as text and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llama.bench.ceilings import Ceilings
from llama.bench.engine_settings import EngineBench
from llama.bench.harness import Ratio
from llama.bench.workload import Latencies


@dataclass(frozen=True)
class Row:
    """One contestant in one cell."""

    cell: str
    name: str
    tokens_per_second: float | None
    """Prompt tokens of prefill, else generated ones; the median over the rounds. None: not comparable."""
    bandwidth_share: float | None = None
    """Of the rate at which reading weights and cache would take all the time; decode only."""
    gemm_share: float | None = None
    """Of the rate at which arithmetic would; prefill and decode."""
    ours: Ratio | None = None
    """Our speed over this peer's."""
    latencies: Latencies | None = None
    """Of the trace, all rounds together."""
    ours_first_token: Ratio | None = None
    """This peer's median time to first token over ours, round by round; so is the next, between tokens."""
    ours_gap: Ratio | None = None
    note: str = ""
    """How the contestant was set for this cell, or why it is not in it."""


@dataclass(frozen=True)
class EngineReport:
    bench: EngineBench
    parameters: int
    ceilings: Ceilings
    settings: dict[str, str]
    """Version and settings by contestant."""
    agreement: dict[str, float]
    """Share of first tokens that are ours, by peer."""
    rows: list[Row]
    missed: list[str]
    """Cells below what `require` asks for."""


def missed(rows: Sequence[Row], requirements: Mapping[str, float]) -> list[str]:
    """The decode cells in which the speed over a peer is less than required."""
    return [
        f"{row.cell} is {row.ours.median:.2f}× {row.name}, less than {least}×"
        for row in rows
        if row.ours is not None
        and row.cell.startswith("decode")
        and row.ours.median < (least := requirements.get(row.name, 0.0))
    ]


def as_text(report: EngineReport) -> str:
    """The tables for a terminal."""
    bench, ceilings = report.bench, report.ceilings
    lines = [
        f"{bench.model}, {report.parameters / 1e6:.0f}M parameters, bf16, {bench.threads} thread(s), {bench.rounds} "
        f"rounds; ceilings: read {ceilings.read_gbps:.1f} GB/s, GEMM {ceilings.bf16_gflops:.0f} GFLOP/s in bf16, "
        f"{ceilings.fp32_gflops:.0f} in fp32",
    ]
    for name, settings in report.settings.items():
        agrees = f"; {report.agreement[name]:.0%} of first tokens ours" if name in report.agreement else ""
        lines.append(f"{name}: {settings}{agrees}")
    lines.append(f"\n{'':18}{'':10}{'tokens/s':>10}{'of read':>9}{'of GEMM':>9}   our speed over it")
    for row in report.rows:
        ours = "" if row.ours is None else str(row.ours)
        rate = "n/a" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"
        shares = "".join(
            f"{'' if share is None else f'{share:.0%}':>9}" for share in (row.bandwidth_share, row.gemm_share)
        )
        note = row.note.removeprefix("n/a: ")
        lines.append(f"{row.cell:18}{row.name:10}{rate:>10}{shares}   {ours}{f'  [{note}]' if note else ''}".rstrip())
    timed = [row for row in report.rows if row.latencies is not None]
    if timed:
        lines.append(
            f"\n{'trace, ms':18}{'':10}{'first token p50':>16}{'p99':>8}{'gap p50':>9}{'p99':>8}   ours sooner"
        )
    for row in timed:
        assert row.latencies is not None
        one = row.latencies
        times = (one.first_token_p50, one.first_token_p99, one.gap_p50, one.gap_p99)
        figures = "".join(f"{1e3 * value:{width}.1f}" for value, width in zip(times, (16, 8, 9, 8), strict=True))
        ours = f"first token {row.ours_first_token}, gap {row.ours_gap}" if row.ours_gap else ""
        lines.append(f"{'':18}{row.name:10}{figures}   {ours}".rstrip())
    return "\n".join(lines + [f"missed: {line}" for line in report.missed])


def as_json(report: EngineReport) -> dict[str, Any]:
    """Plain data, verdicts included."""
    data = asdict(report)
    for row, plain in zip(report.rows, data["rows"], strict=True):
        for key in ("ours", "ours_first_token", "ours_gap"):
            if plain[key] is not None:
                plain[key]["verdict"] = getattr(row, key).verdict
    return data
