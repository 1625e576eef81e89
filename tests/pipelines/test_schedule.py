"""When stages are tried: chosen cases, and random runs held against what must always be true."""

import random

import pytest

from pipelines.schedule import Schedule
from pipelines.stage import LOST_RETRIES, MAX_WAIT, Resources, Stage, Tries


def stage(name: str, *upstream: str, cpus: float = 1, gpus: float = 0, **tries: float) -> Stage:
    resources = Resources(cpus, gpus)
    return Stage(name, 1, {}, lambda context: {}, upstream, resources=resources, tries=Tries(**tries))


def names(stages: list[Stage]) -> list[str]:
    return [each.name for each in stages]


def test_independent_stages_are_tried_together_and_the_others_after_what_they_need() -> None:
    schedule = Schedule([stage("a"), stage("b"), stage("c", "a", "b"), stage("d", "a")])
    assert names(schedule.due(0)) == ["a", "b"]
    assert schedule.due(0) == []
    schedule.succeeded("a")
    assert names(schedule.due(1)) == ["d"]
    schedule.succeeded("b")
    assert names(schedule.due(2)) == ["c"]
    for name in ("c", "d"):
        assert not schedule.is_over
        schedule.succeeded(name)
    assert schedule.is_over


def test_what_is_done_already_is_not_tried_and_holds_nothing_up() -> None:
    schedule = Schedule([stage("a"), stage("b", "a"), stage("c", "outside")], done=["a"])
    assert names(schedule.due(0)) == ["b", "c"]
    assert Schedule([stage("a")], done=["a"]).is_over


def test_stages_share_what_the_cluster_has() -> None:
    stages = [stage("a", cpus=2), stage("b", cpus=1), stage("c", cpus=1), stage("big", gpus=9, cpus=1)]
    schedule = Schedule(stages, capacity=Resources(3, 8))
    assert names(schedule.due(0)) == ["a", "b"]
    schedule.succeeded("a")
    assert names(schedule.due(0)) == ["c"]
    schedule.succeeded("b")
    assert schedule.due(0) == []
    schedule.succeeded("c")
    assert names(schedule.due(0)) == ["big"], "alone, for the cluster says best what it lacks"


def test_a_failed_try_is_repeated_after_a_wait_that_doubles() -> None:
    schedule = Schedule([stage("a", retries=9, wait=20)])
    now, waits = 0.0, []
    for _ in range(9):
        assert names(schedule.due(now)) == ["a"]
        wait = schedule.failed("a", now)
        assert wait is not None and schedule.due(now + wait - 0.1) == []
        assert schedule.wait(now) == wait
        waits.append(wait)
        now += wait
    assert waits == [20, 40, 80, 160, *[MAX_WAIT] * 5]
    assert names(schedule.due(now)) == ["a"]
    assert schedule.failed("a", now) is None
    assert schedule.is_over


def test_lost_workers_are_counted_by_themselves() -> None:
    schedule = Schedule([stage("a", retries=1, wait=1)])
    now = 0.0
    for number in range(LOST_RETRIES + 1):
        assert names(schedule.due(now)) == ["a"]
        if number == 1:
            assert schedule.failed("a", now) is not None
            now += MAX_WAIT
            schedule.due(now)
        wait = schedule.failed("a", now, lost=True)
        assert (wait is None) == (number == LOST_RETRIES)
        now += MAX_WAIT


def test_after_a_failure_what_is_being_tried_goes_on_and_nothing_else_begins() -> None:
    schedule = Schedule([stage("a"), stage("b", retries=5), stage("c", "b")])
    schedule.due(0)
    assert schedule.failed("a", 0) is None
    assert not schedule.is_over, "b is at it"
    assert schedule.failed("b", 1) is None, "no further try of it either"
    assert schedule.is_over and schedule.due(999) == []


def test_one_that_keeps_going_begins_all_that_does_not_need_the_failed_one() -> None:
    schedule = Schedule(
        [stage("a"), stage("b"), stage("c", "a"), stage("d", "c", "b"), stage("e", "b")], keep_going=True
    )
    schedule.due(0)
    assert schedule.failed("a", 0) is None
    schedule.succeeded("b")
    assert names(schedule.due(1)) == ["e"] and not schedule.is_over
    schedule.succeeded("e")
    assert schedule.is_over, "c and d are cut off"


def test_time_runs_from_when_the_worker_began() -> None:
    schedule = Schedule([stage("a", timeout=10), stage("b")])
    schedule.due(0)
    assert schedule.wait(0) is None and schedule.overdue(1000) == []
    schedule.began("a", 1000)
    assert schedule.wait(1004) == 6
    assert schedule.overdue(1009) == [] and schedule.overdue(1010) == ["a"]
    assert schedule.overdue(1011) == [], "said once"
    schedule.began("b", 1010)
    assert schedule.wait(1011) is None


@pytest.mark.parametrize("seed", range(40))
def test_random_runs(seed: int) -> None:
    """Whatever happens: nothing before what it needs, never more than there is, never two tries of one stage at once,
    as many tries as allowed, and an end."""
    draw = random.Random(seed)
    stages: list[Stage] = []
    for number in range(draw.randint(1, 9)):
        upstream = [each.name for each in stages if draw.random() < 0.3]
        made = stage(f"s{number}", *upstream, cpus=draw.choice([0.5, 1, 2, 5]), retries=draw.randint(0, 2), wait=4)
        stages.append(made)
    schedule = Schedule(stages, capacity=Resources(4))
    by_name = {each.name: each for each in stages}
    now, trying, done, errors = 0.0, set[str](), set[str](), dict.fromkeys(by_name, 0)
    stopped = False
    for _ in range(1000):
        for begun in schedule.due(now):
            assert begun.name not in trying | done and not stopped
            assert set(begun.upstream) <= done
            trying.add(begun.name)
        cpus = [by_name[name].resources.num_cpus for name in trying]
        assert sum(cpus) <= 4 or len(cpus) == 1
        if schedule.is_over:
            break
        if trying and draw.random() < 0.7:
            name = draw.choice(sorted(trying))
            trying.remove(name)
            if draw.random() < 0.7:
                schedule.succeeded(name)
                done.add(name)
            else:
                errors[name] += 1
                again = schedule.failed(name, now)
                assert (again is None) == (stopped or errors[name] > by_name[name].tries.retries)
                stopped = stopped or again is None
        elif not trying:
            wait = schedule.wait(now)
            assert wait is not None, "something is to come, or it is over"
            now += wait
    assert schedule.is_over and not trying
    assert stopped or done == set(by_name)
