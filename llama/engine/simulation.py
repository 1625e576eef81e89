"""The engine's books in virtual time and without a model: the scheduler, the blocks, the clock, and nothing else.

A step takes as long as `StepCost` says. In the place of keys and values each slot of the cache holds a digest of the
tokens up to its own, of the tenant and of the weights; whatever a step reads is compared with what it ought to be. The
next token is a function of that digest, so an output that was computed from anything else than its own prompt, under
one set of weights, differs from `expected_output`. Everything follows from the arguments: the same ones give the same
steps at the same times.

`python -m llama.engine.simulation --seed 7` runs the random load of one seed (`run_random_load`), and says what
happened or what broke.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from llama.engine.blocks import NO_BLOCK
from llama.engine.config import EngineConfig
from llama.engine.core import EngineCore
from llama.engine.output import EngineFailed
from llama.engine.params import SamplingParams
from llama.engine.request import Chunk, ComputedTokens, FinishReason, Request, Status
from llama.engine.scheduler import QueueFull, ScheduledTokens


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step, linear in what it computes and reads. The defaults are of a 27M model on one CPU core."""

    fixed: float = 3e-3
    per_token: float = 2e-4
    per_key: float = 1e-7
    """For each pair of a token and a key that it attends to."""

    def seconds(self, scheduled: Sequence[ScheduledTokens]) -> float:
        tokens = sum(item.end - item.start for item in scheduled)
        keys = sum((item.end - item.start) * (item.start + item.end) / 2 for item in scheduled)
        return self.fixed + self.per_token * tokens + self.per_key * keys


@dataclass
class Trace:
    """What one completion received, and when (seconds)."""

    prompt: list[int]
    params: SamplingParams
    salt: str
    index: int
    submitted: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each of `tokens` came."""
    weights_id: str | None = None
    """Those in place when the first token came."""
    finish_reason: FinishReason | None = None


class SimulationFailed(AssertionError):
    """The engine's books broke a promise."""


def _digest(before: int, token_id: int) -> int:
    return hash((before, token_id))


def _root(weights_id: str, salt: str) -> int:
    digest = 0
    for text in (weights_id, "\0", salt):
        for byte in text.encode():
            digest = _digest(digest, byte)
    return digest


def expected_output(trace: Trace, vocab_size: int) -> list[int]:
    """The tokens that a completion has to consist of, as many as it received."""
    assert trace.weights_id is not None
    digest = _root(trace.weights_id, trace.salt)
    for token_id in trace.prompt:
        digest = _digest(digest, token_id)
    output: list[int] = []
    for _ in trace.tokens:
        output.append(hash((digest, trace.index)) % vocab_size)
        digest = _digest(digest, output[-1])
    return output


class Simulation:
    """Runs an `EngineCore` in virtual time.

    Args:
        vocab_size: of the tokens that the modelled model generates.
        verify: check what every step reads, and the books after it; linear in the contexts.
    """

    def __init__(self, core: EngineCore, cost: StepCost, *, vocab_size: int = 97, verify: bool = True) -> None:
        self.core = core
        self.now = 0.0
        self.steps = 0
        self.traces: list[Trace] = []
        self.on_step: Callable[[Sequence[ScheduledTokens]], None] | None = None
        self._cost = cost
        self._vocab_size = vocab_size
        self._verify = verify
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = count()
        self._next_weights: str | None = None
        self._slots: list[int | None] = [None] * (core.blocks.num_blocks * core.blocks.block_size)
        self._digests: dict[Request, list[int]] = {}

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Does something at a time, while a step runs if that is so."""
        heapq.heappush(self._events, (time, next(self._ties), action))

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        salt: str = "",
        priority: int = 0,
        timeout_s: float = math.inf,
    ) -> str:
        """Submits a prompt now; returns its id. Raises QueueFull."""
        traces = [Trace(list(prompt), params, salt, index, self.now) for index in range(params.n)]

        def sink(item: Chunk | EngineFailed) -> None:
            assert isinstance(item, Chunk)
            trace = traces[item.index]
            if trace.finish_reason is not None:
                raise SimulationFailed(f"{item.request_id} received something after its end")
            trace.finish_reason = item.finish_reason
            trace.tokens += item.token_ids
            trace.times += [self.now] * len(item.token_ids)
            if trace.tokens and trace.weights_id is None:
                trace.weights_id = self.core.weights_id

        active = self.core.prepare(
            prompt,
            params,
            request_id=request_id,
            salt=salt,
            priority=priority,
            deadline=self.now + timeout_s,
            sink=sink,
        )
        self.core.submit(active)
        self.traces += traces
        return active[0].request.request_id

    def swap(self, weights_id: str) -> None:
        """Asks for other weights, as soon as nothing runs that began with the present ones."""
        self._next_weights = weights_id
        self.core.hold_new()

    def run(self) -> None:
        """Runs until nothing is left to do and no event is to come.

        Raises:
            SimulationFailed, CacheCorrupted: the books are wrong.
        """
        while self._events or self.core.has_work or self._next_weights is not None:
            self._run_events()
            if not self._step() and self._events:
                self.now = max(self.now, self._events[0][0])

    def _run_events(self) -> None:
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()

    def _step(self) -> bool:
        core = self.core
        if self._next_weights is not None and core.may_swap:
            core.swap(self._next_weights)
            self._next_weights = None
            self._digests.clear()
        core.expire(self.now)
        scheduled = core.schedule()
        for source, destination in core.blocks.take_copies():
            self._copy(source, destination)
        if not scheduled:
            return False
        self.steps += 1
        self.now += self._cost.seconds(scheduled)
        tokens = [(self._compute(item), item.samples) for item in scheduled]
        computed = [ComputedTokens(token_id if samples else None) for token_id, samples in tokens]
        self._run_events()  # what comes while the model runs: the books do not know its tokens yet
        core.hand_out(core.commit(scheduled, computed))
        for item in scheduled:
            if item.request.status is Status.FINISHED:
                del self._digests[item.request]
        if self.on_step is not None:
            self.on_step(scheduled)
        if self._verify:
            core.check_integrity()
        return True

    def _copy(self, source: int, destination: int) -> None:
        size = self.core.blocks.block_size
        self._slots[destination * size : (destination + 1) * size] = self._slots[source * size : (source + 1) * size]

    def _compute(self, item: ScheduledTokens) -> int:
        request = item.request
        digests = self._digests.setdefault(request, [])
        while len(digests) < item.end:
            before = digests[-1] if digests else _root(self.core.weights_id, request.salt)
            digests.append(_digest(before, request.token_ids[len(digests)]))
        size, block_ids = self.core.blocks.block_size, request.table.block_ids
        window = self.core.blocks.window
        for position in range(item.start, item.end):
            self._slots[block_ids[position // size] * size + position % size] = digests[position]
        if self._verify:
            for position in range(0 if window is None else max(0, item.start - window + 1), item.end):
                block_id = block_ids[position // size]
                if block_id == NO_BLOCK or self._slots[block_id * size + position % size] != digests[position]:
                    raise SimulationFailed(f"{request.request_id} reads another's token at position {position}")
        return hash((digests[item.end - 1], request.index)) % self._vocab_size


def run_random_load(seed: int, num_prompts: int = 60) -> Counter[str]:
    """Prompts with shared prefixes, aborts, deadlines, swaps and flushes, all by `seed`, on an engine too small for it.

    Returns:
        How often each kind of event came.

    Raises:
        SimulationFailed, CacheCorrupted: the books broke a promise.
    """
    rng = random.Random(seed)
    core = _small_core(rng)
    budget = core.scheduler.max_batched_tokens
    simulation = Simulation(core, StepCost())
    longest = min(core.max_total_tokens - 1, 40)
    families = [[rng.randrange(9) for _ in range(longest)] for _ in range(3)]
    seen: Counter[str] = Counter()
    names: list[str] = []

    def submit() -> None:
        family = rng.choice(families)
        prompt = (family[: rng.randrange(longest)] + [rng.randrange(9) for _ in range(rng.randrange(1, 5))])[:longest]
        params = SamplingParams(max_tokens=rng.randrange(1, 30), n=rng.choice([1, 1, 1, rng.randrange(2, 5)]))
        try:
            names.append(
                simulation.submit(
                    prompt,
                    params,
                    salt=rng.choice(["", "", "tenant"]),
                    priority=rng.choice([0, 0, 0, 1, -1, 5]),
                    timeout_s=rng.choice([math.inf, math.inf, rng.uniform(0.01, 0.5)]),
                )
            )
        except QueueFull:
            seen["refused"] += 1

    def abort() -> None:
        if names:
            core.abort(rng.choice(names))

    def flush() -> None:
        core.blocks.clear(core.scheduler.tables)
        seen["flushes"] += 1

    def watch(scheduled: Sequence[ScheduledTokens]) -> None:
        seen["chunks"] += sum(not item.samples for item in scheduled)
        if sum(item.end - item.start for item in scheduled) > budget:
            raise SimulationFailed("a step exceeds its budget")
        seen["windows"] += sum(request.table.num_trimmed > 0 for request in core.scheduler.running)

    simulation.on_step = watch
    time = 0.0
    for number in range(num_prompts):
        time += rng.expovariate(1 / 0.02)
        simulation.at(time, submit)
        if rng.random() < 0.2:
            simulation.at(time + rng.uniform(0, 0.1), abort)
        if rng.random() < 0.03:
            simulation.at(time, flush)
        if rng.random() < 0.05:
            simulation.at(time, lambda number=number: simulation.swap(f"weights-{number + 1}"))  # type: ignore[misc]
    simulation.run()
    return seen + _outcome(simulation)


def _small_core(rng: random.Random) -> EngineCore:
    """An engine's books with too few of everything."""
    block_size = rng.choice([1, 2, 4, 8])
    config = EngineConfig(
        block_size=block_size,
        max_batched_tokens=rng.choice([1, 2, *range(3, 24)]),
        max_running=rng.randrange(1, 9),
        max_waiting=rng.randrange(4, 40),
    )
    return EngineCore(
        config,
        num_blocks=rng.randrange(48 // block_size, 96 // block_size),
        max_seq_len=rng.randrange(40, 80),
        weights_id="weights-0",
        window=rng.choice([None, None, rng.randrange(1, 12)]),
        half_context=rng.choice([math.inf, 20.0]),
    )


def _outcome(simulation: Simulation) -> Counter[str]:
    """How often each thing happened; raises SimulationFailed unless every request got what it asked for."""
    stats = simulation.core.stats()
    if stats.free_blocks != stats.num_blocks:
        raise SimulationFailed(f"{stats.num_blocks - stats.free_blocks} blocks leaked")
    seen: Counter[str] = Counter()
    for trace in simulation.traces:
        if trace.finish_reason is None:
            raise SimulationFailed("a request never ended")
        if trace.tokens and trace.tokens != expected_output(trace, 97):
            raise SimulationFailed(f"the prompt {trace.prompt} received {trace.tokens}")
        seen[trace.finish_reason] += 1
    seen["hits"] = stats.cached_tokens
    seen["preemptions"] = stats.preemptions
    seen["prefix waits"] = stats.prefix_waits
    seen["copies"] = stats.block_copies
    seen["swaps"] = stats.weight_swaps
    seen["steps"] = simulation.steps
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m llama.engine.simulation", description=run_random_load.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=60)
    options = parser.parse_args()
    seen = run_random_load(options.seed, options.prompts)
    print(f"seed {options.seed}: " + ", ".join(f"{count} {name}" for name, count in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
