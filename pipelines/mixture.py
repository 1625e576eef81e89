"""How much of each source goes into the corpus, when there is a budget.

A budget in bytes or tokens is divided by the sources' weights. A source that has less than its share, or may give no
more, leaves the rest to the others, again by weight (`divide`). Of each source the first documents are taken, as many
as its share holds: the longest prefix of whole documents that fits.

How much a document comes to is known only when it has been read and cleaned, or encoded, so `take_parts` works in
waves. Every wave runs parts of all sources at once, about as many as their shares need by what the parts so far came
to. When every source has its share or is exhausted, the part in which a share ends is run once more with a limit. What
was run beyond it is not in the answer; the caller drops its files (`StageContext.forget`). A share can only grow while
other sources turn out to be small, so the parts run in vain are those by which the last estimate was too high.

    def run(takes):                                  # in parallel, in the order given
        return [results of reading part take.index of source take.source, up to take.limit, for take in takes]

    taken = take_parts(budget, claims, sizes, run, amount=lambda result: result.bytes)
    for source in taken:
        for take, result in source:                  # the parts that count, in order

The answer depends on the documents, the budget and the claims alone: neither on the sizes of waves nor on estimates.
That holds if a part's amount is the sum over its documents, each at least 1, and if a part run with a limit takes its
documents in order up to, and without, the first that would exceed the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

Result = TypeVar("Result")

_PROBE = 8  # parts of a source in the first wave, when nothing is known of what they come to
_GROWTH = 8  # a wave is at most so many times what a source has shown so far


@dataclass(frozen=True)
class Claim:
    """A source's claim on the budget: its weight relative to the others, and the most to take of it at all."""

    weight: float = 1.0
    at_most: int | None = None


@dataclass(frozen=True)
class Take:
    """Part number `index` of source number `source`: all of it, or its first documents that come to at most `limit`."""

    source: int
    index: int
    limit: int | None = None


def divide(budget: int | None, claims: Sequence[Claim], available: Sequence[int | None]) -> list[Fraction | None]:
    """Each claim's exact share of the budget, given what its source has; None stands for no limit.

    Shares are proportional to the weights, except that nobody gets more than there is of it or than it claims; what
    that leaves is divided among the others in the same way. With an endless budget everybody gets all.
    """
    ceilings = [
        min((limit for limit in (claim.at_most, has) if limit is not None), default=None)
        for claim, has in zip(claims, available, strict=True)
    ]
    if budget is None:
        return [None if ceiling is None else Fraction(ceiling) for ceiling in ceilings]
    shares = [Fraction(0)] * len(claims)
    left = Fraction(budget)
    open_ = list(range(len(claims)))
    while open_:
        weight = sum(Fraction(claims[index].weight) for index in open_)
        for index in open_:
            shares[index] = left * Fraction(claims[index].weight) / weight
        full = {index: at for index in open_ if (at := ceilings[index]) is not None and at <= shares[index]}
        if not full:
            break
        for index, ceiling in full.items():
            shares[index] = Fraction(ceiling)
            left -= ceiling
        open_ = [index for index in open_ if index not in full]
    return list(shares)


class _Progress:
    """What the parts of one source have come to so far."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self.amounts: list[int] = []

    @property
    def amount(self) -> int:
        return sum(self.amounts)

    @property
    def exhausted(self) -> bool:
        return len(self.amounts) == len(self._sizes)

    def next_parts(self, share: Fraction | None) -> range:
        """The parts to run now; none if the share is met."""
        done = len(self.amounts)
        if self.exhausted or share is not None and self.amount >= share:
            return range(0)
        if share is None:
            return range(done, len(self._sizes))
        end = min(len(self._sizes), max(_PROBE, done + _GROWTH * done))
        expected = sum(self._sizes[:done])
        if done and not self.amount:  # all of it was dropped: nothing to go by
            return range(done, min(end, 2 * done))
        ratio = Fraction(self.amount, expected) if expected else Fraction(1)
        needed = share - self.amount
        for index in range(done, end):
            needed -= self._sizes[index] * ratio
            if needed <= 0:
                return range(done, index + 1)
        return range(done, end)


def take_parts(
    budget: int | None,
    claims: Sequence[Claim],
    sizes: Sequence[Sequence[int]],
    run: Callable[[Sequence[Take]], Sequence[Result]],
    amount: Callable[[Result], int],
) -> list[list[tuple[Take, Result]]]:
    """Run the parts of all sources, in order, until the budget is met or nothing is left.

    Args:
        budget: in the unit of `amount`, over all sources; None for no limit but those of the claims.
        claims: one for each source.
        sizes: of each source, how much each of its parts may come to; an estimate, for the sizes of the waves.
        run: the results of these parts, in the order given; called once for every wave.
        amount: how much a result comes to.

    Returns:
        For each source the parts that count, in order, with their results. The last may have a limit; its result may
        come to nothing.
    """
    progress = [_Progress(each) for each in sizes]
    results: dict[Take, Result] = {}
    while True:
        shares = divide(budget, claims, [source.amount if source.exhausted else None for source in progress])
        wave = [
            Take(number, index) for number, source in enumerate(progress) for index in source.next_parts(shares[number])
        ]
        if not wave:
            break
        for take, result in zip(wave, run(wave), strict=True):
            results[take] = result
            progress[take.source].amounts.append(amount(result))
    taken = []
    for number, source in enumerate(progress):
        # What its share would be if it went on: an exhausted source that is short of it counts to its very end.
        others = [each.amount if each.exhausted and each is not source else None for each in progress]
        taken.append(_within(number, source.amounts, divide(budget, claims, others)[number]))
    limited = [take for takes in taken for take in takes if take.limit is not None]
    if limited:
        results |= zip(limited, run(limited), strict=True)
    return [[(take, results[take]) for take in takes] for takes in taken]


def _within(source: int, amounts: Sequence[int], share: Fraction | None) -> list[Take]:
    """The parts of a source that its share holds; the last with a limit if only some of it is."""
    takes: list[Take] = []
    for index, comes_to in enumerate(amounts):
        if share is None:
            takes.append(Take(source, index))
            continue
        if share <= 0:
            break
        takes.append(Take(source, index, None if comes_to <= share else math.floor(share)))
        share -= comes_to
    return takes
