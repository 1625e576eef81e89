"""Which runs start now, and what each of the others waits for. Decisions only.

A run is a gang: it starts when all that it needs at the same time is free, and not before. The waiting are in the order

    priority + (whole ageing intervals waited), highest first; then the time of submission; then the id

so that whoever waits long enough is first, whatever comes after. They are looked at in that order:

    needs more than the cluster can ever have    says so, and is in nobody's way
    its tag's value has its number of runs       says so, and is in nobody's way: a place there is not the cluster's
    fits what is free                            starts
    the first that does not                      is promised what it needs: whoever comes behind it starts only with
                                                 what the promised run does not wait for

Behind the promised run others fill in with what is left when its needs are set aside: of a resource that it waits for
nothing is left, of the others what is free beyond its needs. So nobody ever delays it, however short or long.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Amounts = Mapping[str, float]
"""By resource: `CPU`, `GPU`, and `GPU:H200` for GPUs of a kind, which count as `GPU` too."""

_SLACK = 1e-6
_SHOWN_RUNS = 3


@dataclass(frozen=True)
class Waiting:
    """`submitted`: seconds since the epoch."""

    id: str
    needs: Amounts
    submitted: float
    priority: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A run that has started or is about to: all of its needs count, whether or not it has taken them yet."""

    id: str
    needs: Amounts
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QueuePolicy:
    """`caps`: at most so many runs at once for each value of a tag, `{"user": 2}`. Every `ageing_seconds` of waiting
    raise a run's priority by one. Raises ValueError."""

    caps: Mapping[str, int] = field(default_factory=dict)
    ageing_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, cap in self.caps.items():
            if cap < 1:
                raise ValueError(f"the cap of tag {name!r} is {cap}; it must be at least 1, or nothing of it ever runs")
        if not self.ageing_seconds > 0:
            raise ValueError(f"ageing_seconds={self.ageing_seconds} must be above 0")

    def rank(self, waiting: Waiting, now: float) -> tuple[float, float, str]:
        """The smallest is first."""
        steps = max(0.0, now - waiting.submitted) // self.ageing_seconds
        return (-(waiting.priority + steps), waiting.submitted, waiting.id)


@dataclass(frozen=True)
class Decision:
    """`start`: ids in the order in which they start. `waits`: for each other waiting one, why, in words."""

    start: tuple[str, ...]
    waits: Mapping[str, str]


def decide(
    waiting: Iterable[Waiting],
    running: Sequence[Running],
    capacity: Amounts,
    others: Amounts,
    policy: QueuePolicy,
    now: float,
) -> Decision:
    """What starts now.

    Args:
        capacity: all that the cluster has; of one that grows, all that it may grow to.
        others: what of it is taken by anything but `running`.
    """
    ordered = sorted(waiting, key=lambda each: policy.rank(each, now))
    free = {name: capacity.get(name, 0.0) - others.get(name, 0.0) for name in capacity}
    _take(free, (run.needs for run in running))
    holders = list(running)
    places = Counter((name, run.tags[name]) for run in running for name in policy.caps if name in run.tags)
    start: list[str] = []
    waits: dict[str, str] = {}
    promised = ""
    position = 0
    for entry in ordered:
        own = [(name, entry.tags[name]) for name in policy.caps if name in entry.tags]
        impossible = _short(entry.needs, capacity)
        full = [place for place in own if places[place] >= policy.caps[place[0]]]
        if impossible:
            waits[entry.id] = _never(entry.needs, capacity, impossible)
            continue
        position += 1
        if full:
            waits[entry.id] = f"{_no_place(full[0], policy.caps[full[0][0]])}; {_ordinal(position)} in the queue"
            continue
        short = _short(entry.needs, free)
        if not short:
            start.append(entry.id)
            position -= 1
            holders.append(Running(entry.id, entry.needs, entry.tags))
            _take(free, (entry.needs,))
            places.update(own)
            continue
        why = _busy(entry.needs, short[0], capacity, free, holders, promised)
        waits[entry.id] = f"{why}; {_ordinal(position)} in the queue"
        if not promised:
            promised = entry.id
            _take(free, (entry.needs,))
            free = {name: max(0.0, amount) for name, amount in free.items()}
    return Decision(tuple(start), waits)


def _take(free: dict[str, float], needs: Iterable[Amounts]) -> None:
    for each in needs:
        for name, amount in each.items():
            free[name] = free.get(name, 0.0) - amount


def _short(needs: Amounts, there: Amounts) -> list[str]:
    """The resources of which there is not enough, GPUs first."""
    short = [name for name, amount in needs.items() if amount > 0 and amount > there.get(name, 0.0) + _SLACK]
    return sorted(short, key=lambda name: (name == "CPU", -len(name)))


def _never(needs: Amounts, capacity: Amounts, short: Sequence[str]) -> str:
    name = short[0]
    most = capacity.get(name, 0.0)
    return f"needs {shown(name, needs[name])}, the cluster has {'at most ' * bool(most)}{most:g}"


def _busy(
    needs: Amounts, name: str, capacity: Amounts, free: Amounts, holders: Sequence[Running], promised: str
) -> str:
    """`name` is a resource of which there is not enough, once what is promised to the run of that id is set aside."""
    total = capacity[name]
    used = total - max(0.0, free.get(name, 0.0))
    by = [run.id for run in holders if run.needs.get(name, 0.0) > 0]
    more = f" and {len(by) - _SHOWN_RUNS} more" if len(by) > _SHOWN_RUNS else ""
    users = f"in use by {', '.join(by[:_SHOWN_RUNS])}{more}" if by else "in use by others on the cluster"
    users += f" or promised to {promised}" * bool(promised)
    return f"waits for {shown(name, needs[name])}: {used:g} of {total:g} are {users}"


def _no_place(place: tuple[str, str], cap: int) -> str:
    name, value = place
    return f"waits for a place: {name} {value} has {cap} of {cap} runs"


def shown(name: str, amount: float) -> str:
    """`2 GPUs`, `1 H200 GPU`, `0.5 CPUs`."""
    kind, _, model = name.partition(":")
    plural = "" if math.isclose(amount, 1.0) else "s"
    return f"{amount:g} {f'{model} ' * bool(model)}{kind}{plural}"


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
