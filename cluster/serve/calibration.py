"""How long a replica really takes until a first token, learnt from the requests that went through it. Pure.

    seconds = base + a · tokens        tokens: what was to be prefilled before it, and what it was found to miss itself

Least squares with exponential forgetting (Haykin, Adaptive Filter Theory, chapter 10, in its two-variable form), per
replica. `a` feeds the prediction of waits, and the slowness of a replica against its peers. It is drawn to what the
peers had learnt when the replica's first token came, else to the coefficients' `prefill_s_per_token` (ridge regression,
Hoerl and Kennard 1970, about the observations' centre), as if by requests that differ by thousands of tokens: where all
are short only `base` can be told, and the slope of what is left is noise.

A replica's slowness is how long it takes for the average first token, over what its peers take in the median. It is
rounded to powers of STEP, and 1 until there is much to go by: estimates of equal machines differ, and that noise must
neither break ties nor send every new prefix to whoever looks fastest this minute.
"""

import math
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

FORGETTING = 0.98
"""A first token weighs half after 34 further ones."""
STEP = 2.0
LEAST_WEIGHT = 30.0
"""Of the observations from which a slowness is told; there are never more than 1 / (1 - FORGETTING)."""
_PRIOR_WEIGHT = 4.0
_PRIOR_TOKENS = 1_000.0
_RIDGE = _PRIOR_WEIGHT * _PRIOR_TOKENS**2
_MAX_RATIO = 100.0


@dataclass
class _Sums:
    """Of the weighted observations: weight, tokens, tokens², seconds, tokens · seconds. What was believed before the
    first: `slope`, and by the weight `prior` that the base is 0."""

    slope: float
    n: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0
    prior: float = _PRIOR_WEIGHT

    def add(self, tokens: float, seconds: float) -> None:
        self.prior *= FORGETTING
        self.n = FORGETTING * self.n + 1
        self.x = FORGETTING * self.x + tokens
        self.xx = FORGETTING * self.xx + tokens * tokens
        self.y = FORGETTING * self.y + seconds
        self.xy = FORGETTING * self.xy + tokens * seconds


class Speed(NamedTuple):
    """Of a replica's prefill: `base_s` seconds whatever is missing, and `s_per_token` for each token."""

    base_s: float
    s_per_token: float


class Calibration:
    """The speeds of all replicas. `s_per_token`: what to believe before anything was seen. Not thread-safe."""

    def __init__(self, s_per_token: float) -> None:
        self._prior = s_per_token
        self._sums: dict[str, _Sums] = {}
        self._speeds: dict[str, Speed] = {}
        self._known: dict[str, tuple[float, Speed]] = {}
        self._unseen = (1.0, Speed(0.0, s_per_token))

    def observe(self, replica: str, tokens: int, seconds: float) -> None:
        """A first token came `seconds` after selection, behind `tokens` of prefill, its own prompt's included."""
        sums = self._sums.setdefault(replica, _Sums(self._unseen[1].s_per_token))
        sums.add(tokens, seconds)
        self._speeds[replica] = self._fitted(sums)
        self._compare()

    def drop(self, replica: str) -> None:
        """Forgets a replica that has left."""
        if self._sums.pop(replica, None) is not None:
            del self._speeds[replica]
            self._compare()

    def speed(self, replica: str) -> Speed:
        """The present estimate; of a replica that has produced nothing yet, its peers' median."""
        return self.of(replica)[1]

    def slowness(self, replica: str) -> float:
        """How many times as long as its peers' median the replica takes, in powers of STEP."""
        return self.of(replica)[0]

    def of(self, replica: str) -> tuple[float, Speed]:
        """Slowness and speed."""
        return self._known.get(replica, self._unseen)

    def _compare(self) -> None:
        speeds = [speed.s_per_token for speed in self._speeds.values()]
        self._unseen = (1.0, Speed(0.0, median(speeds) if speeds else self._prior))
        known = {replica: sums for replica, sums in self._sums.items() if sums.n >= LEAST_WEIGHT}
        tokens = sum(sums.x for sums in known.values()) / max(1.0, sum(sums.n for sums in known.values()))
        seconds = {
            replica: self._speeds[replica].base_s + tokens * self._speeds[replica].s_per_token for replica in known
        }
        middle = median(seconds.values()) if seconds else 1.0
        self._known = {
            replica: (_rounded(seconds.get(replica, middle) / middle) if middle else 1.0, speed)
            for replica, speed in self._speeds.items()
        }

    def _fitted(self, sums: _Sums) -> Speed:
        spread = max(0.0, sums.xx - sums.x * sums.x / sums.n)
        slope = (sums.xy - sums.x * sums.y / sums.n + _RIDGE * sums.slope) / (spread + _RIDGE)
        slope = min(max(slope, self._prior / _MAX_RATIO), self._prior * _MAX_RATIO)
        return Speed(max(0.0, (sums.y - slope * sums.x) / (sums.n + sums.prior)), slope)


def _rounded(ratio: float) -> float:
    return STEP ** round(math.log(ratio, STEP)) if ratio > 0 else 1.0
