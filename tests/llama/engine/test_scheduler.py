import random

import pytest

from llama.engine.blocks import BlockManager, BlockTable
from llama.engine.params import SamplingParams
from llama.engine.prefix import generation_root
from llama.engine.request import Request, Status
from llama.engine.scheduler import QueueFull, Scheduler

ROOT = generation_root("weights")


def make_request(name: str, token_ids: list[int]) -> Request:
    return Request(name, SamplingParams(), list(token_ids), BlockTable(ROOT), max_total_tokens=1000)


def make_scheduler(num_blocks=64, block_size=4, budget=16, max_running=8, max_waiting=100) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        max_batched_tokens=budget,
        max_running=max_running,
        max_waiting=max_waiting,
    )


def run_step(scheduler: Scheduler, next_token: int = 1) -> list[tuple[str, int, int]]:
    scheduled = scheduler.schedule()
    for item in scheduled:
        samples = item.samples
        scheduler.commit(item)
        if samples:
            item.request.token_ids.append(next_token)
    return [(item.request.request_id, item.start, item.end) for item in scheduled]


def test_decodes_first_then_the_oldest_prefill_gets_the_rest():
    scheduler = make_scheduler(budget=8)
    for name, length in (("a", 3), ("b", 4)):
        scheduler.add([make_request(name, [ord(name)] * length)])
    assert run_step(scheduler) == [("a", 0, 3), ("b", 0, 4)]
    for name, length in (("c", 13), ("d", 2)):
        scheduler.add([make_request(name, [ord(name)] * length)])
    assert run_step(scheduler) == [("a", 3, 4), ("b", 4, 5), ("c", 0, 6)]
    assert run_step(scheduler) == [("a", 4, 5), ("b", 5, 6), ("c", 6, 12)]
    assert run_step(scheduler) == [("a", 5, 6), ("b", 6, 7), ("c", 12, 13), ("d", 0, 2)]


def test_the_newest_is_preempted_and_comes_back_before_later_arrivals():
    scheduler = make_scheduler(num_blocks=6, block_size=2, budget=20)
    for name in "ab":
        scheduler.add([make_request(name, [ord(name)] * 4)])
    run_step(scheduler)
    scheduler.add([make_request("c", [9])])
    run_step(scheduler)
    assert [request.request_id for request in scheduler.running] == ["a", "b"]
    run_step(scheduler)
    assert run_step(scheduler) == [("a", 6, 7)]
    assert [request.request_id for request in scheduler.waiting] == ["b", "c"]
    assert scheduler.num_preemptions == 1
    b = next(iter(scheduler.waiting))
    assert b.num_computed == 0 and b.num_cached_tokens == 0 and len(b.token_ids) == 7
    scheduler.finish(scheduler.running[0])
    run_step(scheduler)
    assert b.status is Status.RUNNING
    assert b.num_cached_tokens == 0, "the first admission's number is kept"


def test_admission_leaves_room_for_the_running_to_grow():
    for length, admitted in ((7, 2), (9, 1)):
        scheduler = make_scheduler(num_blocks=7, block_size=2, budget=20)
        scheduler.add([make_request("a", [1] * 4)])
        scheduler.add([make_request("b", [2] * length)])
        assert len(run_step(scheduler)) == admitted


def test_a_full_queue_refuses():
    scheduler = make_scheduler(max_waiting=2)
    for name in "ab":
        scheduler.add([make_request(name, [1])])
    with pytest.raises(QueueFull, match="max_waiting=2"):
        scheduler.add([make_request("c", [1])])
    run_step(scheduler)
    scheduler.add([make_request("c", [1])])


def test_no_more_run_than_the_budget_can_serve():
    scheduler = make_scheduler(budget=3, max_running=8)
    for name in "abcde":
        scheduler.add([make_request(name, [1])])
    for _ in range(4):
        assert [name for name, _, _ in run_step(scheduler)] == ["a", "b", "c"]


def run_random_load(seed: int) -> tuple[int, int, int]:
    """Returns how many chunked prefills, prefix hits and preemptions there were."""
    rng = random.Random(seed)
    num_blocks, block_size = rng.randrange(8, 24), rng.choice([2, 4])
    budget, max_running = rng.randrange(3, 20), rng.randrange(2, 10)
    scheduler = make_scheduler(num_blocks, block_size, budget, max_running)
    capacity = num_blocks * block_size
    goals: dict[str, int] = {}
    finished: list[str] = []
    aborted: set[str] = set()
    admitted: list[Request] = []
    chunks = hits = steps = 0
    pending, latest = 40, (0, 0)
    while pending or scheduler.has_work:
        steps += 1
        assert steps < 5000, "no progress"
        while pending and rng.random() < 0.4:
            pending -= 1
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, capacity // 2))]
            request = make_request(f"r{pending}", prompt)
            goals[request.request_id] = rng.randrange(len(prompt) + 1, capacity + 1)
            scheduler.add([request])
        everyone = [*scheduler.running, *scheduler.waiting]
        if everyone and rng.random() < 0.05:
            victim = rng.choice(everyone)
            scheduler.finish(victim)
            aborted.add(victim.request_id)
        before = list(scheduler.running)
        decoding = [request for request in before if request.decoding]
        scheduled = scheduler.schedule()
        assert bool(scheduled) == scheduler.has_work
        assert sum(item.end - item.start for item in scheduled) <= budget
        assert len(scheduler.running) <= min(max_running, budget)
        by_request = {item.request: item for item in scheduled}
        assert len(by_request) == len(scheduled) and set(by_request) <= set(scheduler.running)
        assert scheduler.running == sorted(scheduler.running, key=Request.order)
        new = [request for request in scheduler.running if request.order() > latest]
        newest = max((request.arrival for request in new), default=0)
        latest = max((latest, *(request.order() for request in new)))
        last = scheduler.running[-1].order() if scheduler.running else (0, 0)
        for request in scheduler.waiting:
            if request.admission is None:
                assert request.arrival > newest or request.awaited, "only who waits for a prefix is overtaken"
            else:
                assert request.order() > last or request.awaited, "the preempted come first"
            assert request.num_computed == 0 and not request.table.block_ids
        for request in decoding:
            assert (request in by_request) == (request in scheduler.running), "every decode gets its token"
        if before and scheduler.running:
            assert scheduler.running[0] is before[0], "the oldest is never preempted"
        prefills = [request for request in scheduler.running if request not in decoding]
        unfinished = [request for request in prefills if request not in by_request or not by_request[request].samples]
        assert prefills[len(prefills) - len(unfinished) :] == unfinished, "older prefills are served first"
        if unfinished:
            assert sum(item.end - item.start for item in scheduled) == budget, "no budget is wasted"
        for request in scheduler.running:
            if request not in before:
                admitted.append(request)
                hits += request.num_computed > 0
        for item in scheduled:
            assert item.start == item.request.num_computed < item.end <= len(item.request.token_ids)
            assert item.end <= len(item.request.table.block_ids) * block_size
            samples = item.samples
            chunks += not samples
            scheduler.commit(item)
            if samples:
                item.request.token_ids.append(rng.randrange(2))
                if len(item.request.token_ids) >= goals[item.request.request_id]:
                    scheduler.finish(item.request)
                    finished.append(item.request.request_id)
        scheduler.blocks.check_integrity(scheduler.tables)
    assert len(finished) == len(set(finished)) and set(finished) | aborted == set(goals)
    assert scheduler.blocks.num_free == num_blocks
    assert scheduler.num_prompt_tokens == sum(request.num_prompt_tokens for request in set(admitted))
    assert scheduler.num_cached_tokens == sum(request.num_cached_tokens or 0 for request in set(admitted))
    return chunks, hits, scheduler.num_preemptions


def test_invariants_under_random_load():
    counts = [run_random_load(seed) for seed in range(30)]
    assert all(sum(column) > 50 for column in zip(*counts, strict=True)), counts


def run_until_admitted(scheduler: Scheduler, request: Request) -> int:
    for steps in range(200):
        run_step(scheduler)
        if request.status is Status.RUNNING:
            return steps
    raise AssertionError("it was never admitted")


def ordered(name: str, token_ids: list[int], priority: int) -> Request:
    request = make_request(name, token_ids)
    request.priority = priority
    return request


def test_nobody_waits_for_a_prefix_that_a_lower_priority_computes():
    """The lower one may not come to it as long as there is work between the two."""
    scheduler = make_scheduler(num_blocks=200, budget=8)
    prefix = list(range(40))
    scheduler.add([ordered("low", [*prefix, 1], 5)])
    run_step(scheduler)
    for number in range(4):
        scheduler.add([ordered(f"between-{number}", [50 + number] * 40, 1)])
    run_step(scheduler)
    high = ordered("high", [*prefix, 2], 0)
    as_high = ordered("as high", [*prefix, 3], 0)
    scheduler.add([high, as_high])
    assert run_until_admitted(scheduler, high) == 0
    run_until_admitted(scheduler, as_high)
    assert as_high.num_cached_tokens == 40, "it waited for one of its own priority"


def test_a_priority_makes_room_though_its_prefix_takes_up_the_free_blocks():
    """Idle blocks of its own prefix count as free, but not as room for the rest of it."""
    scheduler = make_scheduler(num_blocks=8, block_size=4, budget=64)
    prefix = list(range(16))
    scheduler.add([make_request("before", [*prefix, 1])])
    run_step(scheduler)
    scheduler.finish(scheduler.running[0])
    scheduler.add([ordered("low", [90] * 9, 1)])
    run_step(scheduler)
    high = ordered("high", [*prefix, 2], 0)
    scheduler.add([high])
    assert run_until_admitted(scheduler, high) == 0
    assert high.num_cached_tokens == 16 and scheduler.num_preemptions == 1


def test_nobody_gives_way_in_vain():
    """Blocks that several of the lower ones share are freed once."""
    for length, preempted in ((44, 0), (40, 2)):
        scheduler = make_scheduler(num_blocks=16, block_size=4, budget=64)
        prefix = list(range(16))
        for name in "ab":
            scheduler.add([ordered(name, [*prefix, ord(name)], 5)])
            run_step(scheduler)
        scheduler.add([ordered("other", [60] * 19, 0)])
        run_step(scheduler)
        assert scheduler.blocks.num_free == 5
        # The two hold 6 blocks between them, and one is left to the other to grow.
        scheduler.add([ordered("high", [70] * length, 0)])
        run_step(scheduler)
        assert scheduler.num_preemptions == preempted, length
