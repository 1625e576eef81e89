"""The page that asks for the token. Plain HTML: it is what a stranger sees, and nothing else is to run for one."""

from __future__ import annotations

import hmac
import time
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from pipelines.service.door import CONSOLE, LOGIN
from pipelines.service.passes import COOKIE, SECONDS, Passes

FORM = "application/x-www-form-urlencoded"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Caravan</title><style>
body {{ font: 16px system-ui, sans-serif; max-width: 24rem; margin: 15vh auto; padding: 0 1rem }}
input, button {{ font: inherit; width: 100%; padding: .6rem; margin: .4rem 0; box-sizing: border-box }}
.wrong {{ color: #b91c1c }}
</style></head><body><main><h1>Caravan</h1><form method="post" action="{action}">
<label for="token">The service's token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Enter</button><p class="wrong" role="alert">{told}</p></form></main></body></html>"""


def login_routes(token: str | None) -> APIRouter:
    """`token` is the service's; without one nobody is asked."""
    routes = APIRouter(include_in_schema=False)
    passes = None if token is None else Passes(token)

    @routes.get(LOGIN)
    async def ask() -> Response:
        return _page("") if passes is not None else RedirectResponse(f"{CONSOLE}/", 303)

    @routes.post(LOGIN)
    async def enter(request: Request) -> Response:
        given = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=5).get("token", [""])[0]
        if passes is None or token is None:
            return RedirectResponse(f"{CONSOLE}/", 303)
        if not hmac.compare_digest(given.strip().encode(), token.encode()):
            return _page("That is not the token.", 401)
        answer = RedirectResponse(f"{CONSOLE}/", 303)
        is_secure = request.url.scheme == "https"
        pass_ = passes.issue(time.time())
        answer.set_cookie(
            COOKIE, pass_, max_age=SECONDS, path=CONSOLE, httponly=True, samesite="strict", secure=is_secure
        )
        return answer

    return routes


def _page(told: str, status: int = 200) -> HTMLResponse:
    headers = {
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(_PAGE.format(action=LOGIN, told=told), status, headers)
