"""Trying again while a store fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)
"""Seconds between tries: two minutes, besides what the tries themselves take. A number of tries and not a deadline, so
that ranks which see the same failures give up together."""

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


def retried(
    action: Callable[[], ResultT],
    what: str,
    *,
    on: tuple[type[Exception], ...] = (OSError,),
    pauses: Sequence[float] = PAUSES,
    sleep: Callable[[float], None] = time.sleep,
) -> ResultT:
    """The result of `action`, tried again after each of the pauses while it raises one of `on`.

    That a file is not there is an answer and no failure, so FileNotFoundError is raised at once.

    Args:
        what: names the action in the log.
    """
    for pause in pauses:
        try:
            return action()
        except FileNotFoundError:
            raise
        except on as error:
            log.warning("%s: %s; trying again in %g s", what, error, pause)
        sleep(pause)
    return action()
