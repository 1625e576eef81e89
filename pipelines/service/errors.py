"""Why the service does not do what it is asked. The messages are one line, for whoever asked."""


class RequestRefused(ValueError):
    """A request that cannot be met; `field` is the part of it that is to blame, if one is."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnknownRun(LookupError):
    """The store has no such run, or the run no such thing."""


class WrongState(RuntimeError):
    """The run is in a state in which that cannot be done."""


class Busy(RuntimeError):
    """It was not done in time: the store, or the Jobs API, does not answer."""
