"""What of an HTTP request is read before anything is made of it: its media type and a body of bounded size."""

from fastapi import Request

from cluster.serve.protocol import ApiError

MAX_BODY_BYTES = 4 << 20


def require_json(http: Request) -> None:
    """Raises ApiError (415) unless the request says that it carries JSON.

    A web page of another origin can make a browser send plain forms and text to a server on this machine, but not
    this media type: for that the browser first asks the server, which never agrees.
    """
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"Content-Type is {media_type or 'missing'!r}; send application/json."
        raise ApiError(415, message, code="unsupported_media_type")


async def read_json_body(http: Request) -> bytes:
    """The bytes of a request that carries JSON; raises ApiError (415; 413 for more than MAX_BODY_BYTES)."""
    require_json(http)
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            message = f"The body of the request is longer than {MAX_BODY_BYTES} bytes; shorten it."
            raise ApiError(413, message, code="request_too_large")
    return bytes(body)
