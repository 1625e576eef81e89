"""What a browser holds in place of the token: a cookie that says until when it is good, signed with the token.

Nothing is kept of them, so that a service that was killed knows those that the one before it gave; a new token ends
them all. A page's scripts cannot read the cookie, and no other site's page sends it.
"""

from __future__ import annotations

import hashlib
import hmac

COOKIE = "caravan_pass"
SECONDS = 12 * 3600

_PURPOSE = b"caravan console "
_LONGEST = 100


class Passes:
    """`token` is the service's."""

    def __init__(self, token: str) -> None:
        self._key = hashlib.sha256(_PURPOSE + token.encode()).digest()

    def issue(self, now: float) -> str:
        """A pass good for SECONDS from `now`, seconds since the epoch."""
        until = str(int(now) + SECONDS)
        return f"{until}.{self._sign(until)}"

    def holds(self, given: str, now: float) -> bool:
        """Whether that is a pass that was issued with this token and is still good."""
        until, _, signature = given[:_LONGEST].partition(".")
        if not (until.isascii() and until.isdigit()):
            return False
        return hmac.compare_digest(signature.encode(), self._sign(until).encode()) and now < int(until)

    def _sign(self, until: str) -> str:
        return hmac.new(self._key, until.encode(), hashlib.sha256).hexdigest()
