"""Whatever happens around a request, its greedy output is that of the plain model, which caches nothing."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from llama import Transformer
from llama.engine import Engine, EngineConfig, QueueFull, SamplingParams
from tests.llama.engine.models import DENSE, MOE, VOCAB_SIZE, plain_greedy, random_model
from tests.llama.engine.test_blocks import Replica


@dataclass
class Asked:
    prompt: list[int]
    params: SamplingParams
    weights: int | None = None
    """Which weights were in place when its first token came."""
    outputs: list[list[int]] = field(init=False)
    reasons: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outputs = [[] for _ in range(self.params.n)]


@torch.inference_mode()
def is_greedy(model: Transformer, prompt: Sequence[int], output: Sequence[int]) -> bool:
    """Whether the plain model prefers each token of `output` after those before it: what it would generate itself.

    Two tokens that fp32 cannot tell apart are as good as each other: a pass over another number of tokens rounds
    otherwise, by up to 5e-6 here.
    """
    logits_LV = model(torch.tensor([[*prompt, *output]]))[0][len(prompt) - 1 : -1]
    chosen_L = logits_LV.gather(1, torch.tensor(output)[:, None])[:, 0]
    return bool((logits_LV.amax(dim=-1) - chosen_L <= 1e-5).all())


def drive(engine: Engine, clock: list[float], weights: list[dict[str, torch.Tensor]], seed: int, operations: int):
    """`operations` random submits, aborts, deadlines and swaps on an engine too small for them."""
    rng = random.Random(seed)
    families = [[rng.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(4)]
    fresh = families[0][:8]
    asked: dict[str, Asked] = {}
    seen: Counter[str] = Counter()
    schedule = engine._core.scheduler.schedule

    def recording_schedule():
        scheduled = schedule()
        lengths = [item.end - item.start for item in scheduled]
        seen["chunks"] += sum(not item.samples for item in scheduled)
        seen["mixed"] += bool(lengths) and 1 in lengths and max(lengths) > 1
        return scheduled

    engine._core.scheduler.schedule = recording_schedule  # type: ignore[method-assign]
    replica = Replica()
    current, done, swap = 0, 0, None
    unfinished: set[str] = set()
    while done < operations or engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 3]) if done < operations else 0):
            done += 1
            action = rng.random()
            if action < 0.7:
                if action < 0.6:
                    prompt = rng.choice(families)[: rng.randrange(1, 40)]
                    prompt += [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(8))]
                else:  # side by side with another that nobody has computed yet
                    prompt = fresh + [rng.randrange(VOCAB_SIZE)]
                    fresh = fresh if rng.random() < 0.7 else [rng.randrange(VOCAB_SIZE) for _ in range(8)]
                params = SamplingParams(
                    temperature=0, max_tokens=rng.randrange(1, 30), n=3 if rng.random() < 0.1 else 1
                )
                try:
                    name = engine.add_request(
                        prompt,
                        params,
                        salt=rng.choice(["", "", "tenant"]),
                        priority=rng.choice([0, 0, 0, 1]),
                        timeout_s=rng.choice([None, None, None, rng.uniform(1, 60)]),
                    )
                except QueueFull:
                    seen["refused"] += 1
                    continue
                asked[name] = Asked(prompt, params)
                unfinished.add(name)
            elif action < 0.97 and unfinished:
                engine.abort(rng.choice(sorted(unfinished)))
            elif swap is None:
                current = (current + 1) % len(weights)
                swap = engine.load_weights(weights[current], weights_id=f"{current}-{done}")
        clock[0] += 1.0
        for chunk in engine.step():
            request = asked[chunk.request_id]
            if chunk.token_ids and request.weights is None:
                # A swap that waits has not been done while a request runs.
                waits = swap is not None and not swap.done()
                request.weights = (current - 1) % len(weights) if waits else current
            request.outputs[chunk.index] += chunk.token_ids
            seen["hits"] += len(request.outputs[chunk.index]) == 1 and chunk.num_cached_tokens > 0
            if chunk.finish_reason is not None:
                request.reasons[chunk.index] = chunk.finish_reason
                seen[chunk.finish_reason] += 1
                seen["aborted after output"] += chunk.finish_reason == "abort" and bool(request.outputs[chunk.index])
                if len(request.reasons) == request.params.n:
                    unfinished.discard(chunk.request_id)
        if swap is not None and swap.done():
            swap.result()
            swap = None
        replica.apply(engine.drain_events())
        snapshot = engine.snapshot()
        assert (replica.seq, replica.hashes) == (snapshot.seq, set(snapshot.hashes))
        engine.check_integrity()
    stats = engine.stats()
    seen.update(
        preemptions=stats.preemptions,
        prefix_waits=stats.prefix_waits,
        block_copies=stats.block_copies,
        weight_swaps=stats.weight_swaps,
    )
    assert stats.free_blocks == stats.num_blocks and stats.running == stats.waiting == 0
    return asked, seen


@pytest.mark.parametrize(("config", "operations"), [(DENSE, 2000), (MOE, 800)], ids=["dense", "moe"])
def test_greedy_output_is_exact_under_every_schedule(config, operations):
    """In fp32; of the dense model over 500 requests. A tiny cache and budget force every event: each is counted."""
    weights = [random_model(config, seed=seed).state_dict() for seed in range(2)]
    clock = [0.0]
    engine = Engine(
        random_model(config),
        config=EngineConfig(num_blocks=28, block_size=4, max_batched_tokens=14, max_running=6, max_waiting=12),
        clock=lambda: clock[0],
    )
    asked, seen = drive(engine, clock, weights, seed=11, operations=operations)
    events = "chunks mixed hits preemptions prefix_waits block_copies weight_swaps abort timeout length refused"
    for event in (*events.split(), "aborted after output"):
        assert seen[event] > 0, seen
    assert len(asked) > operations / 4
    plain = [random_model(config, seed=seed) for seed in range(2)]
    outputs, ties = set(), 0
    for number, request in enumerate(asked.values()):
        for index, output in enumerate(request.outputs):
            if output:
                assert request.weights is not None
                model = plain[request.weights]
                assert is_greedy(model, request.prompt, output)
                if number % 25 == 0:
                    ties += output != plain_greedy(model, request.prompt, len(output))
            if request.reasons[index] == "length":
                assert len(output) == request.params.max_tokens
            outputs.add(tuple(output[:3]))
    assert ties <= 1
    assert len(outputs) > len(asked) / 5, "the model is too dull to test anything"
