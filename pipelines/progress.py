"""A run on the screen: a live line per stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from llama.hf_caravan import CARAVAN_NAME
from pipelines.report import RunSummary
from pipelines.runs import INTERRUPTED
from pipelines.stage import Event

PLAIN_INTERVAL_SECONDS = 5.0


class RunDisplay:
    """Shows a graph's events; call it with each. A context manager.

    On a terminal every running stage has a bar, and finished stages stay as lines above them. Elsewhere a stage's
    progress is printed at most every `PLAIN_INTERVAL_SECONDS`, so that a log stays readable, and how far it came at its
    end.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: dict[str, _Running] = {}
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.fields[stage]:<10}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, event: Event) -> None:
        if event.kind == "progress":
            self._show_progress(event)
            return
        self._end(event.stage)
        if event.kind == "running":
            self._running[event.stage] = _Running()
            if self._progress:
                self._running[event.stage].bar = self._progress.add_task("", stage=event.stage, total=1.0)
            else:
                self._print(event.stage, "started")
        elif event.kind == "done":
            self._print(event.stage, f"[green]done[/] in {event.seconds:.1f} s")
        elif event.kind == "skipped":
            self._print(event.stage, f"[dim]skipped, {escape(event.message)}[/]")
        elif event.message == INTERRUPTED:
            self._print(event.stage, f"[red]{INTERRUPTED}[/]")
        else:
            see = f", see {escape(event.traceback)}" if event.traceback else ""
            self._print(event.stage, f"[red]failed[/]{see}")

    def _end(self, stage: str) -> None:
        """The stage's bar goes; what it said last stays."""
        running = self._running.pop(stage, None)
        if running is None:
            return
        if self._progress and running.bar is not None:
            self._progress.remove_task(running.bar)
        self._print_held_back(stage, running)

    def _show_progress(self, event: Event) -> None:
        running = self._running.get(event.stage)
        if running is None or event.fraction is None:  # news rather than a number: worth keeping
            if running is not None:
                self._print_held_back(event.stage, running)
                self._describe(running, event)
            self._print(event.stage, escape(event.message))
        elif self._progress:
            self._describe(running, event)
        elif time.monotonic() - running.last_number >= PLAIN_INTERVAL_SECONDS:
            self._print_number(event.stage, running, event.message)
        else:
            running.held_back = event.message

    def _describe(self, running: _Running, event: Event) -> None:
        if self._progress and running.bar is not None:
            self._progress.update(running.bar, description=event.message, completed=event.fraction)

    def _print_held_back(self, stage: str, running: _Running) -> None:
        if running.held_back:
            self._print_number(stage, running, running.held_back)

    def _print_number(self, stage: str, running: _Running, message: str) -> None:
        running.last_number, running.held_back = time.monotonic(), ""
        self._print(stage, escape(message))

    def _print(self, stage: str, message: str) -> None:
        """Prints a line; `message` is rich markup, so what comes from elsewhere must be escaped."""
        self._console.print(f"[bold]{stage:<10}[/] {message}", highlight=False, soft_wrap=True)


@dataclass
class _Running:
    """A stage that runs: its bar, when its last number was printed, and what was not printed since."""

    bar: TaskID | None = None
    last_number: float = float("-inf")
    held_back: str = ""


def print_summary(console: Console, summary: RunSummary) -> None:
    """The run's figures, a line each; what was not part of it is left out. Paths stay in one piece, to be copied."""
    for name, value in _rows(summary):
        console.print(f"[bold]{name:<14}[/] {escape(value)}", highlight=False, soft_wrap=True)


def _rows(summary: RunSummary) -> list[tuple[str, str]]:
    rows = [("run", summary.run_id), ("time", f"{summary.seconds:.0f} s")]
    if summary.data:
        rows.append(("data", summary.data))
    if summary.quarantine:
        rows.append(("quarantine", summary.quarantine))
    if summary.tokens_per_second is not None:
        resumed = f", resumed from step {summary.resumed_step}" if summary.resumed_step else ""
        validation = "" if summary.val_loss is None else f", validation loss {summary.val_loss:.3f}"
        speed = f"{summary.tokens:,} tokens, {summary.tokens_per_second:,.0f} tokens/s"
        rows.append(("training", f"{speed}{validation}{resumed}"))
        rows.append(("parameters", f"{summary.parameters:,}"))
    if summary.bits_per_byte is not None and summary.unigram_bits_per_byte is not None:
        share = summary.bits_per_byte / summary.unigram_bits_per_byte
        rows.append(("held out", f"loss {summary.loss:.3f}, perplexity {summary.perplexity:.1f}"))
        rows.append(
            (
                "bits per byte",
                f"{summary.bits_per_byte:.3f}, {share:.0%} of the unigram's {summary.unigram_bits_per_byte:.3f}"
                f" (zstd -19: {summary.zstd_bits_per_byte:.3f})",
            )
        )
    if summary.exact_match is not None:
        exact, tokens = (
            f"{summary.exact_match:.2%} of the targets whole",
            f"{summary.token_accuracy:.2%} of their tokens",
        )
        rows.append(("held out", f"{exact}, {tokens}"))
    rows += [("sample", f"{_quoted(sample['prompt'])} → {_quoted(sample['text'])}") for sample in summary.samples]
    if summary.requests:
        rows.append(
            (
                "cached tokens",
                f"{summary.predicted_cached_tokens} predicted, {summary.cached_tokens} actual, "
                f"{summary.requests} requests",
            )
        )
    rows += [("plot", path) for path in summary.plots]
    if summary.model:
        rows.append(("model", summary.model))
    if summary.architecture:
        hint = " (transformers knows it after `import llama.hf_model`)" if summary.architecture == CARAVAN_NAME else ""
        rows.append(("architecture", summary.architecture + hint))
    if summary.url:
        rows.append(("endpoint", f"{summary.url}/v1"))
    return rows


def _quoted(text: str) -> str:
    """A text on one line, of at most 60 characters."""
    return json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False)
