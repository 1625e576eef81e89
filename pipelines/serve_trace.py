"""What `caravan trace` shows of one request. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from cluster.serve.explain import why
from pipelines.serve_status import seconds

SHOWN_SCORES = 16
_UNKNOWN = 1 << 30
"""As many free blocks has a replica that has not reported."""


def summary(record: Mapping[str, Any]) -> list[str]:
    """The request in a few lines."""
    arrived = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["arrived_at"]))
    caller = f" for {record['caller']}" if record["caller"] else ""
    where = f" on {record['replica']}" if record["replica"] else ""
    times = [f"queue {_time(record['queue_s'])}", f"first token {_time(record['first_token_s'])}"]
    if record["inter_token_s"] is not None:
        gap = "" if record["longest_gap_s"] is None else f" (longest gap {seconds(record['longest_gap_s'])})"
        times.append(f"then {seconds(record['inter_token_s'])} a token{gap}")
    times.append(f"end {seconds(record['end_s'])}")
    predicted, cached = record["predicted_cached_tokens"], record["cached_tokens"]
    return [
        f"{record['request_id']}{caller}: {record['outcome']} ({record['status']}){where}",
        f"arrived {arrived} at ingress {record['ingress']}, model {record['model']}",
        ", ".join(times),
        f"prompt {record['prompt_tokens']:,} tokens, cached {predicted:,} predicted and {cached:,} found; "
        f"generated {record['generated_tokens']:,} in {_count(record['steps'], 'step')}, "
        f"{_count(record['preemptions'], 'preemption')}",
    ]


def attempt_line(number: int, attempt: Mapping[str, Any]) -> str:
    """One attempt, and why it went where it went."""
    picked = "" if attempt["pick_s"] is None else f", picked in {1e6 * attempt['pick_s']:.0f} µs"
    where = attempt["replica"] or "nowhere"
    reason = why(dict(attempt))
    return f"attempt {number} after {seconds(attempt['at_s'])}{picked}: {where}, {attempt['outcome']}; {reason}"


def scores(attempt: Mapping[str, Any], width: int) -> Table:
    """What the request would have cost on each replica; the parts of the cost where there is room for them."""
    wide = width >= 110
    made = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="bold")
    columns = ["replica", "cost", "wait", "cached", "missing", "ahead", "context", "active", "free"]
    parts = ["missing_s", "pending_s", "decode_s", "shortage_s"]
    for name in columns + (["= missing", "+ ahead", "+ context", "+ shortage"] if wide else []):
        made.add_column(name, justify="left" if name == "replica" else "right", no_wrap=True)
    for score in attempt["scores"][:SHOWN_SCORES]:
        mark = " ←" if score["replica"] == attempt["replica"] else " (draining)" if score["draining"] else ""
        cells = [
            f"{score['replica']}{mark}",
            seconds(score["cost_s"]),
            seconds(score["wait_s"]),
            f"{score['predicted_cached_tokens']:,}",
            f"{score['missing_tokens']:,}",
            f"{score['pending_prefill_tokens']:,}",
            f"{score['decode_context_tokens']:,}",
            f"{score['active_requests']:,}",
            "?" if score["free_blocks"] >= _UNKNOWN // 2 else f"{score['free_blocks']:,}",
        ]
        made.add_row(*cells, *(seconds(score[part]) for part in parts if wide))
    return made


def _time(value: float | None) -> str:
    return "none" if value is None else seconds(value)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"
