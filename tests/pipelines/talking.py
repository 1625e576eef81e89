"""An endpoint that speaks OpenAI's API and says what it was told to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Endpoint:
    """`asked` are the bodies of the requests, `keys` what they had for Authorization. A reply is its pieces; a number
    is the status of a refusal."""

    url: str = ""
    replies: list[list[str] | int] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    models: Any = field(default_factory=lambda: {"object": "list", "data": [{"id": "tiny", "object": "model"}]})


@contextmanager
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, "application/json", json.dumps(made.models))

        def do_POST(self) -> None:
            made.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            made.keys.append(self.headers["Authorization"])
            reply = made.replies.pop(0)
            if isinstance(reply, int):
                error = {"error": {"message": "too long\nfor it", "type": "invalid", "param": None, "code": None}}
                self._answer(reply, "application/json", json.dumps(error))
                return
            chunks = [_chunk([{"index": 0, "delta": {"content": piece}, "finish_reason": None}]) for piece in reply]
            usage = {"prompt_tokens": 40, "completion_tokens": len(reply), "total_tokens": 40 + len(reply)}
            chunks.append(_chunk([], usage=usage | {"prompt_tokens_details": {"cached_tokens": 32}}))
            lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
            self._answer(200, "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]))

        def _answer(self, status: int, kind: str, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _chunk(choices: list[Any], **others: Any) -> dict[str, Any]:
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": choices} | others
