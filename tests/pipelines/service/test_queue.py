"""The queue against a straight reading of its rules, and what must hold whatever comes."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.service.queue import Amounts, Decision, QueuePolicy, Running, Waiting, decide

NAMES = ("CPU", "GPU")
AMOUNTS = st.fixed_dictionaries({"CPU": st.integers(0, 4)}, optional={"GPU": st.integers(0, 4)})
TAGS = st.fixed_dictionaries({}, optional={"user": st.sampled_from(["ana", "bo"])})
CAPACITY = st.fixed_dictionaries({"CPU": st.integers(1, 6), "GPU": st.integers(0, 6)})
POLICY = st.builds(QueuePolicy, st.sampled_from([{}, {"user": 1}, {"user": 2}]), st.sampled_from([10.0, 300.0, 1e9]))
NOW = 1000.0


def waiting_runs(prefix: str = "w") -> st.SearchStrategy[list[Waiting]]:
    one = st.tuples(AMOUNTS, st.integers(0, 1000), st.integers(-3, 3), TAGS)
    return st.lists(one, max_size=7).map(
        lambda rows: [Waiting(f"{prefix}{i}", n, float(s), p, t) for i, (n, s, p, t) in enumerate(rows)]
    )


RUNNING = st.lists(st.tuples(AMOUNTS, TAGS), max_size=3).map(
    lambda rows: [Running(f"r{i}", needs, tags) for i, (needs, tags) in enumerate(rows)]
)


def total(needs: list[Amounts]) -> dict[str, float]:
    return {name: sum(each.get(name, 0.0) for each in needs) for name in NAMES}


def fits(needs: Amounts, room: Amounts) -> bool:
    return all(needs.get(name, 0) <= room[name] for name in NAMES if needs.get(name, 0) > 0)


def reference(
    waiting: list[Waiting], running: list[Running], capacity: Amounts, others: Amounts, policy: QueuePolicy
) -> list[str]:
    """The rules, read straight: for each in order, try it against everything that it must not take."""

    def importance(run: Waiting) -> tuple[float, float, str]:
        return -run.priority - int((NOW - run.submitted) / policy.ageing_seconds), run.submitted, run.id

    started: list[Waiting] = []
    first_blocked: Waiting | None = None
    for run in sorted(waiting, key=importance):
        if not fits(run.needs, capacity):
            continue
        at_once = [*running, *started]
        if any(
            sum(other.tags.get(name) == run.tags[name] for other in at_once) >= cap
            for name, cap in policy.caps.items()
            if name in run.tags
        ):
            continue
        used = total([other.needs for other in at_once] + [others])
        room = {name: capacity[name] - used[name] for name in NAMES}
        if first_blocked is not None:
            for name in NAMES:
                wanted = first_blocked.needs.get(name, 0.0)
                room[name] = max(0.0, room[name] - wanted)
        if fits(run.needs, room):
            started.append(run)
        elif first_blocked is None:
            first_blocked = run
    return [run.id for run in started]


@given(waiting_runs(), RUNNING, CAPACITY, AMOUNTS, POLICY)
@settings(max_examples=400, deadline=None)
def test_it_decides_as_the_rules_say_and_explains_the_rest(waiting, running, capacity, others, policy) -> None:
    found = decide(waiting, running, capacity, others, policy, NOW)
    assert list(found.start) == reference(waiting, running, capacity, others, policy)
    assert set(found.start) | found.waits.keys() == {run.id for run in waiting}
    assert not set(found.start) & found.waits.keys()
    for run in waiting:
        if run.id in found.waits:
            assert found.waits[run.id].startswith("needs") == (not fits(run.needs, capacity))


@given(waiting_runs(), RUNNING, CAPACITY, AMOUNTS, POLICY)
@settings(max_examples=300, deadline=None)
def test_it_never_gives_what_is_not_there_and_keeps_the_caps(waiting, running, capacity, others, policy) -> None:
    found = decide(waiting, running, capacity, others, policy, NOW)
    by_id = {run.id: run for run in waiting}
    started = [by_id[run_id] for run_id in found.start]
    before = total([run.needs for run in running] + [others])
    after = total([before] + [run.needs for run in started])
    for name in NAMES:
        # what others take, or what is running already, may be more than there is; then nothing more starts there
        assert after[name] <= max(capacity[name], before[name])
    for value in ("ana", "bo"):
        held = sum(run.tags.get("user") == value for run in running)
        now = held + sum(run.tags.get("user") == value for run in started)
        assert now <= max(held, policy.caps.get("user", 99))


@given(waiting_runs(), waiting_runs("late"), RUNNING, CAPACITY, POLICY)
@settings(max_examples=300, deadline=None)
def test_whoever_comes_behind_never_delays_the_first_that_waits(waiting, late, running, capacity, policy) -> None:
    """Whatever was filled in behind it, the promised run starts at the moment at which it would have without."""
    running = [run for run in running if fits(run.needs, capacity)]
    everyone = waiting + late
    found = decide(everyone, running, capacity, {}, policy, NOW)
    ordered = sorted(everyone, key=lambda run: policy.rank(run, NOW))
    blocked = [run for run in ordered if "waits for a place" not in found.waits.get(run.id, "waits for a place")]
    blocked = [run for run in blocked if not found.waits[run.id].startswith("needs")]
    if not blocked:
        return
    first = blocked[0]
    ahead = [run for run in ordered[: ordered.index(first)] if run.id in found.start]
    behind = [run for run in ordered[ordered.index(first) :] if run.id in found.start]
    for count in range(len(running) + 1):  # whichever of the running end
        for left in itertools.combinations(running, count):
            base = total([run.needs for run in [*left, *ahead]])
            with_them = total([base] + [run.needs for run in behind])
            room = {name: capacity[name] - base[name] for name in NAMES}
            less = {name: capacity[name] - with_them[name] for name in NAMES}
            assert fits(first.needs, room) == fits(first.needs, less)


@given(waiting_runs(), CAPACITY, POLICY, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_in_the_end_everybody_has_run_who_can(waiting, capacity, policy, random) -> None:
    left, running, clock, newcomers = list(waiting), [], NOW, 0
    wanted = {run.id for run in waiting if fits(run.needs, capacity)}
    done: set[str] = set()
    for _ in range(400):
        found = decide(left, running, capacity, {}, policy, clock)
        running += [Running(run.id, run.needs, run.tags) for run in left if run.id in found.start]
        left = [run for run in left if run.id not in found.start]
        if running:
            ended = running.pop(random.randrange(len(running)))
            done.add(ended.id)
        if newcomers < 40:  # small ones of high priority keep coming for a while
            newcomers += 1
            left.append(Waiting(f"n{newcomers}", {"CPU": 1}, clock, 3))
        clock += 1.0
    assert wanted <= done


def test_a_stream_of_more_important_runs_does_not_starve_a_large_one() -> None:
    policy = QueuePolicy(ageing_seconds=10.0)
    left, running = [Waiting("large", {"CPU": 4}, 0.0, priority=0)], [Running("small0", {"CPU": 1})]
    for second in range(1, 200):
        left.append(Waiting(f"small{second}", {"CPU": 1}, float(second), priority=5))
        found = decide(left, running, {"CPU": 4}, {}, policy, float(second))
        if "large" in found.start:
            break
        running = [run for run in running if run.id != f"small{second - 2}"]
        running += [Running(run.id, run.needs) for run in left if run.id in found.start]
        left = [run for run in left if run.id not in found.start]
    else:
        pytest.fail("it never started")
    assert 50 <= second <= 65, "after five steps of ageing it is the first, and then what it needs is kept for it"


def one(*waiting: Waiting, running: tuple[Running, ...] = (), **options: object) -> Decision:
    settings = {"capacity": {"CPU": 8.0, "GPU": 8.0}, "others": {}, "policy": QueuePolicy({"user": 2}), "now": NOW}
    return decide(waiting, running, **{**settings, **options})  # type: ignore[arg-type]


def test_it_says_what_is_waited_for() -> None:
    busy = (Running("a", {"CPU": 1, "GPU": 6}, {"user": "ana"}), Running("b", {"CPU": 1, "GPU": 2}, {"user": "ana"}))
    found = one(
        Waiting("gpus", {"CPU": 2, "GPU": 2}, 1),
        Waiting("capped", {"CPU": 1}, 2, 0, {"user": "ana"}),
        Waiting("giant", {"CPU": 1, "GPU": 16}, 3),
        Waiting("odd", {"GPU": 1, "GPU:H200": 1}, 3),
        Waiting("cpus", {"CPU": 4}, 4),
        Waiting("behind", {"CPU": 1}, 5),
        running=busy,
    )
    assert found.start == ("cpus",)
    assert found.waits == {
        "gpus": "waits for 2 GPUs: 8 of 8 are in use by a, b; 1st in the queue",
        "capped": "waits for a place: user ana has 2 of 2 runs; 2nd in the queue",
        "giant": "needs 16 GPUs, the cluster has at most 8",
        "odd": "needs 1 H200 GPU, the cluster has 0",
        "behind": "waits for 1 CPU: 8 of 8 are in use by a, b, cpus or promised to gpus; 3rd in the queue",
    }


def test_others_on_the_cluster_are_named_as_such() -> None:
    found = one(Waiting("x", {"CPU": 8}, 1), others={"CPU": 1.0})
    assert found.waits == {"x": "waits for 8 CPUs: 1 of 8 are in use by others on the cluster; 1st in the queue"}


def test_priority_comes_first_then_time_then_the_id() -> None:
    runs = [Waiting("b", {"CPU": 8}, 5), Waiting("a", {"CPU": 8}, 5), Waiting("old", {"CPU": 8}, 4)]
    quick = QueuePolicy(ageing_seconds=1e9)
    assert one(*runs, policy=quick).start == ("old",)
    assert one(*runs[:2], policy=quick).start == ("a",)
    assert one(*runs, Waiting("urgent", {"CPU": 8}, 9, 1), policy=quick).start == ("urgent",)


@pytest.mark.parametrize(
    ("caps", "ageing", "words"), [({"user": 0}, 1.0, "cap of tag 'user' is 0"), ({}, 0.0, "above 0")]
)
def test_a_policy_that_would_stop_everything_is_refused(caps: dict[str, int], ageing: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QueuePolicy(caps, ageing)
