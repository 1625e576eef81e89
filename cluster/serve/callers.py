"""What a request handler knows of who asks. The gate notes it in the request's scope."""

from dataclasses import dataclass

from fastapi import Request

from cluster.serve.api_error import ApiError
from cluster.serve.limits import Allowance

CALLER, METER, REQUEST_ID, ARRIVED = "caller", "meter", "request_id", "arrived"
"""Keys of `scope["state"]`."""


@dataclass(frozen=True)
class Caller:
    """Who asks. `name` is empty where no keys are set. `salt`: requests of one salt share cached blocks, and a fair
    share of the engine. `priority`: the highest that its requests may have, lower is sooner; None is any."""

    name: str = ""
    salt: str = ""
    priority: int | None = None
    operator: bool = True

    def priority_for(self, asked: int | None) -> int:
        """The priority of a request that asks for `asked`, None being 0 or what is allowed.

        Raises ApiError (403) when that is sooner than the caller may ask for.
        """
        if asked is None:
            return max(0, self.priority or 0)
        if self.priority is not None and asked < self.priority:
            message = f"priority={asked} is sooner than this key may ask for; give {self.priority} or more."
            raise ApiError(403, message, param="priority", code="priority_not_allowed")
        return asked


ANONYMOUS = Caller()


class Meter:
    """Counts a request's tokens against its caller's tokens a minute, as they become known."""

    def __init__(self, allowance: Allowance | None = None) -> None:
        self._allowance = allowance
        self._spent = 0

    def prompt(self, tokens: int) -> None:
        """Before they are sent to an engine. Raises ApiError (429) when the caller has not so many left."""
        if self._allowance is not None:
            self._allowance.take_tokens(tokens)
            self._spent += tokens

    def generated(self, tokens: int) -> None:
        """As they come. Nobody knew how many there would be, so this may leave the caller in debt, never fails, and
        holds back what the caller asks next."""
        if self._allowance is not None:
            self._allowance.spend_tokens(tokens)
            self._spent += tokens

    def refund(self) -> None:
        """Gives back all that was counted: the server failed on the request."""
        if self._allowance is not None:
            self._allowance.spend_tokens(-self._spent)
            self._spent = 0


def caller_of(http: Request) -> Caller:
    return http.scope.get("state", {}).get(CALLER, ANONYMOUS)


def meter_of(http: Request) -> Meter:
    return http.scope.get("state", {}).get(METER) or Meter()


def arrived_of(http: Request) -> float | None:
    """When the whole request was there, by `time.monotonic()`."""
    return http.scope.get("state", {}).get(ARRIVED)


def request_id_of(http: Request) -> str:
    """What the response's `X-Request-Id` says. A client may choose it, so two requests can have the same: make what
    must be unique (an engine's request) longer by a random part."""
    return http.scope["state"][REQUEST_ID]
