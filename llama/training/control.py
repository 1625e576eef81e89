"""What a training may be told while it runs."""

from __future__ import annotations

from enum import IntEnum


class Request(IntEnum):
    """What is wanted of the ranks after a step, by urgency.

    The values are spaced so that their sum over any number of ranks tells the most urgent: `of_sum`.
    """

    GO_ON = 0
    STOP_AT_CHECKPOINT = 1
    """Stop once the next checkpoint that is due is committed."""
    STOP_NOW = 1 << 32
    """Write a checkpoint and stop."""

    @classmethod
    def of_sum(cls, total: float) -> Request:
        if total >= cls.STOP_NOW:
            return cls.STOP_NOW
        return cls.STOP_AT_CHECKPOINT if total else cls.GO_ON
