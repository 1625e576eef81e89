"""The inference engine beside others: same weights, prompts and lengths, one run, interleaved rounds.

Every contestant is a process of its own on the same cores. The weights are random, written once as a Hugging Face
directory in bf16, which all of them load (llama.cpp by way of GGUF); that they compute the same is checked by the first
greedy token of many prompts before anything is timed.

    prefill:BxC  B prompts of C tokens, new in every round, sent at once: their tokens over the seconds until each has
                 its first token.
    decode:BxC   the same B prompts of C tokens in every round, cached in the first, uncounted one: the tokens of the
                 steps in which all of them decode over the seconds of those steps. No prefill is in it.
    trace        arrivals replayed by the clock, four of five prompts behind a shared system text, the cache empty at
                 the start: throughput, time to first token, time between tokens.

Beside each speed stands its share of two ceilings measured in the same run (llama/bench/ceilings.py).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llama.bench.ceilings import Ceilings, bandwidth_ceiling, gemm_ceiling, measure_ceilings
from llama.bench.engine_report import EngineReport, Row, as_json, as_text, missed
from llama.bench.engine_settings import CHECK, NOT_COMPARABLE, EngineBench, estimated_seconds, usable_cpus
from llama.bench.harness import BenchError, Contestant, Ratio, interleave, ratio
from llama.bench.peers import command_of
from llama.bench.workload import Cell, Latencies, latencies, prompts
from llama.config import ModelConfig
from llama.hf import save_pretrained
from llama.model import Transformer

__all__ = ["EngineBench", "EngineReport", "as_json", "as_text", "measure"]

OURS = "caravan"
_LEAST_AGREEMENT = 0.7
"""Of first greedy tokens. With these weights bf16 turns up to a tenth of them, and rotations of the wrong layout leave
less than a tenth."""
_SHARPER = {"wq": 3.0, "wk": 3.0, "wo": 4.0}
"""Factors on the start weights of attention, which are so small that everybody sees all positions alike: then nine of
ten first tokens are the same under wrong rotations, too."""


def measure(bench: EngineBench, say: Callable[[str], None] = lambda message: None) -> EngineReport:
    """Runs the comparison; `say` gets its progress.

    Raises:
        BenchError: a peer is missing or fails, or does not compute what ours does.
    """
    commands = {OURS: [sys.executable, "-m", "llama.bench.peers.caravan"]}
    commands |= {name: command_of(name, Path(bench.directory)) for name in bench.peer_names}
    with _pinned(bench.threads) as cpus, _exported(bench.config) as weights, ExitStack() as stack:
        ceilings = measure_ceilings(bench.config)
        say(f"about {estimated_seconds(bench, ceilings) / 60:.0f} minutes")
        settings = json.dumps(bench.contestant_settings(weights, cpus))
        environment = {
            "OMP_NUM_THREADS": str(bench.threads),
            "MKL_NUM_THREADS": str(bench.threads),
            "VLLM_CACHE_ROOT": str(Path(weights, "vllm")),
        }
        contestants = {
            name: stack.enter_context(Contestant(name, [settings], program=command, environment=environment))
            for name, command in commands.items()
        }
        about = {name: f"{one.ready['version']} {one.ready['settings']}".strip() for name, one in contestants.items()}
        first = {
            name: contestants[name].turn(_task(bench, CHECK, 0))["tokens"]  # one after the other: the core is shared
            for name in contestants
        }
        agreement = _check_same(first)
        rows: list[Row] = []
        for cell in bench.cell_list:
            say(f"{cell}")
            rows += _measure_cell(bench, cell, contestants, ceilings)
    return EngineReport(
        bench, bench.config.num_parameters(), ceilings, about, agreement, rows, missed(rows, bench.requirements)
    )


def _check_same(first: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Each peer's share of first tokens that are ours.

    Raises:
        BenchError: too few are.
    """
    ours = first[OURS]
    agreement = {
        name: sum(own == other for own, other in zip(ours, tokens, strict=True)) / len(ours)
        for name, tokens in first.items()
        if name != OURS
    }
    for name, share in agreement.items():
        if share < _LEAST_AGREEMENT:
            raise BenchError(f"{name} and {OURS} agree in {share:.0%} of first tokens: not the same model")
    return agreement


def _task(bench: EngineBench, cell: Cell, turn: int) -> str:
    if cell.kind == "trace":
        return json.dumps({"kind": "trace", "requests": [asdict(request) for request in bench.trace]})
    vocab_size = bench.config.vocab_size
    if cell.kind == "prefill":
        return json.dumps({"kind": "prefill", "prompts": prompts(cell, vocab_size, turn)})
    return json.dumps({"kind": "decode", "prompts": prompts(cell, vocab_size), "generate": bench.generate})


def _measure_cell(
    bench: EngineBench, cell: Cell, contestants: Mapping[str, Contestant], ceilings: Ceilings
) -> list[Row]:
    absent = {name: NOT_COMPARABLE[name, cell.kind] for name in contestants if (name, cell.kind) in NOT_COMPARABLE}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants if name not in absent}

    def turn(name: str) -> None:
        answers[name].append(contestants[name].turn(_task(bench, cell, len(answers[name]))))

    interleave({name: partial(turn, name) for name in answers}, bench.rounds)
    counted = {name: own[1:] for name, own in answers.items()}
    rows = _trace_rows(bench, cell, counted) if cell.kind == "trace" else _rate_rows(bench, cell, counted, ceilings)
    return rows + [Row(str(cell), name, None, note=f"n/a: {reason}") for name, reason in absent.items()]


def _rate_rows(
    bench: EngineBench, cell: Cell, counted: Mapping[str, list[dict[str, Any]]], ceilings: Ceilings
) -> list[Row]:
    for name, own in counted.items():
        if not all(answer["seconds"] for answer in own):
            raise BenchError(f"{name} does not decode {cell.batch} sequences of {cell.context} tokens together: {cell}")
    prefilled = cell.batch * cell.context
    per_token = {
        name: [answer["seconds"] / answer.get("generated", prefilled) for answer in own]
        for name, own in counted.items()
    }
    gemm = gemm_ceiling(bench.config, cell, bench.generate, ceilings.gflops)
    bandwidth = None
    if cell.kind == "decode":
        bandwidth = bandwidth_ceiling(bench.config, cell, bench.generate, ceilings.read_gbps)
    rows = []
    for name, seconds in per_token.items():
        rate = 1 / median(seconds)
        ours = None if name == OURS else ratio(per_token[OURS], seconds)
        share = rate / bandwidth if bandwidth else None
        note = counted[name][-1].get("settings", "")
        rows.append(Row(str(cell), name, rate, share, rate / gemm, ours, note=note))
    return rows


def _trace_rows(bench: EngineBench, cell: Cell, counted: Mapping[str, list[dict[str, Any]]]) -> list[Row]:
    trace = bench.trace
    rounds = {name: [latencies(trace, [answer["times"]]) for answer in own] for name, own in counted.items()}

    def versus(name: str, of: Callable[[Latencies], float]) -> Ratio | None:
        return None if name == OURS else ratio([of(one) for one in rounds[OURS]], [of(one) for one in rounds[name]])

    rows = []
    for name, own in counted.items():
        together = latencies(trace, [answer["times"] for answer in own])
        rows.append(
            Row(
                str(cell),
                name,
                together.tokens_per_second,
                ours=versus(name, lambda one: 1 / one.tokens_per_second),
                latencies=together,
                ours_first_token=versus(name, lambda one: one.first_token_p50),
                ours_gap=versus(name, lambda one: one.gap_p50),
            )
        )
    return rows


@contextmanager
def _exported(config: ModelConfig) -> Iterator[str]:
    """A directory with the weights, in bf16."""
    model = Transformer(config)
    model.init_weights(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(_SHARPER.get(name.removesuffix(".weight").rpartition(".")[2], 1.0))
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(model, directory, dtype=torch.bfloat16)
        del model
        yield directory


@contextmanager
def _pinned(threads: int) -> Iterator[list[int]]:
    """Keeps this thread, and the processes it starts, on as many CPUs as they have threads: vLLM pins itself, so that
    whoever is free to move would have an advantage."""
    before, torch_threads = usable_cpus(), torch.get_num_threads()
    cpus = before[-threads:]
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    try:
        yield cpus
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, before)
        torch.set_num_threads(torch_threads)
