"""Which steps are skipped: those whose gradient is not finite, or far larger than those before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence


class StepGuard:
    """Judges gradients by their global norms, before clipping.

    A norm is an outlier above mean + `sigma`·std (sample) of the last `window` norms that were applied; nothing is one
    before half a window is known. Half a window of outliers in a row are none: the window starts anew, or a run whose
    gradients have grown for good would never move again. OLMo-core's `SkipStepOptimizer` is the model.

    Args:
        sigma: 0 keeps no window, and skips only what is not finite.
        window: steps, at least 4.
    """

    def __init__(self, sigma: float, window: int) -> None:
        self.sigma = sigma
        self.enough = window // 2
        self._norms: deque[float] = deque(maxlen=window)
        self._outliers = 0
        """In a row."""

    def accepts(self, norm: float) -> bool:
        """Whether the step is to be taken; remembers the norm of one that is."""
        if not math.isfinite(norm):
            return False
        if self.sigma == 0:
            return True
        if self._outlying(norm) and self._outliers < self.enough - 1:
            self._outliers += 1
            return False
        if self._outlying(norm):
            self._norms.clear()
        self._outliers = 0
        self._norms.append(norm)
        return True

    def _outlying(self, norm: float) -> bool:
        if len(self._norms) < self.enough:
            return False
        mean = statistics.fmean(self._norms)
        return norm > mean + self.sigma * statistics.stdev(self._norms, mean)

    def state(self) -> dict[str, Sequence[float] | int]:
        """JSON; floats keep every bit in it."""
        return {"norms": list(self._norms), "outliers": self._outliers}

    def restore(self, norms: Sequence[float], outliers: int) -> None:
        """Goes on from a `state`; of a longer window the last norms are kept."""
        self._norms = deque(norms, self._norms.maxlen)
        self._outliers = outliers
