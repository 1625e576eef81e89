"""How much a caller may ask: requests and tokens a minute, requests at once. Decisions only, with a clock given."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.serve.api_error import ApiError

Clock = Callable[[], float]

MINUTE_S = 60.0
_AGAIN_S = 1.0
"""When to come again after too many requests at once: nobody knows when one of them ends."""


class RateLimited(ApiError):
    """429: the caller is over a limit; in `retry_after_s` seconds it may not be any more."""

    def __init__(self, message: str, kind: Literal["requests", "tokens"], retry_after_s: float) -> None:
        super().__init__(429, message, kind=kind, code="rate_limit_exceeded", retry_after_s=retry_after_s)


class Bucket:
    """A token bucket: `per_minute` units flow in evenly, and a minute's worth fits in.

    It may be below zero, by what could only be counted when it was done; until that is paid back nothing is taken.
    """

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = per_minute
        self._at = clock()

    def level(self) -> float:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / MINUTE_S)
        self._at = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `take` would take it. What is more than fits in is taken from a full bucket."""
        missing = min(amount, self.per_minute) - self.level()
        return max(0.0, missing) * MINUTE_S / self.per_minute

    def take(self, amount: float) -> float:
        """Takes it and returns 0, or takes nothing and returns `wait_s`."""
        wait = self.wait_s(amount)
        if wait == 0:
            self._level -= amount
        return wait

    def spend(self, amount: float) -> None:
        """Takes it whether it is there or not; a negative amount is given back."""
        self._level = min(self.per_minute, self.level() - amount)

    def full_s(self) -> float:
        """Seconds until it is full."""
        return (self.per_minute - self.level()) * MINUTE_S / self.per_minute


@dataclass(frozen=True)
class Limits:
    """None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None

    def share(self, processes: int) -> "Limits":
        """What one of `processes` that share the load evenly allows.

        Requests at once are rounded up, so that none allows nothing: all together may allow up to `processes` - 1
        more than the limit.
        """
        requests, tokens, concurrency = self.requests_per_minute, self.tokens_per_minute, self.concurrency
        return Limits(
            requests and max(1, requests // processes),
            tokens and max(1, tokens // processes),
            concurrency and -(-concurrency // processes),
        )


class Allowance:
    """What one caller may still ask of this process, now."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._clock = clock
        self.running = 0
        self.set(limits)

    def set(self, limits: Limits) -> None:
        """Other limits; requests that run go on, and a bucket that changes begins full."""
        self._concurrency = limits.concurrency
        self._requests = self._bucket(getattr(self, "_requests", None), limits.requests_per_minute)
        self._tokens = self._bucket(getattr(self, "_tokens", None), limits.tokens_per_minute)

    def _bucket(self, old: Bucket | None, per_minute: int | None) -> Bucket | None:
        if old is not None and old.per_minute == per_minute:
            return old
        return Bucket(per_minute, self._clock) if per_minute is not None else None

    def enter(self) -> None:
        """Begins a request, which `leave` ends. Raises RateLimited, and then nothing was taken."""
        if self._concurrency is not None and self.running >= self._concurrency:
            message = f"This key may have {self._concurrency} requests at once, and has; wait for one to end."
            raise RateLimited(message, "requests", _AGAIN_S)
        if self._tokens is not None and (wait := self._tokens.wait_s(1)):
            raise self._over_tokens(wait)
        if self._requests is not None and (wait := self._requests.take(1)):
            message = f"This key may make {self._requests.per_minute} requests a minute; {_come_again(wait)}"
            raise RateLimited(message, "requests", wait)
        self.running += 1

    def leave(self) -> None:
        self.running -= 1

    def take_tokens(self, tokens: int) -> None:
        """Raises RateLimited, and then nothing was taken."""
        if self._tokens is not None and (wait := self._tokens.take(tokens)):
            raise self._over_tokens(wait)

    def spend_tokens(self, tokens: int) -> None:
        """Counts tokens that are used already; negative ones are given back."""
        if self._tokens is not None:
            self._tokens.spend(tokens)

    def _over_tokens(self, wait: float) -> RateLimited:
        assert self._tokens is not None
        message = f"This key may use {self._tokens.per_minute} tokens a minute; {_come_again(wait)}"
        return RateLimited(message, "tokens", wait)

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` of the limits that there are."""
        headers = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level())))
                headers[f"x-ratelimit-reset-{name}"] = duration(bucket.full_s())
        return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: `17ms`, `1s`, `6m0s`; rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _come_again(wait: float) -> str:
    return f"come again in {duration(wait)}."
