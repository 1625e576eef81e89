"""Who may ask, as it is set now: the keys, what each has left, and the web origins. Settings and key file may change
while requests run."""

import asyncio
import ipaddress
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from cluster.serve.api_error import ApiError
from cluster.serve.callers import ANONYMOUS, Caller
from cluster.serve.keys import MAX_KEY_BYTES, REREAD_S, KeyFile, LiveKeys
from cluster.serve.limits import Allowance, Clock, Limits
from cluster.serve.settings import check_origin

Headers = list[tuple[bytes, bytes]]

OPEN_ROUTES = frozenset({"/health", "/ready"})
OPERATORS_ROUTES = frozenset({"caravan", "metrics"})
"""First parts of their paths."""


class Access:
    """Until `set` was called nobody is let in.

    `processes`: how many share the load, and so the limits of a key, at present. `clock`: seconds.
    """

    def __init__(self, processes: Callable[[], int] = lambda: 1, clock: Clock = time.monotonic) -> None:
        self._processes = processes
        self._clock = clock
        self._live: LiveKeys | None = None
        self._allowances: dict[str, Allowance] = {}
        self._is_set = False
        self.origins: tuple[str, ...] = ()

    def set(self, api_keys: str | None, cors_origins: tuple[str, ...] = ()) -> None:
        """`api_keys`: URI of the key file; None lets everybody in. `cors_origins`: see `check_origin`.

        Raises KeysError when the file cannot be read and ValueError for an origin; then all is as before.
        """
        origins = tuple(map(check_origin, cors_origins))
        if api_keys is None:
            self._live = None
        elif self._live is None or self._live.uri != api_keys:
            self._live = LiveKeys(KeyFile(api_keys))
        self.origins = origins
        self._is_set = True
        self._share_out()

    async def follow(self, period_s: float = REREAD_S) -> None:
        """Reads the key file again and again, for ever."""
        while True:
            await asyncio.sleep(period_s)
            await self.refresh()

    async def refresh(self) -> None:
        if self._live is not None:
            await self._live.refresh()
            self._share_out()

    def _share_out(self) -> None:
        """What a caller has used up outlives every change."""
        before, self._allowances = self._allowances, {}
        for record in self._live.keys.keys if self._live is not None else ():
            limits = Limits(record.requests_per_minute, record.tokens_per_minute, record.concurrency)
            share = limits.share(max(1, self._processes()))
            allowance = before.get(record.name)
            if allowance is None:
                allowance = Allowance(share, self._clock)
            else:
                allowance.set(share)
            self._allowances[record.name] = allowance

    def admit(self, path: str, headers: Headers) -> tuple[Caller, Allowance | None]:
        """Who asks, and what the request counts against. Raises ApiError: 401, 403, and 503 before anything is set.

        Without keys everybody on this machine may ask, but no web page: see `_check_host`. With keys every route needs
        one, but for those that load balancers ask. The operators' show every caller's doings; they are not counted
        against the limits of the operator's key.
        """
        if path in OPEN_ROUTES:
            return Caller(operator=False), None
        if not self._is_set:
            raise ApiError(503, "The server is starting; try again.", code="not_ready", kind="server_error")
        if self._live is None:
            _check_host(headers)
            return ANONYMOUS, None
        record = self._live.keys.find(_bearer_key(headers))
        if record is None:
            raise ApiError(401, "This API key is not valid; ask the operator for one.", code="invalid_api_key")
        caller = Caller(record.name, record.name if record.isolated else "", record.priority, record.operator)
        if path.partition("/")[2].partition("/")[0] not in OPERATORS_ROUTES:
            return caller, self._allowances[record.name]
        if not caller.operator:
            message = "This route needs an operator's key: caravan keys add NAME --operator."
            raise ApiError(403, message, code="operator_key_needed")
        return caller, None


def _check_host(headers: Headers) -> None:
    """Raises ApiError (403) when the server is called by a name that anybody may own.

    A web page whose owner has its name lead to this machine (DNS rebinding) is of our own origin to the browser, which
    then lets it ask without asking us first.
    """
    host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "localhost")
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name != "localhost" and not name.endswith(".localhost"):
            ipaddress.ip_address(name)
    except ValueError:
        message = "Where no keys are set, call this server by its address or as localhost; or set keys: --api-key-file."
        raise ApiError(403, message, code="host_not_allowed") from None


def _bearer_key(headers: Headers) -> bytes:
    """The key of `Authorization: Bearer KEY`. Raises ApiError (401); what was sent is not repeated."""
    given = [value for name, value in headers if name == b"authorization"]
    if not given:
        message = "You did not provide an API key; send the header Authorization: Bearer YOUR_KEY."
        raise ApiError(401, message, code="invalid_api_key")
    scheme, _, key = given[0].partition(b" ")
    key = key.strip(b" ")
    if len(given) > 1 or scheme.lower() != b"bearer" or not 0 < len(key) <= MAX_KEY_BYTES:
        message = "The Authorization header is not understood; send it once, as Authorization: Bearer YOUR_KEY."
        raise ApiError(401, message, code="invalid_api_key")
    return key
