"""Asks an endpoint for the records that its ingress processes keep."""

from typing import Any
from urllib.parse import quote

import httpx

from cluster.serve.errors import ServeError

_TIMEOUT_S = 10.0


class RequestNotFound(ServeError):
    """No ingress process remembers a request."""


def find_request(url: str, request_id: str, api_key: str | None = None) -> list[dict[str, Any]]:
    """The records of one HTTP request, one for each of its prompts.

    `api_key`: an operator's, where keys are set. Raises RequestNotFound, ServeError.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        # Environment proxies are for other hosts; the endpoint is loopback unless asked otherwise.
        with httpx.Client(trust_env=False, timeout=_TIMEOUT_S, headers=headers) as http:
            response = http.get(f"{url}/caravan/requests/{quote(request_id, safe='')}")
            body = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ServeError(f"the endpoint at {url} does not answer: {error}") from error
    if response.status_code == 200:
        return body["requests"]
    message = body.get("error", {}).get("message") or response.reason_phrase
    raise (RequestNotFound if response.status_code == 404 else ServeError)(message)
