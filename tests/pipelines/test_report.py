"""Summaries and pictures of a run."""

import io
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from pipelines.progress import RunDisplay, print_summary
from pipelines.report import RunSummary, draw_expert_load, draw_learning_rate, draw_loss, draw_throughput
from pipelines.runs import one_line
from pipelines.stage import Event
from tests.pipelines.reports import report

EVALUATION = {"loss": 2.0, "bits_per_byte": 1.0, "unigram_bits_per_byte": 1.5}


def curve(moe: bool) -> list[dict]:
    load = {0: [0.7, 0.1, 0.1, 0.1], 2: [0.25] * 4} if moe else {}
    return [asdict(report(step, loss=5.0 / step, expert_load=load)) for step in (1, 10, 20)]


def test_the_loss_picture_shows_the_curve_and_both_held_out_lines() -> None:
    axes = draw_loss(curve(moe=False), EVALUATION).axes[0]
    training, held_out, unigram = axes.lines
    assert training.get_xydata().tolist() == [[64, 5.0], [640, 0.5], [1280, 0.25]]
    assert list(held_out.get_ydata()) == [2.0, 2.0]
    assert list(unigram.get_ydata()) == [3.0, 3.0]  # 1.5 bits per byte, at the model's 2 nats per bit per byte
    assert len(draw_loss(curve(moe=False), {}).axes[0].lines) == 1


def test_the_loss_picture_has_the_validations_at_their_steps() -> None:
    steps = curve(moe=False)
    steps[1]["val_loss"], steps[2]["val_loss"] = 2.5, 1.5
    assert draw_loss(steps, {}).axes[0].lines[1].get_xydata().tolist() == [[640, 2.5], [1280, 1.5]]


def test_the_pictures_of_rate_and_speed_leave_gaps_and_take_what_is_unknown() -> None:
    steps = curve(moe=False)
    steps[1]["grad_norm"] = None
    upper, lower = draw_learning_rate(steps).axes
    assert upper.lines[0].get_xydata().tolist() == [[1, 1e-3], [10, 1e-3], [20, 1e-3]]
    assert [math.isnan(value) for value in lower.lines[0].get_ydata()] == [False, True, False]
    axes = draw_throughput(steps).axes[0]
    assert list(axes.lines[0].get_ydata()) == [1000.0] * 3
    (share,) = axes.child_axes  # 1,000 tokens/s are an MFU of 25%
    assert share.get_ylabel() == "MFU (%)" and share._functions[0](2000) == 50
    for step in steps:
        step["mfu"] = None
    assert not draw_throughput(steps).axes[0].child_axes


def test_the_expert_picture_has_a_strip_for_each_layer(tmp_path: Path) -> None:
    figure = draw_expert_load(curve(moe=True))
    strips = [axes for axes in figure.axes if axes.get_ylabel().startswith("layer")]
    assert [axes.get_ylabel() for axes in strips] == ["layer 0", "layer 2"]
    np.testing.assert_allclose(strips[0].collections[0].get_array(), [[2.8] * 3, *[[0.4] * 3] * 3])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    assert imread(buffer).std() > 0.05  # something is drawn


def test_a_long_run_of_many_experts_is_a_picture_of_bearable_size() -> None:
    load = {layer: [1 / 64] * 64 for layer in range(24)}
    figure = draw_expert_load([asdict(report(step, expert_load=load)) for step in range(1, 901)])
    assert figure.get_size_inches()[1] < 25
    mesh = figure.axes[0].collections[0]
    assert mesh.get_array().shape[1] <= 500
    assert mesh.get_coordinates()[0, -1, 0] == 900


def text_of(summary: RunSummary) -> str:
    stream = io.StringIO()
    print_summary(Console(file=stream, width=60), summary)
    return stream.getvalue()


def test_the_summary_of_an_encoder_decoder_has_its_figures() -> None:
    text = text_of(RunSummary(run_id="r1", seconds=1.0, stages={}, exact_match=0.9925, token_accuracy=0.999))
    assert "held out       99.25% of the targets whole, 99.90% of their tokens" in " ".join(text.splitlines())
    assert "held out" not in text_of(RunSummary(run_id="r1", seconds=1.0, stages={}))


def test_the_summary_prints_what_there_is_and_keeps_paths_whole() -> None:
    path = "/a/long/path/" + "x" * 100
    full = RunSummary(
        run_id="r1",
        seconds=61.2,
        stages={},
        data="12 documents → 9 kept; dropped: 3 [language]",
        quarantine="/a/folder",
        parameters=1234,
        tokens=2048,
        tokens_per_second=512.3,
        val_loss=2.125,
        resumed_step=20,
        loss=2.0,
        perplexity=7.39,
        bits_per_byte=1.0,
        unigram_bits_per_byte=1.5,
        zstd_bits_per_byte=1.25,
        samples=({"prompt": "def [red]", "text": "x\n" * 100},),
        requests=3,
        predicted_cached_tokens=48,
        cached_tokens=48,
        plots=(path,),
    )
    text = text_of(full)
    assert "12 documents → 9 kept; dropped: 3 [language]" in text
    assert "1.000, 67% of the unigram's 1.500 (zstd -19: 1.250)" in text
    assert "quarantine     /a/folder\n" in text
    assert "2,048 tokens, 512 tokens/s, validation loss 2.125, resumed from step 20" in text
    assert "48 predicted, 48 actual" in text
    assert path in text
    assert '"def [red]" → "x\\nx\\n' in text
    bare = text_of(RunSummary(run_id="r2", seconds=1, stages={}))
    assert bare.split() == ["run", "r2", "time", "1", "s"]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_shows_every_state_of_a_stage(terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100)
    with RunDisplay(console) as display:
        display(Event("ingest", "skipped", "committed already"))
        display(Event("pretrain", "running"))
        display(Event("pretrain", "progress", "worker was lost: [/__w/pair.cc:537] [red]; resumed from step 40"))
        display(Event("pretrain", "progress", "step 10/20  [/loss] 3.1", fraction=0.5))
        display(Event("pretrain", "done", seconds=2.5))
        display(Event("export", "running"))
        display(Event("export", "failed", "no such dtype", traceback="file:///runs/r1/errors/export.txt"))
        display(Event("deploy", "running"))
        display(Event("deploy", "failed", "the disk is full"))
    shown = stream.getvalue()
    for words in (
        "committed already",
        "[/__w/pair.cc:537] [red]; resumed from step 40",
        "in 2.5 s",
        "failed, see file:///runs/r1/errors/export.txt",
    ):
        assert words in plain(shown), shown
    assert "errors/deploy.txt" not in shown
    if not terminal:
        assert shown.count("step 10/20") == 1


def plain(shown: str) -> str:
    return re.sub("\x1b\\[[0-9;]*m", "", shown)


def plain_lines(events: list[Event]) -> list[str]:
    stream = io.StringIO()
    with RunDisplay(Console(file=stream, width=100)) as display:
        for event in events:
            display(event)
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_a_log_has_the_first_and_the_last_number_of_a_stage_once() -> None:
    numbers = [Event("shards", "progress", f"wrote {n} of 9", fraction=min(1.0, n / 8)) for n in range(1, 10)]
    news = Event("shards", "progress", "two were refused")
    events = [Event("shards", "running"), *numbers, news, Event("shards", "done", seconds=1.0)]
    events += [Event("pretrain", "running"), Event("pretrain", "progress", "step 1", fraction=0.1)]
    assert plain_lines(events) == [
        "shards started",
        "shards wrote 1 of 9",
        "shards wrote 9 of 9",
        "shards two were refused",
        "shards done in 1.0 s",
        "pretrain started",
        "pretrain step 1",
    ]


def test_an_interrupted_stage_has_not_failed() -> None:
    stop = Event("dedup", "failed", one_line(KeyboardInterrupt()))
    assert plain_lines([Event("dedup", "running"), stop]) == ["dedup started", "dedup interrupted"]
