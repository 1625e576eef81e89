"""What `python -m llama.bench engine` measures, and how long that takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama.bench.ceilings import Ceilings, bandwidth_ceiling, gemm_ceiling
from llama.bench.harness import MIN_ROUNDS, BenchError
from llama.bench.peers import DIRECTORY, PEERS
from llama.bench.peers.driver import STAGGER
from llama.bench.workload import LONGEST_REQUEST, Cell, TraceRequest, make_trace, parse_cells
from llama.config import ModelConfig
from llama.presets import PRESETS, preset

MODELS: dict[str, ModelConfig] = {
    "27m": PRESETS["small"],
    "210m": preset("small", dim=1024, num_layers=16, hidden_dim=3200),
    **PRESETS,
}
_RATES = {"27m": 2.0, "210m": 0.3}
NOT_COMPARABLE = {("llamacpp", "trace"): "llama-cpp-python has no scheduler of requests; llama-server is not in it"}
CHECK = Cell("prefill", 32, 32)
"""Whose first tokens tell whether all compute the same."""


@dataclass(frozen=True)
class EngineBench:
    """What is measured.

    Raises:
        BenchError: a setting is out of range; names field, value and remedy.
    """

    model: str = "27m"
    """27m, 210m or the name of a preset."""
    peers: str = ""
    """Any of hf, llamacpp, vllm, with commas."""
    cells: str = ""
    """Such as decode:8x1024,prefill,trace; nothing means all."""
    rounds: int = MIN_ROUNDS
    generate: int = 32
    """Steps of a decode cell."""
    threads: int = 1
    requests: int = 32
    """Of the trace."""
    rate: float = 0.0
    """Its arrivals a second; 0 takes what suits the model on one thread."""
    directory: str = str(DIRECTORY)
    """Of the peers' environments."""
    require: str = ""
    """Least speed over a peer in every decode cell, such as hf=1.5,vllm=1; less ends with exit code 1."""

    def __post_init__(self) -> None:
        for name in ("rounds", "generate", "threads", "requests"):
            if getattr(self, name) < (least := MIN_ROUNDS if name == "rounds" else 1):
                raise BenchError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.model not in MODELS:
            raise BenchError(f"model={self.model!r} is not one of {', '.join(MODELS)}")
        if not 0 <= self.rate < float("inf"):
            raise BenchError(f"rate={self.rate} is not a rate; give arrivals a second")
        for peer in self.peer_names:
            if peer not in PEERS:
                raise BenchError(f"peers={peer!r} is not one of {', '.join(PEERS)}")
        for peer in self.requirements:
            if peer not in self.peer_names:
                raise BenchError(f"require={peer!r} is not among peers={self.peers!r}; add it there")
        if self.requirements and not any(cell.kind == "decode" for cell in self.cell_list):
            raise BenchError(f"require={self.require!r} holds decode cells to it, and cells={self.cells!r} has none")
        if self.longest > self.config.max_seq_len:
            raise BenchError(
                f"cells={self.cells!r} take {self.longest} tokens and {self.model} has {self.config.max_seq_len}; "
                "choose shorter ones"
            )
        if self.threads > (there := len(usable_cpus())):
            raise BenchError(f"threads={self.threads} is more than the {there} CPUs that may be used")

    @property
    def config(self) -> ModelConfig:
        return MODELS[self.model]

    @property
    def peer_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.strip() for part in self.peers.split(",") if part.strip()))

    @property
    def cell_list(self) -> tuple[Cell, ...]:
        return parse_cells(self.cells)

    @property
    def requirements(self) -> dict[str, float]:
        found = {}
        for part in filter(None, self.require.split(",")):
            peer, _, least = part.partition("=")
            try:
                found[peer.strip()] = float(least)
            except ValueError:
                raise BenchError(f"require={part!r} is not a peer and a number such as hf=1.5") from None
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._length(cell) for cell in self.cell_list)

    def _length(self, cell: Cell) -> int:
        return LONGEST_REQUEST if cell.kind == "trace" else cell.context + self.generate + STAGGER

    @property
    def trace(self) -> list[TraceRequest]:
        return make_trace(self.requests, self.rate or _RATES.get(self.model, 2.0), self.config.vocab_size)

    def contestant_settings(self, weights: str, cpus: Sequence[int]) -> dict[str, Any]:
        """What a contestant's process is told; the cache holds the largest cell twice."""
        batch = max(CHECK.batch, *(cell.batch for cell in self.cell_list))
        cache_tokens = 2 * max(max(cell.batch, CHECK.batch) * (self._length(cell) + 128) for cell in self.cell_list)
        return {
            "directory": weights,
            "threads": self.threads,
            "cpus": list(cpus),
            "max_len": self.config.max_seq_len,
            "batch": batch,
            "cache_tokens": cache_tokens,
            "cache_bytes": cache_tokens * self.config.kv_bytes_per_token(),
        }


def estimated_seconds(bench: EngineBench, ceilings: Ceilings) -> float:
    """Of the whole run, if everybody works at a third of the lower ceiling; a peer's trials and start-up included."""
    seconds = 5.0 + sum({"vllm": 90.0}.get(name, 10.0) for name in bench.peer_names)
    for cell in bench.cell_list:
        contestants = 1 + sum((name, cell.kind) not in NOT_COMPARABLE for name in bench.peer_names)
        turns = contestants * (bench.rounds + 1)
        if cell.kind == "trace":
            seconds += turns * (bench.trace[-1].at + 1)
            continue
        filled = 3 * cell.batch * cell.context
        prefill = filled / gemm_ceiling(bench.config, Cell("prefill", cell.batch, cell.context), 0, ceilings.gflops)
        if cell.kind == "prefill":
            seconds += prefill * (turns + 3 * len(bench.peer_names))
            continue
        rates = (
            bandwidth_ceiling(bench.config, cell, bench.generate, ceilings.read_gbps),
            gemm_ceiling(bench.config, cell, bench.generate, ceilings.gflops),
        )
        steps = 3 * cell.batch * (bench.generate + STAGGER) / min(rates)
        seconds += (turns + 3 * len(bench.peer_names)) * steps + (1 + 2 * len(bench.peer_names)) * prefill
    return seconds


def usable_cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
