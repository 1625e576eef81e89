from collections import Counter

import pytest

from llama.engine.blocks import BlockManager, CacheCorrupted
from llama.engine.config import EngineConfig
from llama.engine.core import EngineCore
from llama.engine.params import SamplingParams
from llama.engine.simulation import Simulation, SimulationFailed, StepCost, run_random_load


def make(num_blocks=64, block_size=4, window=None, **settings) -> Simulation:
    config = EngineConfig(block_size=block_size, **settings)
    return Simulation(EngineCore(config, num_blocks=num_blocks, max_seq_len=1000, window=window), StepCost())


def test_random_loads_keep_every_promise():
    seen = sum((run_random_load(seed) for seed in range(60)), Counter())
    for event in [
        "abort",
        "timeout",
        "length",
        "refused",
        "hits",
        "chunks",
        "preemptions",
        "copies",
        "swaps",
        "flushes",
        "windows",
    ] + ["prefix waits"]:
        assert seen[event] > 50, seen


def test_a_seed_replays_to_the_step():
    assert run_random_load(7) == run_random_load(7)
    assert run_random_load(7) != run_random_load(8)


def test_a_write_to_a_shared_block_is_found_out(monkeypatch):
    """The simulation must be able to fail: without copies on write, completions of one prompt overwrite each other."""
    monkeypatch.setattr(BlockManager, "_shared", lambda self, block_id: False)
    simulation = make()
    simulation.submit(list(range(6)), SamplingParams(max_tokens=8, n=3))
    with pytest.raises((SimulationFailed, CacheCorrupted)):
        simulation.run()


def test_time_is_what_the_steps_cost():
    simulation = make(max_batched_tokens=8)
    cost = StepCost(fixed=1.0, per_token=0.5, per_key=0.0)
    simulation = Simulation(simulation.core, cost)
    simulation.at(10.0, lambda: simulation.submit(list(range(12)), SamplingParams(max_tokens=3)))
    simulation.run()
    # Chunks of 8 and 4 tokens, then two decodes: 5 + 3, 1.5, 1.5 seconds.
    assert simulation.traces[0].times == [18.0, 19.5, 21.0]
    assert simulation.steps == 4


def test_a_deadline_ends_a_request_wherever_it_is():
    simulation = make(max_batched_tokens=8, max_running=1)
    simulation = Simulation(simulation.core, StepCost(fixed=1.0, per_token=0.0, per_key=0.0))
    for timeout in (4.5, 2.5, 100.0):
        simulation.submit(list(range(4)), SamplingParams(max_tokens=9), timeout_s=timeout)
    simulation.run()
    running, waiting, last = simulation.traces
    assert (running.finish_reason, len(running.tokens)) == ("timeout", 5)
    assert (waiting.finish_reason, waiting.tokens) == ("timeout", [])
    assert (last.finish_reason, len(last.tokens)) == ("length", 9)
    assert simulation.core.stats().timeouts == 2


def test_one_prefix_wanted_by_many_is_computed_once():
    simulation = make(max_batched_tokens=64)
    computed: Counter[str] = Counter()
    simulation.on_step = lambda scheduled: computed.update(tokens=sum(item.end - item.start for item in scheduled))
    prefix = list(range(40))
    for tail in range(5):
        simulation.submit([*prefix, 50 + tail], SamplingParams(max_tokens=1))
    simulation.run()
    assert computed["tokens"] == 40 + 5
    assert simulation.core.stats().prefix_waits == 4


def test_the_completions_of_a_prompt_share_its_blocks_and_copy_one():
    simulation = make(block_size=4)
    used: list[int] = []
    simulation.on_step = lambda scheduled: used.append(64 - simulation.core.blocks.num_free)
    simulation.submit(list(range(10)), SamplingParams(max_tokens=3, n=4))
    simulation.run()
    # Two full blocks and the first one's third, which the three others copied to write behind the prompt.
    assert max(used) == 2 + 4
    assert simulation.core.stats().block_copies == 3
    assert len({tuple(trace.tokens) for trace in simulation.traces}) == 4
    simulation.core.check_integrity()


def test_a_priority_goes_before_and_preempts():
    simulation = make(num_blocks=8, block_size=4, max_batched_tokens=16)
    for salt in "ab":
        simulation.submit(list(range(30, 44)), SamplingParams(max_tokens=16), salt=salt)
    simulation.at(0.011, lambda: simulation.submit(list(range(20)), SamplingParams(max_tokens=4), priority=-1))
    simulation.run()
    ends = [trace.times[-1] for trace in simulation.traces]
    assert ends[2] < min(ends[:2])
    assert simulation.core.stats().preemptions >= 1
    assert [trace.finish_reason for trace in simulation.traces] == ["length"] * 3


def test_tenants_share_alike_whatever_they_ask_for():
    """One tenant floods the queue with long prompts, the other sends one short one after another."""
    simulation = make(num_blocks=400, max_batched_tokens=16, max_running=2)
    finished: Counter[str] = Counter()
    for number in range(30):
        simulation.submit([number] * 60, SamplingParams(max_tokens=10), salt="flood")
    for number in range(12):
        simulation.submit([90 + number] * 5, SamplingParams(max_tokens=10), salt="drip")
    simulation.run()
    last_drip = max(trace.times[-1] for trace in simulation.traces if trace.salt == "drip")
    for trace in simulation.traces:
        finished[trace.salt] += trace.times[-1] <= last_drip
    # 12 × (5 + 2·10) = 300 units of service for one: about 300 / (60 + 2·10) ≈ 4 requests of the other.
    assert finished["drip"] == 12 and 3 <= finished["flood"] <= 6


def test_a_swap_comes_though_new_requests_never_cease():
    simulation = make(max_running=4, max_waiting=50)
    for number in range(60):
        simulation.at(number * 0.01, lambda: simulation.submit(list(range(9)), SamplingParams(max_tokens=20)))
    simulation.at(0.2, lambda: simulation.swap("new"))
    simulation.run()
    swapped = [trace.weights_id == "new" for trace in simulation.traces]
    assert swapped == sorted(swapped) and 0 < sum(swapped) < 60
    first_new = swapped.index(True)
    assert max(trace.times[-1] for trace in simulation.traces[:first_new]) <= min(
        trace.times[0] for trace in simulation.traces[first_new:]
    )
    assert simulation.traces[first_new].submitted < 0.35, "it did not wait for a pause"


def test_a_long_prompt_leaves_the_steps_of_others_as_long_as_they_were():
    core = EngineCore(
        EngineConfig(max_batched_tokens=256), num_blocks=4096, max_seq_len=40_000, weights_id="w", half_context=3000.0
    )
    simulation = Simulation(core, StepCost(fixed=0.0, per_token=2e-4, per_key=2e-4 / 3000), verify=False)
    simulation.submit([1] * 10, SamplingParams(max_tokens=700))
    simulation.submit([2] * 30_000, SamplingParams(max_tokens=1))
    simulation.run()
    times = simulation.traces[0].times
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    # A budget of tokens that all cost the same would make the last chunks eleven times as long as the first.
    assert max(gaps) < 1.5 * gaps[1]
    assert simulation.traces[1].times[0] > 300 * gaps[1]


def test_a_window_bounds_what_a_request_holds():
    simulation = make(num_blocks=8, block_size=4, window=10, max_batched_tokens=8)
    simulation.submit([number % 7 for number in range(200)], SamplingParams(max_tokens=100))
    simulation.run()
    assert len(simulation.traces[0].tokens) == 100
    assert simulation.core.stats().free_blocks == 8
