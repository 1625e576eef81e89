"""What does not work, as the latest whole tick of the service found it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.head import ClusterError
from cluster.storage import StorageError

_log = logging.getLogger(__name__)


class Problems:
    """One thread notes; any thread asks for the `last`."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}
        self._noted: dict[str, str] = {}

    def last(self) -> dict[str, str]:
        """Why it does not work, by what it is."""
        return dict(self._last)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """A tick: what is noted in the block is the last, once it is over."""
        self._noted = {}
        try:
            yield
        finally:
            self._last = self._noted

    @contextmanager
    def of(self, what: str, run_id: str | None = None) -> Iterator[None]:
        """An expected failure of what the block needs is noted, and logged when it is new; so is a defect that one run
        meets, which is not to keep the service from all others."""
        try:
            yield
        except (StorageError, ClusterError) as error:
            what = "store" if isinstance(error, StorageError) else what
            if what not in self._last:
                _log.warning("%s: %s", what, error)
            self.note(what, str(error))
        except Exception as error:
            if run_id is None:
                raise
            what = f"run {run_id}"
            if what not in self._last:
                _log.exception("%s: the service failed on it", what)
            self.note(what, f"the service failed on it ({type(error).__name__}); its log says where")

    def note(self, what: str, why: str) -> None:
        self._noted[what] = why
